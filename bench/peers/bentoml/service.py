"""The service that `bentoml serve` runs in each worker; serve.py passes the scenario in environment variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import orjson
from starlette.responses import Response

sys.path.append(str(Path(__file__).parents[1]))
from scorer import Scorer

TIMEOUT_S = 3600


@bentoml.service(
    workers=int(os.environ["PEER_WORKERS"]),
    traffic={"timeout": TIMEOUT_S},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    monitoring={"enabled": False},
    runner_probe={"enabled": False},
)
class Scores:
    def __init__(self) -> None:
        self.scorer = Scorer(os.environ["PEER_FOLDER"], os.environ["PEER_REDIS_URL"])

    # A coroutine, although it never awaits: BentoML runs a plain method in a thread, which costs more than the score.
    # Returns a response, so that pydantic does not walk through the list.
    @bentoml.api(route="/score")
    async def score(self, columns: dict[str, Any], /) -> dict[str, Any]:
        encoded = orjson.dumps({"scores": self.scorer.score(columns)})
        return Response(encoded, media_type="application/json")  # type: ignore[return-value]
