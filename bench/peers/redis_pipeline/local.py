"""Measure redis-py: MGET of packed rows, or a pipeline of HMGET with one field per feature.

python local.py FOLDER SECONDS REDIS_URL mget|hmget
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import redis

sys.path.insert(0, str(Path(__file__).parents[1]))
from lookups import Scenario, arguments, measure

CHUNK = 1000  # commands per round trip during the load


def load(client: redis.Redis, scenario: Scenario, packed: bool) -> None:
    for view in scenario.views:
        for start in range(0, len(view.keys), CHUNK):
            pipe = client.pipeline(transaction=False)
            for key, row in zip(view.keys[start : start + CHUNK], view.rows[start : start + CHUNK], strict=True):
                if packed:
                    pipe.set(f"packed:{view.name}:{key}", row.tobytes())
                else:
                    values = {name: value.tobytes() for name, value in zip(view.features, row, strict=True)}
                    pipe.hset(f"hash:{view.name}:{key}", mapping=values)
            pipe.execute()


def main() -> None:
    scenario, seconds, url, variant = arguments()
    described = json.loads((Path(__file__).parent / "peer.json").read_text())
    packed = (variant or "mget") == "mget"
    client = redis.Redis.from_url(url)
    load(client, scenario, packed)
    packed_prefixes = [f"packed:{view.name}:" for view in scenario.views]
    hashes = [(f"hash:{view.name}:", view.features) for view in scenario.views]

    def mget(keys: list[int]) -> np.ndarray:
        return scenario.assemble(client.mget([f"{prefix}{key}" for prefix in packed_prefixes for key in keys]))

    def hmget(keys: list[int]) -> np.ndarray:
        pipe = client.pipeline(transaction=False)
        for prefix, features in hashes:
            for key in keys:
                pipe.hmget(f"{prefix}{key}", features)
        return scenario.assemble([b"".join(values) for values in pipe.execute()])

    measure(scenario, seconds, mget if packed else hmget, described["variants"]["mget" if packed else "hmget"])


if __name__ == "__main__":
    main()
