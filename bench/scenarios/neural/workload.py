"""The scenario "neural": one user, 100 items, a multilayer perceptron of 256 and 128 units on their vectors."""

from __future__ import annotations

from pathlib import Path

from ..data import Scenario, View, perceptron

WIDTH = 64

NEURAL = Scenario(
    "neural",
    views={
        "user": View("user_id", 200_000, ["taste"], {"taste": WIDTH}),
        "item": View("item_id", 100_000, ["style"], {"style": WIDTH}),
    },
    inputs=["user:taste", "item:style"],
    rows=100,
    files=Path(__file__).parent,
    shared=["user_id"],
    model=perceptron(256, 128),
    output="score",
)
