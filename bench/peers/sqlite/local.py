"""Measure sqlite3 of the standard library: one table per view, packed rows by rowid.

python local.py FOLDER SECONDS REDIS_URL
"""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from lookups import Scenario, arguments, measure

MAP_BYTES = 2**33
CACHE_KIB = 2**18


def load(path: Path, scenario: Scenario) -> sqlite3.Connection:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        for view in scenario.views:
            connection.execute(f'CREATE TABLE "{view.name}" (key INTEGER PRIMARY KEY, packed BLOB NOT NULL)')
            rows = ((int(key), row.tobytes()) for key, row in zip(view.keys, view.rows, strict=True))
            connection.executemany(f'INSERT INTO "{view.name}" VALUES (?, ?)', rows)
    connection.close()
    read = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    read.execute(f"PRAGMA mmap_size = {MAP_BYTES}")
    read.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return read


def main() -> None:
    scenario, seconds, _, _ = arguments()
    connection = load(scenario.folder / "sqlite.db", scenario)
    marks = ", ".join("?" * scenario.rows)
    statements = [f'SELECT key, packed FROM "{view.name}" WHERE key IN ({marks})' for view in scenario.views]

    def look_up(keys: list[int]) -> np.ndarray:
        parts: list[bytes] = []
        for statement in statements:
            found = dict(connection.execute(statement, keys))  # in the order of the keys, repeated keys once
            parts += [found[key] for key in keys]
        return scenario.assemble(parts)

    measure(scenario, seconds, look_up, json.loads((Path(__file__).parent / "peer.json").read_text())["describe"])
    connection.close()


if __name__ == "__main__":
    main()
