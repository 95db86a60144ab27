"""The code of each replica of Ray Serve. Import it after serve.py has set Ray's environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from ray import serve
from scorer import Scorer
from starlette.requests import Request
from starlette.responses import Response

BATCH = 8
BATCH_WAIT_S = 0.0005


class Scores:
    """Answers with 503 until the file `opened` exists; serve.py says why."""

    def __init__(self, folder: str, redis_url: str, opened: str):
        self.scorer = Scorer(folder, redis_url)
        self.opened, self.is_open = Path(opened), False

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def score(self, requests: list[dict[str, Any]]) -> list[list[float]]:
        return self.scorer.score_many(requests)

    async def __call__(self, request: Request) -> Response:
        self.is_open = self.is_open or self.opened.exists()
        if not self.is_open:
            return Response(status_code=503)
        scores = await self.score(orjson.loads(await request.body()))
        return Response(orjson.dumps({"scores": scores}), media_type="application/json")
