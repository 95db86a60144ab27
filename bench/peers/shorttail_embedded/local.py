"""Measure shorttail embedded: Engine.get_online_features(...).to_numpy().

python local.py FOLDER SECONDS REDIS_URL
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.extend(map(str, Path(__file__).resolve().parents[1:3]))  # bench/peers, bench
import installed
import numpy as np
from lookups import Scenario, arguments, measure

import shorttail as st


def load(path: Path, scenario: Scenario) -> st.Engine:
    """Make a store with the scenario's views, by the commands that users run."""
    shutil.rmtree(path, ignore_errors=True)
    command = [sys.executable, "-m", "shorttail"]
    definitions = str(scenario.folder / "definitions.py")
    subprocess.run([*command, "apply", definitions, "--store", str(path)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "materialize", "--store", str(path)], check=True, stdout=subprocess.DEVNULL)
    return st.Engine.open(path)


def main() -> None:
    scenario, seconds, _, _ = arguments()
    described = json.loads((Path(__file__).parent / "peer.json").read_text())
    with load(scenario.folder / "shorttail_embedded", scenario) as engine:

        def look_up(keys: list[int]) -> dict[str, np.ndarray]:
            return engine.get_online_features(scenario.inputs, {scenario.key: keys}).to_numpy()

        def as_matrix(answer: dict[str, np.ndarray]) -> np.ndarray:
            return np.column_stack([answer[reference] for reference in scenario.inputs])

        measure(scenario, seconds, look_up, described["describe"], as_matrix)


if __name__ == "__main__":
    main()
