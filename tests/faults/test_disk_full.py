"""A disk that is full or fails at any write of a step: an error says so, the store stays, and work continues.

`make soak` tries each kind of step with each mode of failure; a short run tries some pairs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import workload
from extent import pairs
from lmdb.verify import verify as verify_lmdb
from onnx import TensorProto, helper
from zygote import FAILING, FULL, FULL_ONCE, LOST, SHORT, Zygote

MODES = {"full": FULL, "full once": FULL_ONCE, "short write": SHORT, "failing": FAILING, "lost": LOST}


def every_write(attempt: Callable[[int], dict[str, Any]]) -> list[str | None]:
    """Let the 1st, 2nd, ... write fail, until a step has fewer writes. Returns the error of each."""
    messages = []
    while (found := attempt(len(messages) + 1))["reached"]:
        messages.append(found["message"])
    return messages


SHORT = {
    "edit": list(MODES),
    "grow": ["full once"],
    "shrink": ["short write"],
    "load": ["full", "lost"],
    "catalog": ["failing"],
}


@pytest.mark.parametrize(("kind", "mode"), pairs(workload.KINDS, MODES, SHORT))
def test_a_failure_of_any_write_of_a_step(zygote: Zygote, tmp_path: Path, kind: str, mode: str) -> None:
    base, path = tmp_path / "base", tmp_path / "store"
    step = workload.create_before(base, kind)

    def attempt(nth: int) -> dict[str, Any]:
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("lock.mdb"))
        found = zygote.start("survive", path=str(path), step=step, fault=[MODES[mode], nth]).result()
        assert verify_lmdb(str(path)) == []
        shutil.rmtree(path)
        return found

    messages = every_write(attempt)
    print(f"{kind}, {mode}: at each of {len(messages)} writes")
    assert len(messages) >= 4  # pages, their sync, and the meta page
    full = f"the disk of store '{path}' is full or failing; "
    # LMDB cannot know whether its last write, of the meta page, has reached the file.
    unknown = full + "it is unknown whether the last write is in the store: check, or write it again"
    assert set(messages) - {None} == {full + "nothing was written", unknown}
    # A failure of the clean-up at the end is not reported; the next load does the clean-up.
    assert None not in messages[: messages.index(unknown) + 1]
    assert kind in ("load", "catalog") or None not in messages


@pytest.mark.parametrize("mode", ["full", "short write"])
def test_a_failure_of_any_write_of_a_creation(zygote: Zygote, tmp_path: Path, mode: str) -> None:
    def attempt(nth: int) -> dict[str, Any]:
        path = tmp_path / str(nth) / "store"
        return zygote.start("survive_creation", path=str(path), fault=[MODES[mode], nth]).result()

    messages = every_write(attempt)
    assert len(messages) > 8
    for nth, message in enumerate(messages, 1):
        assert message is not None
        assert message.startswith(f"the disk of store '{tmp_path / str(nth) / 'store'}' is full or failing; ")


DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
scored = st.FeatureView("scored", entity=user, features=[st.Feature("a", st.Float32)])
score = st.Model("score", path="score.onnx", inputs=["scored:a"])
"""


def write_definitions(folder: Path) -> Path:
    """Write a model's file and the definitions that register it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "score", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, folder / "score.onnx")
    definitions = folder / "definitions.py"
    definitions.write_text(DEFINITIONS)
    return definitions


def test_a_failure_of_any_write_of_an_apply(zygote: Zygote, tmp_path: Path) -> None:
    definitions = write_definitions(tmp_path)

    def attempt(nth: int) -> dict[str, Any]:
        path = tmp_path / str(nth)
        workload.create(path)
        fault = [FULL, nth]
        return zygote.start("survive_apply", path=str(path), definitions=str(definitions), fault=fault).result()

    messages = every_write(attempt)
    assert len(messages) > 12  # folders, files, their syncs, and the commit
    for message in messages:
        assert message is not None
        assert message.startswith(("model 'score': cannot write ", "the disk of store "))


def test_threads_look_up_while_the_disk_is_full(zygote: Zygote, tmp_path: Path) -> None:
    seed = int(os.environ.get("SHORTTAIL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"SHORTTAIL_FAULT_SEED={seed}")
    path = tmp_path / "store"
    workload.create(path)
    found = zygote.start("survive_in_threads", path=str(path), seed=seed, n_steps=100).result()
    assert found["failures"] > 20
    assert found["unknown"] > 0
    assert found["lookups"] > 0


def test_a_scan_keeps_its_memory_when_the_meta_page_cannot_be_written(zygote: Zygote, tmp_path: Path) -> None:
    path = tmp_path / "store"
    workload.create(path)
    found = zygote.start("survive_while_scanned", path=str(path)).result()
    assert found["message"] == (
        f"store '{path}' must be reopened because its disk failed; end all scans of it and try again"
    )
