from collections.abc import Sequence
from typing import Any, Self

from numpy.typing import NDArray

# (address, [(buffer number, dtype, width) per argument], (buffer number, dtype, width, column offset) of the output)
_Step = tuple[int, Sequence[tuple[int, Any, int]], tuple[int, Any, int, int]]

class TransformProgram:
    steps: tuple[_Step, ...]
    failures: tuple[list[int], ...]
    failed_rows: int
    wrong_lengths: int
    def __new__(cls, steps: Sequence[_Step], failures: Sequence[list[int]] | None = None) -> Self: ...
    def run(self, buffers: Sequence[NDArray[Any]], rows: int) -> None: ...
