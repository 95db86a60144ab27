"""Write data/: 2,000 made-up users, 200 merchants, and 10,000 payments of the day after, some of them fraud.

Put your own tables in its place: definitions.py reads users.parquet and merchants.parquet, train.py reads all.
"""

from pathlib import Path

import numpy as np
import pandas as pd

DATA = Path(__file__).parent / "data"
USERS, MERCHANTS, PAYMENTS = 2_000, 200, 10_000
AS_OF = pd.Timestamp("2025-06-30", tz="UTC")


def write() -> None:
    random = np.random.default_rng(seed=630)
    users = pd.DataFrame(
        {
            "user_id": np.arange(1, USERS + 1),
            "account_days": random.exponential(500, USERS).astype(int),
            "payments_7d": random.negative_binomial(1, 0.2, USERS),
            "avg_amount_30d": random.lognormal(3.3, 0.7, USERS).round(2),
            "chargebacks": random.poisson(0.05, USERS),
            "as_of": AS_OF,
        }
    )
    users.loc[random.random(USERS) < 0.1, "avg_amount_30d"] = np.nan  # no payment in 30 days; a null in the file
    merchants = pd.DataFrame(
        {
            "merchant_id": [f"m-{number:03}" for number in range(1, MERCHANTS + 1)],
            "category": random.choice(["electronics", "fashion", "grocery", "travel"], MERCHANTS),
            "payments_7d": random.lognormal(5, 1.2, MERCHANTS).astype(int),
            "fraud_share_90d": random.beta(1, 60, MERCHANTS).round(4),
            "as_of": AS_OF,
        }
    )

    # A payment knows the row of its user and of its merchant at its time: features that were computed later would
    # tell the model what it is to find out.
    user = users.iloc[random.integers(0, USERS, PAYMENTS)].reset_index(drop=True)
    merchant = merchants.iloc[random.integers(0, MERCHANTS, PAYMENTS)].reset_index(drop=True)
    usual = user["avg_amount_30d"].fillna(30)
    payments = pd.DataFrame(
        {
            "user_id": user["user_id"],
            "merchant_id": merchant["merchant_id"],
            "amount": (usual * random.lognormal(-0.3, 1.2, PAYMENTS)).round(2),
            "hour": random.normal(14, 5, PAYMENTS).astype(int) % 24,
            "distance_km": random.exponential(15, PAYMENTS).round(1),
        }
    )
    log_odds = (
        -5.2
        + 1.2 * np.log(payments["amount"] / usual)
        + 0.02 * payments["distance_km"]
        + 1.0 * (payments["hour"] < 6)
        + 1.5 * user["chargebacks"]
        - 0.001 * user["account_days"]
        + 40 * merchant["fraud_share_90d"]
    )
    payments["fraud"] = random.random(PAYMENTS) < 1 / (1 + np.exp(-log_odds))

    DATA.mkdir(exist_ok=True)
    users.to_parquet(DATA / "users.parquet")
    merchants.to_parquet(DATA / "merchants.parquet")
    payments.to_parquet(DATA / "payments.parquet")


if __name__ == "__main__":
    write()
