"""The scenario "fraud": one user, 40 features of two views, 3 on-demand features, 300 trees."""

from __future__ import annotations

from pathlib import Path

from ..data import Scenario, View, gradient_boosting

USERS = 200_000
PROFILE = [f"profile_{i}" for i in range(16)]
ACTIVITY = ["avg_amount_30d", "max_amount_30d", *(f"activity_{i}" for i in range(22))]

FRAUD = Scenario(
    "fraud",
    views={"profile": View("user_id", USERS, PROFILE), "activity": View("user_id", USERS, ACTIVITY)},
    inputs=[
        *(f"profile:{name}" for name in PROFILE),
        *(f"activity:{name}" for name in ACTIVITY),
        "request:amount",
        "on_demand:amount_ratio",
        "on_demand:over_max",
        "on_demand:night",
    ],
    rows=1,
    files=Path(__file__).parent,
    on_demand={
        "amount_ratio": ["request:amount", "activity:avg_amount_30d"],
        "over_max": ["request:amount", "activity:max_amount_30d"],
        "night": ["request:hour"],
    },
    values={"amount": (0.1, 20.0), "hour": (0.0, 24.0)},
    model=gradient_boosting(300),
    output="probabilities",
    column=1,
)
