"""Measure rocksdict's batch get of packed rows.

python local.py FOLDER SECONDS REDIS_URL
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from lookups import Scenario, arguments, measure

CACHE_BYTES = 2**30
BLOCK_BYTES = 4096
BLOOM_BITS = 10
HASH_RATIO = 0.75


def options() -> Options:
    block = BlockBasedOptions()
    block.set_block_cache(Cache(CACHE_BYTES))
    block.set_block_size(BLOCK_BYTES)
    block.set_bloom_filter(BLOOM_BITS, False)
    block.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    block.set_data_block_hash_ratio(HASH_RATIO)
    found = Options(raw_mode=True)
    found.create_if_missing(True)
    found.set_block_based_table_factory(block)
    found.set_compression_type(DBCompressionType.none())
    return found


def load(path: Path, scenario: Scenario) -> Rdict:
    shutil.rmtree(path, ignore_errors=True)
    written = Rdict(str(path), options())
    for i, view in enumerate(scenario.views):
        batch = WriteBatch(raw_mode=True)
        for key, row in zip(view.keys, view.rows, strict=True):
            batch.put(bytes([i]) + int(key).to_bytes(8, "big"), row.tobytes())
        written.write(batch)
    written.flush()
    written.compact_range(None, None)
    written.close()
    return Rdict(str(path), options(), access_type=AccessType.read_only())


def main() -> None:
    scenario, seconds, _, _ = arguments()
    store = load(scenario.folder / "rocksdict", scenario)
    prefixes = [bytes([i]) for i in range(len(scenario.views))]

    def look_up(keys: list[int]) -> np.ndarray:
        packed = np.array(keys, ">u8").tobytes()
        wanted = [packed[i : i + 8] for i in range(0, len(packed), 8)]
        return scenario.assemble(store.get([prefix + key for prefix in prefixes for key in wanted]))

    measure(scenario, seconds, look_up, json.loads((Path(__file__).parent / "peer.json").read_text())["describe"])
    store.close()


if __name__ == "__main__":
    main()
