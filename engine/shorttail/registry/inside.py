"""What a view holds: schema, documentation, number of rows and freshness, as plain values for people and programs."""

from __future__ import annotations

from typing import Any

from shorttail.define import clock
from shorttail.define.durations import duration_text
from shorttail.define.times import time_text
from shorttail.define.views import FeatureView
from shorttail.store import Store
from shorttail.store.rows import ViewRows, row_columns, time_name, times_as_text

Json = dict[str, Any]
SAMPLE_ROWS = 5


def list_views(store: Store) -> list[Json]:
    """Return per view its name, entity, features, rows, owner, tags, and last event time. Reads all rows."""
    listed = []
    for name in list(store.catalog.views):
        view, found = measure(store, name)
        listed.append(
            {
                "name": name,
                "entity": view.entity.name,
                "features": len(view.features),
                "rows": found["rows"],
                "owner": view.owner,
                "tags": list(view.tags),
                "newest": found["newest"],
            }
        )
    return listed


def describe_view(store: Store, name: str, sample: int = SAMPLE_ROWS) -> Json:
    """Return what `views show` prints: definition, rows, size and freshness, and `sample` rows. Reads all rows.

    Raises NotFound, and Internal for a damaged table.
    """
    view, found = measure(store, name)
    loads = [event for event in store.history() if (event.action, event.subject) == ("loaded", f"view {name}")]
    loaded = {"time": time_text(loads[-1].time_us), "who": loads[-1].who, **loads[-1].detail} if loads else None
    with ViewRows(store, name, limit=sample) as rows:
        columns = [batch.to_lists() for batch in rows]
    sampled = [dict(zip(part, row, strict=True)) for part in columns for row in zip(*part.values(), strict=True)]
    return {
        **definition(view),
        **found,
        "last_load": loaded,
        "sample": [times_as_text(rows.view, row) for row in sampled],
    }


def definition(view: FeatureView) -> Json:
    """Return the definition of a view as JSON values."""
    entity = view.entity
    return {
        "name": view.name,
        "description": view.description,
        "owner": view.owner,
        "tags": list(view.tags),
        "entity": {"name": entity.name, "description": entity.description, "tags": list(entity.tags)},
        "keys": {key: dtype.name for key, dtype in view.keys.items()},
        "features": [
            {
                "name": feature.name,
                "type": feature.dtype.name,
                "default": list(feature.default) if isinstance(feature.default, tuple) else feature.default,
                "column": feature.source_column,
                "description": feature.description,
                "tags": list(feature.tags),
            }
            for feature in view.features
        ],
        "source": view.source.to_json() if view.source else None,
        "event_time": time_name(view),
        "ttl": duration_text(view.ttl_us) if view.ttl_us else None,
    }


def measure(store: Store, name: str) -> tuple[FeatureView, Json]:
    """Return what a view is and what it holds: the rows, their size, oldest and newest event time, the share of STALE.

    Reads the event time of all rows, and checks their pages. Times are ISO 8601 text, None without rows.
    """
    rows = stale = 0
    oldest_us: int | None = None
    newest_us: int | None = None
    with store.open_scan(name, lambda view: [row_columns(view)[time_name(view)][0]]) as scan:
        stale_us = clock.now_us() - scan.view.ttl_us
        for (times,) in scan:
            rows += times.n
            stale += int((times.values < stale_us).sum()) if scan.view.ttl_us else 0
            least, most = int(times.values.min()), int(times.values.max())
            oldest_us = least if oldest_us is None else min(oldest_us, least)
            newest_us = most if newest_us is None else max(newest_us, most)
    return scan.view, {
        "rows": rows,
        "bytes": scan.file_bytes,
        "bytes_per_row": round(scan.file_bytes / rows, 1) if rows else None,
        "oldest": None if oldest_us is None else time_text(oldest_us),
        "newest": None if newest_us is None else time_text(newest_us),
        "stale_rows": stale,
        "stale_share": stale / rows if rows else None,
    }


def show_lines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of `views show` above its tables, as (label, text)."""
    keys = ", ".join(f"{key} {dtype}" for key, dtype in shown["keys"].items())
    source, entity = shown["source"], shown["entity"]
    times = f", event times in {source['timestamp']}" if source and source.get("timestamp") else ""
    per_row = "" if shown["bytes_per_row"] is None else f", {shown['bytes_per_row']:g} bytes a row in the file"
    lines = [
        ("view", shown["name"]),
        ("description", shown["description"]),
        ("owner", shown["owner"]),
        ("tags", ", ".join(shown["tags"])),
        ("entity", f"{entity['name']} ({keys}){': ' * bool(entity['description'])}{entity['description']}"),
        ("entity tags", ", ".join(entity["tags"])),
        ("source", f"{source['path']}{times}" if source else ""),
        ("ttl", shown["ttl"] or "none"),
        ("rows", f"{shown['rows']:,}{per_row}"),
    ]
    if (load := shown["last_load"]) is not None:
        lines.append(("last load", f"{load['time']} by {load['who']}, {load['rows']:,} rows"))
    if shown["rows"]:
        stale = f", {shown['stale_share']:.1%} STALE" if shown["ttl"] else ""
        lines.append(("event times", f"{shown['oldest']} to {shown['newest']}{stale}"))
    return [(label, text) for label, text in lines if text]


def feature_table(shown: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of the table of features, without columns that are empty throughout."""
    header = ["feature", "type", "default", "column", "tags", "description"]
    rows = [
        [
            feature["name"],
            feature["type"],
            feature["default"],
            feature["column"] if feature["column"] != feature["name"] else "",
            ", ".join(feature["tags"]),
            feature["description"],
        ]
        for feature in shown["features"]
    ]
    kept = [c for c in range(len(header)) if c < 2 or any(row[c] not in ("", None) for row in rows)]
    return [header[c] for c in kept], [[row[c] for c in kept] for row in rows]
