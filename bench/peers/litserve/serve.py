"""Run LitServe: uvicorn processes pass requests through a queue to worker processes, which answer over ZeroMQ.

python serve.py FOLDER PORT WORKERS REDIS_URL
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import litserve
import orjson
from starlette.responses import Response

sys.path.append(str(Path(__file__).parents[1]))
from scorer import Scorer

KEEP_ALIVE_S = 3600
BATCH = 8
BATCH_WAIT_S = 0.001  # with no wait the workers poll their queue all the time, on the cores of other processes


class Scores(litserve.LitAPI):
    def __init__(self, folder: str, redis_url: str):
        super().__init__(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S)
        self.folder, self.redis_url = folder, redis_url

    def setup(self, device: str) -> None:
        self.scorer = Scorer(self.folder, self.redis_url)

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, requests: list[dict[str, Any]]) -> list[list[float]]:
        return self.scorer.score_many(requests)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> Response:
        # Encoded once, here; FastAPI would walk through the list in Python before encoding it.
        return Response(orjson.dumps({"scores": output}), media_type="application/json")


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL")
    folder, port, workers, redis_url = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # LitServe ends its processes only on Ctrl-C
    server = litserve.LitServer(
        Scores(folder, redis_url), accelerator="cpu", workers_per_device=int(workers), fast_queue=True, timeout=False
    )
    server.run(
        host="127.0.0.1",
        port=int(port),
        num_api_servers=int(workers),
        log_level="warning",
        generate_client_file=False,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


if __name__ == "__main__":
    main()
