"""Run BentoML: `bentoml serve` with WORKERS processes that share the port.

python serve.py FOLDER PORT WORKERS REDIS_URL
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KEEP_ALIVE_S = 3600


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL")
    folder, port, workers, redis_url = sys.argv[1:]
    os.environ.update(PEER_FOLDER=folder, PEER_WORKERS=workers, PEER_REDIS_URL=redis_url)
    os.environ.update(BENTOML_DO_NOT_TRACK="True", BENTOML_HOME=str(Path(folder).absolute() / "bentoml"))
    command = str(Path(sys.executable).with_name("bentoml"))
    options = ["--working-dir", str(Path(__file__).parent), "--host", "127.0.0.1", "--port", port]
    options += ["--timeout-keep-alive", str(KEEP_ALIVE_S)]
    # The server replaces this process, so that a signal to this process stops the server itself.
    os.execv(command, [command, "serve", "service:Scores", *options])


if __name__ == "__main__":
    main()
