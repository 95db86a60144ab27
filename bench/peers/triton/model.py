"""The model of Triton's Python backend: it passes the requests of a batch to the scorer. See serve.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as backend  # a module that exists only in Triton's backend


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder, redis_url, peers, self.columns = json.loads(parameters["peer"]["string_value"])
        sys.path.append(peers)
        from scorer import Scorer

        self.scorer = Scorer(folder, redis_url)

    def execute(self, requests: list[Any]) -> list[Any]:
        asked = [{column: self.values(request, column) for column in self.columns} for request in requests]
        return [
            backend.InferenceResponse([backend.Tensor("scores", np.array([scores], np.float32))])
            for scores in self.scorer.score_many(asked)
        ]

    def values(self, request: Any, column: str) -> Any:
        """Return the values of a column's tensor [1, values] as a list, or the value if there is only one."""
        values = backend.get_input_tensor_by_name(request, column).as_numpy()[0].tolist()
        return values if len(values) > 1 else values[0]
