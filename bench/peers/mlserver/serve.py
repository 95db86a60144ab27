"""Run MLServer: the Open Inference Protocol in JSON, one tensor [1, values] per column of the request.

python serve.py FOLDER PORT WORKERS REDIS_URL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlserver
import uvloop
from mlserver.settings import ModelParameters, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

sys.path.append(str(Path(__file__).parents[1]))
from scorer import Scorer

KEEP_ALIVE_S = 3600
BATCH = 8
BATCH_WAIT_S = 0.0005


class Scores(mlserver.MLModel):
    async def load(self) -> bool:
        extra = self.settings.parameters.extra
        self.scorer = Scorer(extra["folder"], extra["redis_url"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Score a batch. MLServer joins the tensors of its requests along the first axis, and splits the answer."""
        requests = payload.inputs[0].shape[0]
        columns = {tensor.name: cut(tensor.data.root, requests) for tensor in payload.inputs}
        scores = self.scorer.score_many([{name: parts[i] for name, parts in columns.items()} for i in range(requests)])
        flat = [score for each in scores for score in each]
        output = ResponseOutput(name="scores", shape=[requests, len(scores[0])], datatype="FP32", data=flat)
        return InferenceResponse(model_name=self.name, outputs=[output])


def cut(values: list[Any], parts: int) -> list[Any]:
    """Split a list into one value per request, or one list if it has several, without a detour through arrays."""
    size = len(values) // parts
    return values if size == 1 else [values[start : start + size] for start in range(0, len(values), size)]


async def serve(folder: str, port: str, workers: str, redis_url: str) -> None:
    # For a small request the REST process takes more CPU than the score, and passing the request to a worker takes
    # even more, so a single process is the fastest. With many rows the model costs most, and workers share it.
    many_rows = json.loads((Path(folder) / "scenario.json").read_text())["rows"] > 1
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=int(port),
        grpc_port=0,
        parallel_workers=int(workers) if many_rows and int(workers) > 1 else 0,
        metrics_endpoint=None,
        gzip_enabled=False,
        # MLServer always makes these folders, by default in the current folder.
        environments_dir=str(Path(folder).absolute() / "mlserver"),
        metrics_dir=str(Path(folder).absolute() / "mlserver"),
    )
    settings._custom_rest_server_settings = {"timeout_keep_alive": KEEP_ALIVE_S}
    model = ModelSettings(
        name="scores",
        implementation="serve.Scores",
        parameters=ModelParameters(extra={"folder": folder, "redis_url": redis_url}),
        max_batch_size=BATCH,
        max_batch_time=BATCH_WAIT_S,
    )
    await mlserver.MLServer(settings).start([model])


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER PORT WORKERS REDIS_URL")
    uvloop.run(serve(*sys.argv[1:]))


if __name__ == "__main__":
    main()
