"""Measure py-lmdb's getmulti with integer keys and packed rows, read as buffers.

python local.py FOLDER SECONDS REDIS_URL
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from lookups import Scenario, arguments, measure

SPARE = 4  # the size of the map / the size of the data; pages are half full after a split


def load(path: Path, scenario: Scenario) -> tuple[lmdb.Environment, list[Any]]:
    shutil.rmtree(path, ignore_errors=True)
    data_bytes = sum(len(view.keys) * (view.row_bytes + 32) for view in scenario.views)
    environment = lmdb.open(
        str(path), map_size=SPARE * data_bytes + 2**24, max_dbs=len(scenario.views), readahead=False
    )
    databases = [environment.open_db(view.name.encode(), integerkey=True) for view in scenario.views]
    with environment.begin(write=True) as transaction:
        for view, database in zip(scenario.views, databases, strict=True):
            ordered = np.argsort(view.keys)
            keys, rows = view.keys[ordered].astype(np.uint64), view.rows[ordered]
            items = [(key.tobytes(), row.tobytes()) for key, row in zip(keys, rows, strict=True)]
            with transaction.cursor(database) as cursor:
                cursor.putmulti(items, append=True)
    return environment, databases


def main() -> None:
    scenario, seconds, _, _ = arguments()
    environment, databases = load(scenario.folder / "lmdb_getmulti", scenario)

    def look_up(keys: list[int]) -> np.ndarray:
        packed = np.array(keys, np.uint64).tobytes()
        wanted = [packed[i : i + 8] for i in range(0, len(packed), 8)]
        parts: list[Any] = []
        # Each request has a new transaction to see new data; the environment keeps a spare one, so this is cheap.
        with environment.begin(buffers=True) as transaction:
            for database in databases:
                # Missing keys would be left out, but all keys exist, and the check of the answers would fail.
                parts += [value for _, value in transaction.cursor(database).getmulti(wanted)]
            return scenario.assemble(parts)

    measure(scenario, seconds, look_up, json.loads((Path(__file__).parent / "peer.json").read_text())["describe"])
    environment.close()


if __name__ == "__main__":
    main()
