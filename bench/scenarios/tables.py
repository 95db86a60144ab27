"""Scenarios of features alone: {1, 10, 100} rows of {50, 250} features, in views of 10, as in feast-benchmarks."""

from __future__ import annotations

from .data import Scenario, View

ROWS = 10_000
VIEW_FEATURES = 10


def features(rows: int, width: int) -> Scenario:
    views = {
        f"view_{v:02}": View("entity_id", ROWS, [f"f{v * VIEW_FEATURES + i:03}" for i in range(VIEW_FEATURES)])
        for v in range(width // VIEW_FEATURES)
    }
    inputs = [f"{name}:{feature}" for name, view in views.items() for feature in view.features]
    return Scenario(f"features-{rows}x{width}", views, inputs, rows)


FEATURES = [features(rows, width) for rows in (1, 10, 100) for width in (50, 250)]
