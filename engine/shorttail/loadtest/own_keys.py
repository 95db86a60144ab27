"""Keys for the pushes of a load test that no row of the view has, so that no row of a user is overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shorttail.client import Client
from shorttail.config import LIMITS
from shorttail.define.dtypes import Int64
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.loadtest.streams import Stream
from shorttail.results import Status

N_KEYS: Final = LIMITS.rows_per_request  # one request looks them up, one deletes them
FIRST: Final = -(2**62)  # of seed 0; the next seed has the next N_KEYS integers. Users seldom have such keys
TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The keys that the pushes of a seed use. view: name; types: key column -> type; feature: one of the view.

    An Int64 column holds integers from FIRST on, a String column "shorttail-bench-" and the integer.
    """

    view: str
    types: dict[str, str]
    feature: str
    seed: int

    def name(self, column: str) -> str:
        """Return the name under which the plan holds the column: lookups may use the key of the same name."""
        return f"{column} of pushes"

    def stream(self) -> Stream:
        """Return the source of the keys. All columns of a composite key have the same row."""
        found = Stream("uniform", 0.99, N_KEYS, text="keys that no row had")
        for column, values in self._columns().items():
            if isinstance(values, range):
                found.lows[self.name(column)] = values.start
            else:
                found.tables[self.name(column)] = values
        return found

    def check_unused(self, address: str) -> None:
        """Raise InvalidArgument if the view has a row with one of the keys."""
        with Client(address, timeout_s=TIMEOUT_S) as client:
            found = client.get_online_features([f"{self.view}:{self.feature}"], self._columns())
        (statuses,) = found.feature_statuses.values()
        used = int(np.count_nonzero(statuses != Status.NOT_FOUND))
        if used:
            raise InvalidArgument(
                f"--push {self.view}: the view has {used:,} of the keys that --seed {self.seed} pushes to; "
                "take another --seed, or say --overwrite-live-rows"
            )

    def remove(self, address: str) -> dict[str, Any]:
        """Delete the rows. Returns {"view", "keys", "removed", "problem"}: why rows may be left, or None."""
        removed, problem = 0, None
        try:
            with Client(address, timeout_s=TIMEOUT_S) as client:
                removed = client.delete(self.view, self._columns())
        except ShorttailError as error:
            problem = error.message
        return {"view": self.view, "keys": N_KEYS, "removed": removed, "problem": problem}

    def _columns(self) -> dict[str, Sequence[Any]]:
        first = FIRST + self.seed * N_KEYS
        numbers = range(first, first + N_KEYS)
        return {
            column: numbers if dtype == Int64.name else [f"shorttail-bench-{number}" for number in numbers]
            for column, dtype in self.types.items()
        }
