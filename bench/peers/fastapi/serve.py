"""Run FastAPI on uvicorn, as a careful user would write it: python serve.py FOLDER PORT WORKERS REDIS_URL"""

import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

sys.path.append(str(Path(__file__).resolve().parents[1]))
from scorer import Scorer

state = {}


@asynccontextmanager
async def lifespan(app):
    state["scorer"] = Scorer(os.environ["FOLDER"], os.environ["REDIS_URL"])
    yield


app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.post("/predict")
async def predict(request: Request) -> Response:
    # No pydantic model for the body and no asynchronous Redis client: both are slower on one core.
    scores = state["scorer"].score(orjson.loads(await request.body()))
    return Response(orjson.dumps({"scores": scores}), media_type="application/json")


if __name__ == "__main__":
    _, os.environ["FOLDER"], port, workers, os.environ["REDIS_URL"] = sys.argv
    uvicorn.run(
        "serve:app",
        port=int(port),
        workers=int(workers) if int(workers) > 1 else None,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
