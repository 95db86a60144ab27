from collections.abc import Sequence
from typing import Self

from shorttail._native.columns import Columns
from shorttail._native.pages import Directory
from shorttail.pipeline import Plan
from shorttail.store import Store

class Split:
    version: int
    below: int
    salt: int
    n_columns: int
    def __new__(cls, version: int, percent: float, salt: int, n_columns: int) -> Self: ...
    def takes(self, columns: Columns, row: int) -> bool: ...

class Route:
    plan: Plan
    def __init__(self, plan: Plan) -> None: ...
    def directories_in(self, store: Store) -> Sequence[Directory | None]: ...
    def take_columns(self) -> Columns: ...
    def give_back(self, columns: Columns) -> None: ...
