"""A store of two views and a model, for the tests of what people see of a store, and the commands that show it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from test_cli import write_model

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

NOW = datetime.datetime.now(datetime.UTC)
EVIL = "<script>alert('x')</script>\x1b[31m&\n"
DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64, "site": st.String}, description="a customer", tags=["core"])
stats = st.FeatureView(
    "stats", entity=user, owner="fraud-team", tags=["pii", "daily"], ttl="30d", description="what a user did",
    source=st.ParquetSource("users.parquet", timestamp="updated_at"),
    features=[
        st.Feature("age", st.Int32, default=30),
        st.Feature("tier", st.String, description="gold or silver", tags=["billing"]),
        st.Feature("score", st.Float32),
        st.Feature("taste", st.Vector(2)),
        st.Feature("new", st.Bool),
        st.Feature("since", st.Timestamp, column="Since"),
    ],
)
empty = st.FeatureView("empty", entity=st.Entity("item", keys={"id": st.Int64}), features=[st.Feature("x", st.Float64)])
delay = st.Model("delay", path="delay.onnx", inputs=["stats:age", "stats:score", "request:hour"], owner="risk",
                 tags=["gold"], description="lateness")
"""
N = 40
COLUMNS = ["user_id", "site", "age", "tier", "score", "taste", "new", "since", "updated_at"]


def table() -> Any:
    def at(i: int) -> datetime.datetime:
        return datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=i, microseconds=i)

    return pa.table(
        {
            "user_id": list(range(N)),
            "site": ["a", "b,c", ""] * (N // 3) + ["é"],
            "age": pa.array([None if i % 7 == 0 else i for i in range(N)], pa.int32()),
            "tier": [["gold", "silver", "", None, EVIL][i % 5] for i in range(N)],
            "score": np.where(np.arange(N) % 6 == 5, np.nan, np.arange(N) / 10).astype(np.float32),
            "taste": [None if i == 3 else [float(i), None if i == 4 else 0.1] for i in range(N)],
            "new": [i % 2 == 0 for i in range(N)],
            "Since": pa.array([at(i) for i in range(N)], pa.timestamp("us", "UTC")),
            "updated_at": pa.array([NOW - datetime.timedelta(days=i) for i in range(N)], pa.timestamp("us", "UTC")),
        }
    )


def make_folder(made: Path) -> Path:
    """Fill a folder with DEFINITIONS, and a store that has the rows of table()."""
    (made / "definitions.py").write_text(DEFINITIONS)
    write_model(made / "delay.onnx", bias=0.0)
    pyarrow.parquet.write_table(table(), made / "users.parquet")
    commands.run_well("apply", "definitions.py", "--store", "store", "--create", folder=made)
    commands.run_well("materialize", "--store", "store", folder=made)
    return made


def ok(folder: Path, *arguments: str) -> commands.Result:
    return commands.run_well(*arguments, "--store", "store", folder=folder)


def fails(folder: Path, *arguments: str, code: int = 1) -> str:
    return commands.error_of(*arguments, "--store", "store", code=code, folder=folder)


def expected(*, columns: list[str] | None = None, holds: Any = lambda row: True) -> list[dict[str, Any]]:
    """Return the rows that were loaded, as the store holds them, sorted by user_id."""
    rows = table().rename_columns(["since" if name == "Since" else name for name in table().column_names]).to_pylist()
    for row in rows:
        row["score"] = None if row["score"] is None or np.isnan(row["score"]) else row["score"]
        if row["taste"] is not None:
            row["taste"] = [None if x is None else float(np.float32(x)) for x in row["taste"]]
    return [{name: row[name] for name in columns or COLUMNS} for row in rows if holds(row)]


def by_key(rows: Any) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["user_id"])


def nan_is_none(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    return [{name: plain(value) for name, value in row.items()} for row in rows]
