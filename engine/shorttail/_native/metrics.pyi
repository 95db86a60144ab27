from typing import Any, Self

HEADER_WORDS: int
SLOTS: int
SLOT_WORDS: int
REGION_WORDS: int
NAME_BYTES: int
ROWS_AT: int
REQUESTS_AT: int
BATCHES_AT: int
STAGES_AT: int
STAGE_WORDS: int
METHODS: tuple[str, ...]
PROTOCOLS: tuple[str, ...]
CODES: tuple[str, ...]
STAGES: tuple[str, ...]
BOUNDS_NS: tuple[int, ...]
ROW_BOUNDS: tuple[int, ...]
UNKNOWN: str

class Recorder:
    def __new__(cls, words: Any, region: int) -> Self: ...
    def slot(self, method: int, name: str) -> int: ...
    def batch(
        self,
        slot: int,
        protocol: int,
        requests: int,
        rows: int,
        opened_ns: int,
        start_ns: int,
        looked_up_ns: int,
        prepared_ns: int,
        inferred_ns: int,
        end_ns: int,
    ) -> None: ...
    def answered(
        self,
        method: int,
        name: str,
        protocol: int,
        requests: int,
        rows: int,
        opened_ns: int,
        start_ns: int,
        looked_up_ns: int,
        prepared_ns: int,
        inferred_ns: int,
    ) -> int: ...
    def stage(self, slot: int, stage: int, ns: int) -> None: ...
    def requests(self, slot: int, protocol: int, code: str, n: int = 1) -> None: ...
    def add(self, word: int, n: int) -> None: ...
    def put(self, word: int, value: int) -> None: ...
