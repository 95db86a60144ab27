"""A model file into what runs it: a compiled forest where the graph is one, ONNX Runtime otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from shorttail.models.forest import NotAForest, compile_forest
from shorttail.models.session import Session
from shorttail.store.catalog import TensorInfo

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What a plan runs: one array for each of `inputs` in, one for each of `output_names` out."""

    inputs: list[TensorInfo]
    output_names: list[str]

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]: ...


def load(path: Path, outputs: Sequence[str]) -> Runner:
    """The fastest thing that gives the file's answers. Raises InvalidArgument if ONNX Runtime cannot load it.

    A forest is compared with ONNX Runtime before it may serve: on rows at its thresholds, just below and just above.
    """
    session = Session(path, outputs)
    try:
        forest = compile_forest(path, session.output_names)
    except NotAForest as reason:
        log.info("%s runs in ONNX Runtime: %s", path, reason)
        return session
    try:
        forest.verify_against(session)
    except NotAForest as reason:
        log.warning("%s runs in ONNX Runtime, because its compiled forest answers otherwise: %s", path, reason)
        return session
    return forest
