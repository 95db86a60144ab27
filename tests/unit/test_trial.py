"""A model file is tried in a process that can be killed: what crashes, hangs or fails there is one error here."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import commands
import pytest
from bad_models import deadly, deadly_to_load, endless, sound

import shorttail as st
from shorttail.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ShorttailError,
)
from shorttail.models import trial
from shorttail.models.session import ModelFailed
from shorttail.models.trial import try_file

TIMEOUT_S = 60.0  # ends a wait that would never end
CHILD = [sys.executable, "-c"]
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")  # it ends a process with SIGABRT where the system would otherwise


def run(function: Callable[..., Any], *args: Any, limit_s: float = TIMEOUT_S) -> Any:
    return try_file(function, *args, model="m", limit_s=limit_s)


def pid_of_trial() -> int:
    return int(run(os.getpid))


_others: set[int] = set()  # children of this process that other tests have made


def children() -> set[int]:
    """The children of this process, zombies too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(int(process.name))
    return found


def processes() -> list[int]:
    """The children of this process that a test of this file has made, zombies too."""
    return sorted(children() - _others)


def is_trial(pid: int) -> bool:
    return b"shorttail.models.trial" in Path(f"/proc/{pid}/cmdline").read_bytes()


def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process is no more, or is a zombie that its parent has not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    trial.end_idle()
    _others.clear()
    _others.update(children())
    yield
    trial.end_idle()


# -- functions that a trial runs -----------------------------------------------------------------------------------


def fail(error: Exception) -> None:
    raise error


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(TIMEOUT_S)


def say(text: str) -> int:
    log = logging.getLogger("shorttail.tried")
    log.info("%s: not at this level", text)
    log.warning("%s %d", text, 7)
    print("not part of a command's output")
    return len(text)


def hold_the_gil() -> None:
    import ctypes

    ctypes.PyDLL(None).sleep(int(TIMEOUT_S))


# -- results, errors and logs --------------------------------------------------------------------------------------


def test_a_trial_takes_no_longer_in_a_store_of_many_views_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent to the process is of the model that is tried, and of what it reads."""
    sent: list[int] = []
    run_job = trial.TrialProcess.run

    def counted(process: trial.TrialProcess, job: bytes, *args: Any) -> Any:
        sent.append(len(job))
        return run_job(process, job, *args)

    monkeypatch.setattr(trial.TrialProcess, "run", counted)
    user = st.Entity("user", keys={"user_id": st.Int64})

    def views(first: int, stop: int) -> list[st.FeatureView]:
        return [
            st.FeatureView(f"v{n:02}", entity=user, features=[st.Feature("x", st.Float32)]) for n in range(first, stop)
        ]

    def models(first: int, stop: int) -> list[st.Model]:
        path = sound(tmp_path / "m.onnx")
        return [st.Model(f"m{n:02}", path, ["v00:x"]) for n in range(first, stop)]

    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([*views(0, 1), *models(0, 1)])
        alone = max(sent)
        engine.apply([*views(1, 40), *models(1, 39)])
        sent.clear()
        engine.apply(models(39, 40))
    assert abs(max(sent) - alone) < 100


def test_results_and_logs_come_back(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(say, "hello") == 5
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("shorttail.tried", "WARNING", "hello 7")
    ]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [NotFound("no 'x'"), ModelFailed("the model failed: y"), InvalidArgument("long " * 4000), ValueError("a\nb")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_type_and_text(error: Exception) -> None:
    pid = pid_of_trial()
    with pytest.raises(type(error)) as caught:
        run(fail, error)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert pid_of_trial() == pid, "the process goes on"


def test_an_error_of_no_type_of_ours_has_its_traceback_in_a_note() -> None:
    with pytest.raises(KeyError) as caught:
        run(fail, KeyError("x"))
    assert "in fail" in "".join(caught.value.__notes__)


class Unpicklable(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    with pytest.raises(Internal, match="Unpicklable: 1 and 2"):
        run(fail_unpicklable)


def fail_unpicklable() -> None:
    raise Unpicklable(1, 2)


@pytest.mark.parametrize(
    ("signum", "kind", "message"),
    [
        (signal.SIGSEGV, InvalidArgument, "model 'm': its file killed the process that tried it (SIGSEGV)"),
        (signal.SIGFPE, InvalidArgument, "model 'm': its file killed the process that tried it (SIGFPE)"),
        (signal.SIGABRT, InvalidArgument, "model 'm': its file killed the process that tried it (SIGABRT)"),
        (
            signal.SIGKILL,
            ResourceExhausted,
            "model 'm': the process that tried its file was killed (SIGKILL); it may need more memory than there is",
        ),
    ],
)
def test_a_process_that_dies_is_one_line(signum: int, kind: type[ShorttailError], message: str) -> None:
    with pytest.raises(kind) as caught:
        run(die, signum)
    assert caught.value.message == message or ASAN
    assert run(say, "again") == 5


def test_a_process_that_exits_is_one_line() -> None:
    with pytest.raises(Internal, match="the process that tried its file ended with exit code 3"):
        run(os._exit, 3)


def test_a_trial_that_takes_too_long_is_killed() -> None:
    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.5 s, and was ended; .*--vet-timeout"):
        run(hold_the_gil, limit_s=0.5)
    assert not processes()


# -- the process ---------------------------------------------------------------------------------------------------


def test_a_process_is_kept_for_the_next_trial_and_ends_without_a_trace() -> None:
    before = sorted(Path("/proc/self/fd").iterdir()), threading.active_count()
    pid = pid_of_trial()
    assert pid_of_trial() == pid
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C reaches this process alone"
    trial.end_idle()
    assert gone(pid)
    assert not processes(), "no zombie"
    gc.collect()
    assert (sorted(Path("/proc/self/fd").iterdir()), threading.active_count()) == before


def test_a_process_that_is_not_used_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "IDLE_S", 0.05)
    pid_of_trial()
    until(lambda: not processes())


def test_a_process_that_somebody_killed_is_replaced() -> None:
    pid = pid_of_trial()
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    assert pid_of_trial() != pid
    assert len(processes()) == 1


def test_threads_have_processes_of_their_own() -> None:
    with ThreadPoolExecutor(3) as threads:
        barrier = threading.Barrier(3)

        def at_once() -> int:
            barrier.wait(TIMEOUT_S)
            return int(run(slow_pid))

        assert len({future.result() for future in [threads.submit(at_once) for _ in range(3)]}) == 3
    assert len(processes()) == 1, "one is kept"


def slow_pid() -> int:
    time.sleep(1)  # not for synchronisation: the others begin meanwhile
    return os.getpid()


def test_low_priority() -> None:
    high = run(os.getpriority, os.PRIO_PROCESS, 0)
    with trial.low_priority():
        assert run(os.getpriority, os.PRIO_PROCESS, 0) == min(trial.NICE, 19)
    assert run(os.getpriority, os.PRIO_PROCESS, 0) == high


def test_a_fork_has_no_part_in_the_process_of_its_parent() -> None:
    """In a program of its own: pytest's process has threads."""
    code = """
import os, sys, warnings
warnings.simplefilter("error")
from shorttail.models.trial import try_file
before = try_file(os.getpid, model="m", limit_s=60)
child = os.fork()
if child == 0:
    own = try_file(os.getpid, model="m", limit_s=60)
    print(own != before, try_file(os.getppid, model="m", limit_s=60) == os.getpid(), flush=True)
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(try_file(os.getppid, model="m", limit_s=60) == os.getpid())
"""
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.stdout, done.stderr) == ("True True\nTrue\n", "")


