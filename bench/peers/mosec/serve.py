"""Run mosec, a server in Rust with workers in Python: python serve.py FOLDER PORT WORKERS REDIS_URL"""

import os
import sys
from pathlib import Path

import orjson
from mosec import Server, Worker

sys.path.append(str(Path(__file__).resolve().parents[1]))
from scorer import Scorer

BATCH_REQUESTS, BATCH_WAIT_MS = 32, 1


class Model(Worker):
    def __init__(self):
        super().__init__()
        self.scorer = Scorer(os.environ["FOLDER"], os.environ["REDIS_URL"])

    def deserialize(self, data):
        return orjson.loads(data)

    def serialize(self, data):
        return orjson.dumps(data)

    def forward(self, requests):
        return [{"scores": scores} for scores in self.scorer.score_many(requests)]


if __name__ == "__main__":
    _, os.environ["FOLDER"], port, workers, os.environ["REDIS_URL"] = sys.argv
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "warning"]
    server = Server()
    server.append_worker(Model, num=int(workers), max_batch_size=BATCH_REQUESTS, max_wait_time=BATCH_WAIT_MS)
    server.run()
