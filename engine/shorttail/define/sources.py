"""Declares sources, which the rows of views are loaded from. shorttail.sources reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shorttail.errors import InvalidArgument

Json = dict[str, Any]


@dataclass(frozen=True)
class ParquetSource:
    """The Parquet files that a view's rows are loaded from: `path` is a file, a folder or a pattern ("day/*.parquet").

    A relative path starts at the definitions file. Arrow and CSV files (.arrow, .feather, .csv) are read too.

    `timestamp` names the column of event times (timestamps, or integers in microseconds since 1970 UTC). Without it,
    the event time of a row is the time at which it is loaded. Raises InvalidArgument.
    """

    path: str
    timestamp: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise InvalidArgument(f"ParquetSource({self.path!r}): give the path of a Parquet file or folder")
        object.__setattr__(self, "path", str(self.path))
        if self.timestamp is not None and (not isinstance(self.timestamp, str) or not self.timestamp):
            raise InvalidArgument(f"ParquetSource({self.path!r}): timestamp must be the name of a column")

    def to_json(self) -> Json:
        return {"kind": "parquet", "path": self.path, "timestamp": self.timestamp}

    @classmethod
    def from_json(cls, data: Json) -> ParquetSource:
        return cls(data["path"], data["timestamp"])
