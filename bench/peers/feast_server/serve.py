"""Run Feast's feature server over HTTP: `feast serve` runs FastAPI in gunicorn's uvicorn workers.

python serve.py FOLDER PORT WORKERS REDIS_URL redis|redis-precomputed|sqlite|sqlite-precomputed
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import feast_repo
from lookups import Scenario

KEEP_ALIVE_S = 3600
REGISTRY_TTL_S = 86_400  # no refresh of the registry during a measurement


def main() -> None:
    if not 5 <= len(sys.argv) <= 6:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL [VARIANT]")
    folder, port, workers, redis_url = sys.argv[1:5]
    variant = sys.argv[5] if len(sys.argv) > 5 else feast_repo.VARIANTS[0]
    _, repository = feast_repo.make(Scenario(folder), variant, redis_url)
    command = str(Path(sys.executable).with_name("feast"))
    options = ["--host", "127.0.0.1", "--port", port, "--workers", workers, "--no-access-log"]
    # By default a worker restarts after 1,000 requests, which is one second of this load.
    options += ["--max-requests", "0", "--max-requests-jitter", "0"]
    options += ["--keep-alive-timeout", str(KEEP_ALIVE_S), "--registry_ttl_sec", str(REGISTRY_TTL_S)]
    # The server replaces this process, so that a signal to this process stops the server itself.
    os.execv(command, [command, "--chdir", str(repository), "serve", *options])


if __name__ == "__main__":
    main()
