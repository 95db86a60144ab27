"""Measure Feast's Python SDK: FeatureStore.get_online_features(...).to_dict().

python local.py FOLDER SECONDS REDIS_URL redis|redis-precomputed|sqlite|sqlite-precomputed
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import feast_repo
from lookups import arguments, measure


def main() -> None:
    scenario, seconds, url, variant = arguments()
    variant = variant or feast_repo.VARIANTS[0]
    described = json.loads((Path(__file__).parent / "peer.json").read_text())
    store, _ = feast_repo.make(scenario, variant, url)
    service = store.get_feature_service(feast_repo.SERVICE)

    def look_up(keys: list[int]) -> dict[str, list[float]]:
        # Precomputed vectors are stored under full names, and Feast finds them only under these names.
        found = store.get_online_features(service, {scenario.key: keys}, full_feature_names=True)
        return found.to_dict()

    def as_matrix(answer: dict[str, list[float]]) -> np.ndarray:
        return feast_repo.matrix(answer, scenario)

    measure(scenario, seconds, look_up, described["variants"][variant], as_matrix)


if __name__ == "__main__":
    main()
