"""The scenario "ranking": one user, 500 items, vectors and their similarity, 100 trees."""

from __future__ import annotations

from pathlib import Path

from ..data import Scenario, View, gradient_boosting

USERS, ITEMS = 200_000, 100_000
WIDTH = 32
USER = [f"u{i}" for i in range(16)]
ITEM = [f"i{i}" for i in range(16)]

RANKING = Scenario(
    "ranking",
    views={
        "user": View("user_id", USERS, [*USER, "taste"], {"taste": WIDTH}),
        "item": View("item_id", ITEMS, [*ITEM, "style"], {"style": WIDTH}),
    },
    inputs=[
        "on_demand:similarity",
        *(f"user:{name}" for name in USER),
        *(f"item:{name}" for name in ITEM),
        "item:style",
    ],
    rows=500,
    files=Path(__file__).parent,
    on_demand={"similarity": ["user:taste", "item:style"]},
    shared=["user_id"],
    model=gradient_boosting(100),
    output="probabilities",
    column=1,
)
