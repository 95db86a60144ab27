"""One flipped bit anywhere outside the rows: `verify` finds it, or all that the store is used for gives what it gave.

Nothing dies of it, hangs or raises an error that is not a ShorttailError: no opener, and no read, copy or write of a
store whose damage `verify` finds, either. flips.py flips the bits. A short run tries bits at random, as many of each
kind of page; SHORTTAIL_FAULT_SEED repeats the choice of a printed seed. `make soak` tries every bit of what LMDB or a
store reads, and one bit of each byte of the pages' free space; with SHORTTAIL_FAULT_PART=1/4 a quarter of them.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
from extent import SOAK
from flips import FlipServer, Place, make_store, places
from format_2 import make_format_2, tables_of_format_2
from onnx import TensorProto, helper
from test_disk_full import DEFINITIONS

FREED_COMMITS = 64  # so that the list of free pages has more than one page
FLIPS_PER_KIND = 8
TOLD_FLIPS = 5000  # a soak takes hours
KINDS = {
    *("meta", "free list: branch", "free list: leaf", "entries: branch", "entries: leaf", "entries: value", "image"),
    *(
        f"unused in {kind}"
        for kind in ("meta", "free list: branch", "free list: leaf", "entries: branch", "entries: leaf")
    ),
}

Flip = tuple[str, int, int]  # kind of place, offset, bit


def choose(found: list[Place], rng: random.Random) -> list[Flip]:
    by_kind: dict[str, list[Place]] = defaultdict(list)
    for place in found:
        by_kind[place.kind].append(place)
    assert by_kind.keys() == KINDS
    flips = []
    for kind, of_kind in by_kind.items():
        offsets = [at for place in of_kind for at in range(place.start, place.stop)]
        if not SOAK:
            flips += [(kind, rng.choice(offsets), rng.randrange(8)) for _ in range(FLIPS_PER_KIND)]
        elif of_kind[0].used:
            flips += [(kind, at, bit) for at in offsets for bit in range(8)]
        else:
            flips += [(kind, at, rng.randrange(8)) for at in offsets]
    return flips


@pytest.mark.parametrize("page_format", [2, 3])
def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path: Path, page_format: int) -> None:
    seed = int(os.environ.get("SHORTTAIL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"SHORTTAIL_FAULT_SEED={seed}")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "score", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, tmp_path / "score.onnx")
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    base = tmp_path / "base"
    with tables_of_format_2() if page_format == 2 else nullcontext():
        make_store(base, tmp_path / "definitions.py", FREED_COMMITS)
    if page_format == 2:
        make_format_2(base)
    found = places((base / "data.mdb").read_bytes())
    n_pages = Counter(place.kind for place in found if place.used)
    assert n_pages["entries: leaf"] > 2
    assert n_pages["free list: leaf"] > 2  # two places a page
    part, parts = map(int, os.environ.get("SHORTTAIL_FAULT_PART", "1/1").split("/"))
    flips = choose(found, random.Random(seed))[part - 1 :: parts]
    n_servers = len(os.sched_getaffinity(0)) if SOAK else 1
    outcomes: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []

    def run(number: int) -> None:
        with FlipServer(base, tmp_path / f"flipped-{number}") as server:
            for kind, at, bit in flips[number::n_servers]:
                outcome, what = server.flip(at, bit)
                outcomes[kind, outcome] += 1
                if outcomes.total() % TOLD_FLIPS == 0:
                    print(f"{outcomes.total()} of {len(flips)} flips: {len(failures)} failures", flush=True)
                if outcome not in ("found", "harmless"):
                    failures.append(f"{kind}, bit {bit} of byte {at}: {outcome} {what}")

    with ThreadPoolExecutor(n_servers) as threads:
        list(threads.map(run, range(n_servers)))
    for (kind, outcome), n in sorted(outcomes.items()):
        print(f"{kind}: {n} {outcome}")
    assert failures == []
    assert sum(outcomes.values()) == len(flips)
    n_found = sum(n for (_, outcome), n in outcomes.items() if outcome == "found")
    assert n_found > sum(not kind.startswith("unused") for kind, _, _ in flips) / 2
    assert all(outcome == "harmless" for kind, outcome in outcomes if kind.startswith("unused"))
