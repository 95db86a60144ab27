"""The files in deploy/ fit the server: the command lines are valid, the probes ask routes that exist, and the times to
start and to stop, the open-file limit and the mode of the token file agree with the server's."""

import http.client
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

import click
import pytest
import yaml
from serving import TIMEOUT_S, Server, make_store

from shorttail.cli import cli
from shorttail.config import DEFAULT_HTTP_PORT, DEFAULT_PORT, LIMITS
from shorttail.server.security import read_tokens

DEPLOY = Path(__file__).parents[2] / "deploy"
PLATFORM = [
    document for path in sorted(DEPLOY.glob("kubernetes/*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
TOKEN = "a-token-for-those-who-read"
MARGIN_S = 5.0


def resource(kind, name="shorttail"):
    [found] = [item for item in PLATFORM if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def unit(name):
    """Read a unit file as {setting: [value, ...]}; a setting may be given more than once."""
    settings = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


def dockerfile():
    """Read the last stage of the Dockerfile as [(instruction, arguments)]."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    last = max(number for number, (instruction, _) in enumerate(lines) if instruction == "FROM")
    return [(instruction, arguments) for instruction, arguments in lines[last:]]


def instruction(name):
    [found] = [arguments for instruction, arguments in dockerfile() if instruction == name]
    return found


SET = resource("StatefulSet")["spec"]
POD = SET["template"]["spec"]
[SERVER] = POD["containers"]
UNIT = unit("shorttail.service")
COMMANDS = {
    "Dockerfile": json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD")),
    "shorttail.service": shlex.split(UNIT["ExecStart"][0]),
    "statefulset.yaml": ["shorttail", *SERVER["args"]],
}


def options(command):
    """Return the options that `shorttail serve` reads from a command line. Raises if it is not valid."""
    assert Path(command[0]).name == "shorttail"
    assert command[1] == "serve"
    return cli.commands["serve"].make_context("serve", command[2:], resilient_parsing=False).params


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Return a function that replaces the paths and addresses of a command line by those of this machine."""
    home = tmp_path_factory.mktemp("deployed")
    store = make_store(home)
    tokens = home / "tokens"
    tokens.write_text(f"serve {TOKEN}\n")
    tokens.chmod(POD["volumes"][0]["secret"]["defaultMode"])

    def local(command):
        split = [part for argument in command[2:] for part in argument.split("=", 1)]
        for option, value in {"--store": str(store), "--token-file": str(tokens), "--host": "127.0.0.1"}.items():
            if option in split:
                split[split.index(option) + 1] = value
        return split

    return local


@pytest.mark.parametrize("source", COMMANDS)
def test_the_command_lines_start_a_server(source, here):
    given = options(COMMANDS[source])
    assert given["store"].startswith("/var/lib/shorttail/")
    assert given["port"] == DEFAULT_PORT
    done = subprocess.run(
        [sys.executable, "-m", "shorttail", "serve", *here(COMMANDS[source]), "--check"],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok · models: total v1")


def test_an_option_that_does_not_exist_is_found():
    with pytest.raises(click.NoSuchOption):
        options([*COMMANDS["Dockerfile"], "--prefault"])


@pytest.fixture(scope="module")
def server(here, tmp_path_factory):
    """Run the server as the StatefulSet does, but on free ports of this machine."""
    split = here(COMMANDS["statefulset.yaml"])
    split.remove("--pin-cpus")  # the machine's CPUs are not this test's alone
    at = split.index("--store")
    server = Server(split[at + 1], *split[:at], *split[at + 2 :], log=tmp_path_factory.mktemp("log") / "log")
    yield server
    server.kill()


def http_port(server):
    return int(re.search(r"http on 127\.0\.0\.1:(\d+)", server.line)[1])


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_probes_need_no_token(server):
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[probe]["httpGet"]["port"] == "http"
        assert get(server, SERVER[probe]["httpGet"]["path"]) == 200, probe
    assert get(server, "/liveliness") == 404


def test_metrics_are_scraped_with_the_token(server):
    [endpoint] = resource("ServiceMonitor")["spec"]["endpoints"]
    assert get(server, endpoint["path"]) == 401
    kind = endpoint["authorization"]["type"]
    assert get(server, endpoint["path"], Authorization=f"{kind} {TOKEN}") == 200


def test_the_health_check_of_the_image(server):
    _, command = instruction("HEALTHCHECK").split("CMD", 1)
    python, flag, code = json.loads(command)
    assert (python, flag) == ("python", "-c")
    assert f"127.0.0.1:{DEFAULT_HTTP_PORT}/" in code

    def healthy(port):
        local = code.replace(str(DEFAULT_HTTP_PORT), str(port))
        return subprocess.run([sys.executable, flag, local], capture_output=True, timeout=TIMEOUT_S).returncode == 0

    assert healthy(http_port(server))
    assert not healthy(server.address[1])


def seconds(name):
    return float(UNIT[name][0])


def test_the_timeouts_leave_time_to_start_to_hang_and_to_stop():
    stop_s = 2 * LIMITS.stop_grace_s  # the workers, and then the writer
    assert seconds("TimeoutStopSec") >= stop_s + MARGIN_S
    # A worker that hangs in a model is killed after --start-timeout, and the server starts without that model.
    start_s = {
        name: 2 * options(COMMANDS[name])["start_timeout_s"] for name in ("shorttail.service", "statefulset.yaml")
    }
    assert seconds("TimeoutStartSec") >= start_s["shorttail.service"] + MARGIN_S
    before_s = float(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= before_s + stop_s + MARGIN_S
    startup, alive = SERVER["startupProbe"], SERVER["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= start_s["statefulset.yaml"] + MARGIN_S
    # The supervisor replaces a worker that hangs; Kubernetes and systemd must not restart the server before that.
    assert alive["periodSeconds"] * (alive["failureThreshold"] - 1) > LIMITS.hang_deadline_s
    assert seconds("WatchdogSec") > LIMITS.hang_deadline_s


def test_the_unit_permits_what_the_server_needs():
    assert UNIT["Type"] == ["notify-reload"]
    assert UNIT["KillMode"] == ["mixed"]  # the writer must not be told to stop while workers hand writes to it
    assert "MemoryDenyWriteExecute" not in UNIT
    assert seconds("LimitNOFILE") >= 2 * (LIMITS.connections + LIMITS.http_connections)
    assert options(COMMANDS["shorttail.service"])["lock_memory"]
    assert UNIT["LimitMEMLOCK"] == ["infinity"]
    writable = {f"/var/lib/{UNIT['StateDirectory'][0]}", f"/var/cache/{UNIT['CacheDirectory'][0]}"}
    assert {"/var/lib/shorttail", "/var/cache/shorttail"} == writable
    assert unit("shorttail.socket")["ListenStream"][0] == f"127.0.0.1:{DEFAULT_PORT}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path):
    for name in ("shorttail.service", "shorttail.socket"):
        text = (DEPLOY / name).read_text().replace(COMMANDS["shorttail.service"][0], sys.executable)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    # systemd before version 253 has no notify-reload; a comment in the unit says what to write instead.
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line and "notify-reload" not in line]
    assert said == []


def test_ports_and_labels_of_the_manifests_match():
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    assert ports == {"rpc": DEFAULT_PORT, "http": DEFAULT_HTTP_PORT}
    labels = SET["template"]["metadata"]["labels"]
    for service in (resource("Service"), resource("Service", SET["serviceName"])):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    for kind in ("PodDisruptionBudget", "StatefulSet"):
        assert resource(kind)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert resource("PodDisruptionBudget")["spec"]["maxUnavailable"] < SET["replicas"]
    policy = resource("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)
    monitored = resource("ServiceMonitor")["spec"]
    scraped = resource("Service", SET["serviceName"])["metadata"]["labels"]
    assert monitored["selector"]["matchLabels"].items() <= scraped.items()
    assert monitored["selector"]["matchLabels"].items() - resource("Service")["metadata"]["labels"].items()


def test_the_pod_gets_exclusive_cpus():
    for container in (*POD["initContainers"], SERVER):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} == container["resources"]["limits"].keys()
        assert container["resources"]["limits"]["cpu"].isdigit()
    assert int(SERVER["resources"]["limits"]["cpu"]) > options(COMMANDS["statefulset.yaml"])["workers"]


def test_nothing_runs_as_root_or_writes_outside_its_volumes():
    user = POD["securityContext"]["runAsUser"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert instruction("USER") == f"{user}:{POD['securityContext']['fsGroup']}"
    volumes = {volume["name"] for volume in POD["volumes"]} | {"data"}
    for container in (*POD["initContainers"], SERVER):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    given = options(COMMANDS["statefulset.yaml"])
    mounts = {mount["mountPath"] for mount in SERVER["volumeMounts"]}
    cache = re.search(r"SHORTTAIL_CACHE_DIR=(\S+)", instruction("ENV"))[1]
    for path in (given["store"], given["token_file"], cache):
        assert str(Path(path).parent) in mounts, path
    assert "/tmp" in mounts


def test_the_server_accepts_the_mode_of_the_mounted_token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"serve {TOKEN}\n")
    path.chmod(POD["volumes"][0]["secret"]["defaultMode"])
    assert list(read_tokens(str(path))) == [TOKEN]
    assert path.stat().st_mode & 0o040, "the user of the container is not the file's owner, but in its group"
