"""Write data/: 5,000 made-up subscribers on 30 June, and who of them left within 60 days.

Put your own tables in its place: definitions.py reads customers.parquet, train.py reads both.
"""

from pathlib import Path

import numpy as np
import pandas as pd

DATA = Path(__file__).parent / "data"
CUSTOMERS = 5_000


def write() -> None:
    random = np.random.default_rng(seed=630)
    customers = pd.DataFrame(
        {
            "customer_id": np.arange(1, CUSTOMERS + 1),
            "country": random.choice(["DE", "FR", "GB", "US"], CUSTOMERS, p=[0.35, 0.15, 0.2, 0.3]),
            "tenure_months": random.geometric(1 / 24, CUSTOMERS).clip(max=120),
            "contract_months": random.choice([1, 12, 24], CUSTOMERS, p=[0.5, 0.35, 0.15]),
            "monthly_charge": random.choice([9.99, 19.99, 39.99], CUSTOMERS, p=[0.5, 0.35, 0.15]),
            "autopay": random.random(CUSTOMERS) < 0.6,
            "logins_30d": random.negative_binomial(2, 0.15, CUSTOMERS),
            "tickets_90d": random.poisson(0.6, CUSTOMERS),
            "satisfaction": random.choice([1, 2, 3, 4, 5], CUSTOMERS, p=[0.06, 0.1, 0.24, 0.38, 0.22]).astype(float),
            "as_of": pd.Timestamp("2025-06-30", tz="UTC"),
        }
    )
    customers.loc[random.random(CUSTOMERS) < 0.4, "satisfaction"] = np.nan  # no answer; a null in the file

    log_odds = (
        -0.4
        - 0.02 * customers["tenure_months"]
        - 0.07 * customers["contract_months"]
        + 0.02 * customers["monthly_charge"]
        - 0.5 * customers["autopay"]
        - 0.08 * customers["logins_30d"]
        + 0.5 * customers["tickets_90d"]
        - 0.6 * (customers["satisfaction"].fillna(3) - 3)
    )
    churned = random.random(CUSTOMERS) < 1 / (1 + np.exp(-log_odds))

    DATA.mkdir(exist_ok=True)
    customers.to_parquet(DATA / "customers.parquet")
    customers[["customer_id"]].assign(churned=churned).to_parquet(DATA / "churned.parquet")


if __name__ == "__main__":
    write()
