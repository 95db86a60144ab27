"""What bench/compare.py measures: data, model, keys and answers of each workload, made from a seed.

A data folder, which `scenarios.build(name, folder)` makes and every peer reads:

- scenario.json: views and their widths, the model's input columns in order, what a request has. See `Scenario`.
- VIEW.parquet: an int64 key, float32 features, vectors as fixed_size_list<float>, and event_time.
- definitions.py for shorttail; transforms.py: the same on-demand functions over NumPy arrays, for the others.
- model.onnx: one float32 matrix in.
- requests.json: requests with the scores (or the features) that are right for them: ONNX Runtime on a pandas join.
"""

from __future__ import annotations

from pathlib import Path

from .data import Scenario, write
from .fraud.workload import FRAUD
from .neural.workload import NEURAL
from .ranking.workload import RANKING
from .tables import FEATURES

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in (FRAUD, RANKING, NEURAL, *FEATURES)}


def build(name: str, folder: Path, divisor: int = 1) -> None:
    """Make the data folder of a scenario, unless it is there. divisor: of the rows there are."""
    if not (folder / "scenario.json").exists():  # which is written last
        folder.mkdir(parents=True, exist_ok=True)
        write(SCENARIOS[name], folder, divisor)
