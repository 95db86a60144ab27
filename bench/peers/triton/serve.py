"""Run Triton Inference Server: the `tritonserver` of nvidia-pytriton with its Python backend, one tensor per column.

python serve.py FOLDER PORT WORKERS REDIS_URL

The server runs directly on a model repository, and not through pytriton: pytriton's proxy between the backend and the
model takes several times the CPU of the request.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from pytriton.utils.distribution import get_libs_path, get_root_module_path, get_stub_path

HERE = Path(__file__).parent
BATCH = 32


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL")
    folder, port, workers, redis_url = sys.argv[1:]
    server = get_root_module_path() / "tritonserver"
    made = Path(folder).absolute() / "triton"
    shutil.rmtree(made, ignore_errors=True)
    # The backend looks for its stub, the process that runs the model, only in its own folder.
    shutil.copytree(server / "backends", made / "backends")
    shutil.copy(get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}"), made / "backends" / "python")
    model = made / "models" / "scores"
    (model / "1").mkdir(parents=True)
    shutil.copy(HERE / "model.py", model / "1")
    (model / "config.pbtxt").write_text(configuration(Path(folder).absolute(), workers, redis_url))
    # The stub embeds Python, so the Python library has to match this environment's standard library.
    libraries = f"{get_libs_path()}:{sysconfig.get_config_var('LIBDIR')}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["--model-repository", str(made / "models"), "--backend-directory", str(made / "backends")]
    options += ["--http-address", "127.0.0.1", "--http-port", port, "--http-thread-count", workers]
    options += ["--allow-grpc", "false", "--allow-metrics", "false", "--log-info", "false"]
    # The server replaces this process, so that a signal to this process stops the server itself.
    command = str(server / "bin" / "tritonserver")
    os.execve(command, [command, *options], os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path})


def configuration(folder: Path, workers: str, redis_url: str) -> str:
    """Return the model's config.pbtxt. Every request is one row of a batch, however many items it scores."""
    described = json.loads((folder / "scenario.json").read_text())
    types = dict.fromkeys(described["keys"], "INT64") | dict.fromkeys(described["values"], "FP64")
    peer = json.dumps(json.dumps([str(folder), redis_url, str(HERE.parent), list(types)]))
    lines = ['backend: "python"', f"max_batch_size: {BATCH}", "dynamic_batching { }"]
    lines += [f'input {{ name: "{name}" data_type: TYPE_{kind} dims: [-1] }}' for name, kind in types.items()]
    lines += ['output { name: "scores" data_type: TYPE_FP32 dims: [-1] }']
    lines += [f"instance_group {{ count: {workers} kind: KIND_CPU }}"]
    lines += [f'parameters {{ key: "peer" value {{ string_value: {peer} }} }}']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
