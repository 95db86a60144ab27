"""Write data/: 1,000 made-up users, 2,000 items, and 12,000 items that were shown, some of them clicked.

Put your own tables in its place: definitions.py reads users.parquet and items.parquet, train.py reads all.
"""

from pathlib import Path

import numpy as np
import pandas as pd

DATA = Path(__file__).parent / "data"
USERS, ITEMS, SHOWN = 1_000, 2_000, 12_000
CATEGORIES = ["Book", "Game", "Album", "Racket"]
AS_OF = pd.Timestamp("2025-06-30", tz="UTC")


def write() -> None:
    random = np.random.default_rng(seed=630)
    taste = random.dirichlet([0.6] * len(CATEGORIES), USERS)
    users = pd.DataFrame(
        {
            "user_id": np.arange(1, USERS + 1),
            "visits_30d": random.negative_binomial(1, 0.1, USERS),
            "avg_price": random.lognormal(3, 0.6, USERS).round(2),
            "taste": list(taste),
            "as_of": AS_OF,
        }
    )
    users.loc[random.random(USERS) < 0.2, "avg_price"] = np.nan  # bought nothing; a null in the file
    category = random.choice(len(CATEGORIES), ITEMS, p=[0.4, 0.25, 0.2, 0.15])
    items = pd.DataFrame(
        {
            "item_id": np.arange(1, ITEMS + 1),
            "title": [f"{CATEGORIES[c]} {number}" for number, c in enumerate(category, start=1)],
            "category": category,
            "price": random.lognormal(3, 0.7, ITEMS).round(2),
            "days_online": random.exponential(200, ITEMS).astype(int),
            "click_rate_7d": random.beta(2, 40, ITEMS).round(4),
            "as_of": AS_OF,
        }
    )

    user, item = random.integers(0, USERS, SHOWN), random.integers(0, ITEMS, SHOWN)
    dearer = np.log(items["price"].to_numpy()[item] / users["avg_price"].fillna(20).to_numpy()[user])
    log_odds = (
        -3.5
        + 3 * taste[user, category[item]]
        + 15 * items["click_rate_7d"].to_numpy()[item]
        - 0.6 * dearer.clip(min=0)
        - 0.001 * items["days_online"].to_numpy()[item]
    )
    shown = pd.DataFrame({"user_id": user + 1, "item_id": item + 1})
    shown["clicked"] = random.random(SHOWN) < 1 / (1 + np.exp(-log_odds))

    DATA.mkdir(exist_ok=True)
    users.to_parquet(DATA / "users.parquet")
    items.to_parquet(DATA / "items.parquet")
    shown.to_parquet(DATA / "shown.parquet")


if __name__ == "__main__":
    write()
