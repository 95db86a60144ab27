from collections.abc import Mapping, Sequence
from typing import Any, Self

from numpy.typing import NDArray

from shorttail.define.dtypes import DType
from shorttail.errors import ShorttailError

class Columns:
    n_columns: int
    n_rows: int
    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    index: dict[str, int]
    required: tuple[str, ...]
    instead: dict[str, Any]
    def __new__(
        cls,
        names: Sequence[str],
        dtypes: Sequence[DType],
        required: Sequence[str] = (),
        instead: Mapping[str, Any] | None = None,
    ) -> Self: ...
    def reset(self) -> None: ...
    def append(self, values: Mapping[str, Any]) -> int: ...
    def column(self, name: str) -> NDArray[Any]: ...
    def hash_row(self, row: int, n_columns: int, salt: int) -> int: ...

class CopyColumns:
    def __new__(cls, ops: Sequence[tuple[int, int, int]]) -> Self: ...
    def run(self, columns: Columns, outputs: Sequence[NDArray[Any]]) -> None: ...

def unknown_column(columns: Columns, name: object) -> ShorttailError: ...
def empty_column(columns: Columns, c: int) -> ShorttailError: ...
def too_many_rows(n: int) -> ShorttailError: ...
