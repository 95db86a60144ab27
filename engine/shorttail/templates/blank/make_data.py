"""Write data/users.parquet, 1,000 made-up users: python make_data.py

Put your own table in its place.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is missing; run: pip install 'shorttail[arrow,http]'")

DATA = Path(__file__).parent / "data"
USERS = 1_000


def write() -> None:
    random = np.random.default_rng(seed=630)
    users = {
        "user_id": np.arange(1, USERS + 1),
        "visits_30d": random.negative_binomial(1, 0.1, USERS),
        "country": random.choice(["DE", "FR", "GB", "US"], USERS, p=[0.35, 0.15, 0.2, 0.3]),
        "as_of": [datetime(2025, 6, 30, tzinfo=UTC)] * USERS,
    }
    DATA.mkdir(exist_ok=True)
    pq.write_table(pa.table(users), DATA / "users.parquet")
    print(f"wrote {USERS:,} users")


if __name__ == "__main__":
    write()
