from typing import Any, Self

from numpy import float64, int32, int64, uint8, uint32
from numpy.typing import NDArray

_Value = float | int | bytes | NDArray[Any] | tuple[str, bytes] | tuple[str, list[bytes], NDArray[uint32]] | None

def simd_level() -> str: ...
def read_attribute(data: memoryview | bytes | NDArray[uint8]) -> tuple[str, _Value]: ...

class Trees:
    n_features: int
    n_targets: int
    n_trees: int
    n_leaves: int
    n_nodes: int
    wide: bool
    classifier: bool
    def __new__(
        cls,
        *,
        feature: NDArray[int32],
        yes: NDArray[int32],
        no: NDArray[int32],
        mode: NDArray[uint8],
        missing_yes: NDArray[uint8],
        threshold: NDArray[float64],
        root: NDArray[uint32],
        weight_begin: NDArray[uint32],
        weight_target: NDArray[int32],
        weight: NDArray[float64],
        set_begin: NDArray[uint32],
        set_value: NDArray[float64],
        base: NDArray[float64],
        n_targets: int,
        wide: bool,
        wide_scores: bool,
        aggregate: int,
        post_transform: int,
        classifier: bool,
        one_class_votes: bool,
        all_positive: bool,
    ) -> Self: ...
    @property
    def simd(self) -> str: ...
    @property
    def votes(self) -> str: ...
    @property
    def n_bitvector_trees(self) -> int: ...
    def run(self, rows: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[Any]]: ...
    def run_alone(self, rows: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[Any]]: ...
    def run_raw(self, rows: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[Any]]: ...
    def reach(self, rows: NDArray[Any], reached: NDArray[uint8], wanted: NDArray[int64]) -> NDArray[uint8]: ...