PARENT = """
import os, sys, threading, time
from shorttail.models.trial import try_file
print(try_file(os.getpid, model="m", limit_s=60), flush=True)
sys.path[:0] = {folders!r}
from test_trial import hold_the_gil
if {busy}:
    threading.Thread(target=try_file, args=[hold_the_gil], kwargs={{"model": "m", "limit_s": 60}}, daemon=True).start()
    time.sleep(0.5)  # not for synchronisation: in native code by then, usually
child = os.fork() if {forks} else 0
os.write(1, b"%d\\n" % child)  # in one piece, because two processes write
time.sleep(60)
"""


@pytest.mark.parametrize(("busy", "forks"), [(False, False), (True, False), (True, True)])
def test_it_ends_when_its_parent_is_killed(busy: bool, forks: bool) -> None:
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = PARENT.format(folders=folders, busy=busy, forks=forks)
    with subprocess.Popen([*CHILD, code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        lines = [int(parent.stdout.readline()) for _ in range(1 + forks)]
        parent.kill()
        try:
            until(lambda: gone(pid))
        finally:
            if child := max(lines):
                os.kill(child, signal.SIGKILL)


KILLED_EARLY = """
import os, signal, sys, threading, time
from shorttail.models import trial
sys.path[:0] = {folders!r}
from test_trial import hold_the_gil
send = trial.Connection.send_bytes
def send_and_end(connection, job):
    send(connection, job)
    [process] = trial._processes
    print(process.popen.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
trial.Connection.send_bytes = send_and_end
trial.try_file(hold_the_gil, model="m", limit_s=60)
"""


def test_it_ends_when_its_parent_is_killed_while_it_starts() -> None:
    """The job is in the socket by then, and the lifeline is closed before the process looks at it."""
    code = KILLED_EARLY.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=TIMEOUT_S)
    pid = int(done.stdout)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    try:
        until(lambda: gone(pid))
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_it_ends_with_a_parent_that_exits() -> None:
    code = "import os\nfrom shorttail.models.trial import try_file\nprint(try_file(os.getpid, model='m', limit_s=60))"
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert gone(int(done.stdout))
    assert done.stderr == ""


def test_it_finds_packages_where_its_parent_has_found_them(tmp_path: Path) -> None:
    """And a module that has the name of one that Python's start imports does not stop it."""
    (tmp_path / "stat.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "of_the_user.py").write_text("def f():\n    return 7\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import of_the_user
from shorttail.models.trial import try_file
print(try_file(of_the_user.f, model="m", limit_s=60))
"""
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_importing_the_package_starts_nothing() -> None:
    code = "import sys, shorttail; print('shorttail.models.trial' in sys.modules, 'multiprocessing' in sys.modules)"
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "False False\n"


# -- models that hang or crash -------------------------------------------------------------------------------------


def test_a_file_that_kills_the_process_is_not_registered(tmp_path: Path) -> None:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        for make in (deadly, deadly_to_load):
            bad = st.Model("m", path=make(tmp_path / "m.onnx"), inputs=["request:a"])
            with pytest.raises(InvalidArgument, match=r"^model 'm': its file killed the process .* \(SIGFPE\)$"):
                engine.apply([bad])
            assert not engine.models()
        engine.apply([st.Model("m", path=sound(tmp_path / "m.onnx"), inputs=["request:a"])])
        with pytest.raises(InvalidArgument):
            engine.apply([st.Model("m", path=deadly(tmp_path / "m.onnx"), inputs=["request:a"])])
        assert engine.predict("m", {"a": 0.0}).version == 1


def test_a_file_that_never_loads_is_not_registered(tmp_path: Path) -> None:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=sound(tmp_path / "m.onnx"), inputs=["request:a"])])
        bad = endless(tmp_path / "bad.onnx")
        for register in (
            lambda: engine.apply([st.Model("m", path=bad, inputs=["request:a"])], vet_timeout="2s"),
            lambda: engine.deploy("m", bad, vet_timeout="2s"),
        ):
            with pytest.raises(
                DeadlineExceeded, match="model 'm': trying its file took longer than 2 s, and was ended"
            ):
                register()
        assert engine.store.catalog.model("m").versions.keys() == {1}
        with pytest.raises(InvalidArgument, match="vet_timeout 'soon' is not a positive time; write '90s' or '10m'"):
            engine.deploy("m", bad, vet_timeout="soon")


def test_the_commands_take_the_time_that_a_trial_may_last(tmp_path: Path) -> None:
    (tmp_path / "definitions.py").write_text(
        f'import shorttail as st\nm = st.Model("m", path={endless(tmp_path / "m.onnx")!r}, inputs=["request:a"])\n'
    )
    done = commands.run(
        "apply", "definitions.py", "--store", "store", "--create", "--vet-timeout", "2s", folder=tmp_path
    )
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: model 'm': trying its file took longer than 2 s")
    assert not (tmp_path / "store").exists()
    for command in ("deploy m m.onnx", "promote m", "rollback m", "canary m=1%", "shadow m --version 1"):
        done = commands.run("models", *command.split(), "--store", "store", "--help", folder=tmp_path)
        assert "--vet-timeout TIME" in done.out


@pytest.mark.parametrize("kind", ["apply", "deploy"])
def test_ctrl_c_ends_a_trial(tmp_path: Path, kind: str) -> None:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=sound(tmp_path / "m.onnx"), inputs=["request:a"])])
    bad = endless(tmp_path / "bad.onnx")
    (tmp_path / "d.py").write_text(f'import shorttail as st\nm = st.Model("m", path={bad!r}, inputs=["request:a"])\n')
    arguments = ["apply", "d.py"] if kind == "apply" else ["models", "deploy", "m", bad]
    command = [sys.executable, "-m", "shorttail", *arguments, "--store", "store"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: [pid for pid in map(int, children.read_text().split()) if is_trial(pid)])
        [pid] = map(int, children.read_text().split())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err.strip()) == (130, "", "error: interrupted")
    until(lambda: gone(pid))  # its start is not finished if Ctrl-C came as early as that
    with st.Engine.open(tmp_path / "store") as engine:
        assert engine.store.catalog.model("m").versions.keys() == {1}


def test_one_file_that_kills_does_not_stop_the_list_of_models(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with st.Engine.open(store, create=True) as engine:
        for name in ("good", "bad"):
            engine.apply([st.Model(name, path=sound(tmp_path / "m.onnx"), inputs=["request:a"])])
    bad = store / "models" / "bad" / "1" / "model.onnx"
    deadly_to_load(bad)
    shown = {m["name"]: m["runs"] for m in commands.run_well("models", "--store", str(store), "--json").json}
    assert shown["good"] == "ONNX Runtime, 1 thread: it has no tree ensemble"
    assert shown["bad"] == "nothing: model 'bad': its file killed the process that tried it (SIGFPE)"
