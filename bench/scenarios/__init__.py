"""Make the workloads of bench/compare.py: data, model, keys and answers of each, from a seed.

`scenarios.build(name, folder)` makes a data folder, which every peer reads:

- scenario.json: views and their widths, the model's input columns in order, the columns of a request. See `Scenario`.
- VIEW.parquet: an int64 key, float32 features, vectors as fixed_size_list<float>, and event_time.
- definitions.py for shorttail; transforms.py with the same on-demand functions over NumPy arrays, for the peers.
- model.onnx: a model with one float32 matrix as its input.
- requests.json: requests with their correct scores (or features), from ONNX Runtime on a pandas join.
- made-of: a hash of these sources, written last.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .data import Scenario, write
from .fraud.workload import FRAUD
from .neural.workload import NEURAL
from .ranking.workload import RANKING
from .tables import FEATURES

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in (FRAUD, RANKING, NEURAL, *FEATURES)}


def build(name: str, folder: Path, divisor: int = 1) -> None:
    """Make the data folder of a scenario, unless these sources already made it. divisor: divides the number of rows."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + b"%d" % divisor).hexdigest()
    stamp = folder / "made-of"
    if not stamp.exists() or stamp.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        write(SCENARIOS[name], folder, divisor)
        stamp.write_text(wanted)
