"""Reads the file of `Model(examples=...)`: what requests and views would give the model, and the outputs expected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.catalog import TENSOR_TYPES, Catalog, TensorInfo, VersionInfo
from shorttail.define.dtypes import DType, Float64, Vector
from shorttail.define.inputs import copy_of, read_input
from shorttail.define.names import plain_name
from shorttail.define.refusal import Refused
from shorttail.errors import InvalidArgument
from shorttail.models.golden import GoldenRows
from shorttail.models.missing import default_of
from shorttail.models.signature import request_columns, stored_dtype
from shorttail.plan import BufferBuilder

Array = NDArray[Any]


def digest(path: str | None, model_name: str) -> str:
    """Return the SHA-256 of an examples file in hexadecimal, "" for None. Raises InvalidArgument."""
    return "" if path is None else hashlib.sha256(content(path, model_name)).hexdigest()


def content(path: str, model_name: str) -> bytes:
    """Return the bytes of an examples file. Raises InvalidArgument."""
    try:
        return read_input(copy_of(path))
    except OSError as error:
        raise InvalidArgument(f"model '{model_name}': examples: cannot read {path}: {error.strerror}") from None


def read_examples(catalog: Catalog, info: VersionInfo) -> GoldenRows | None:
    """Return the rows of the version's examples file as arrays for the model, None if it has no such file.

    A column of the file is a request column, a stored feature ("view:feature", or the feature's name where that is
    clear), or an output; NAME_0, NAME_1, ... are the columns of an output or a vector. Raises InvalidArgument.
    """
    if info.model.examples is None:
        return None
    where = f"model '{info.model.name}': examples"
    if info.model.is_raw:
        raise InvalidArgument(f"{where}: they have the columns of inputs=, and a model of raw tensors has none")
    table, catalog = ExampleTable(info.model.examples, where), catalog.as_pinned(info)
    types = request_columns(catalog, info.model, info.inputs)
    columns = {}
    for reference in info.model.references:
        dtype = stored_dtype(catalog, reference) or types[reference.removeprefix("request:")]
        instead = info.replacements.get(reference, default_of(catalog, reference))
        columns[reference] = table.input(reference, info.model.references, dtype, instead)
    expected = {}
    for tensor in info.outputs:
        if (found := table.output(tensor)) is not None:
            expected[tensor.name] = found
    if not expected:
        raise InvalidArgument(
            f"{where}: {table.path.name} has none of the model's outputs: {', '.join(t.name for t in info.outputs)}"
        )
    inputs = InputsOf(columns, table.rows).arrays(catalog, info)
    held = sum(array.nbytes for array in [*inputs, *expected.values()])
    if held > LIMITS.example_bytes:
        raise InvalidArgument(f"{where}: {held >> 20} MiB of values; at most {LIMITS.example_bytes >> 20} are kept")
    return GoldenRows(inputs, expected)


class ExampleTable:
    """The columns of an examples file. Raises InvalidArgument, NotFound."""

    def __init__(self, path: str, where: str):
        try:
            import pyarrow as pa

            from shorttail.sources.files import FileSource
        except ImportError:
            raise InvalidArgument(f"{where}: reading files needs PyArrow: pip install 'shorttail[arrow]'") from None
        self.path, self.where = Path(path), where
        copy = copy_of(path)
        parts = FileSource(copy, header(copy), where).parts
        if len(parts) != 1:
            raise InvalidArgument(f"{where}: {path} must be one file, not {len(parts)}")
        self.part = parts[0]
        self.names = list(self.part.names)
        batches = list(self.part.read(self.names))
        self.rows = sum(batch.num_rows for batch in batches)
        if not 1 <= self.rows <= LIMITS.example_rows:
            raise InvalidArgument(
                f"{where}: {self.path.name} has {self.rows:,} rows; give 1 to {LIMITS.example_rows:,}"
            )
        self.table = pa.Table.from_batches(batches)

    def column(self, name: str, dtype: DType) -> tuple[Array, Any]:
        """Return (values, nulls or None) of a column, or of the columns NAME_0, NAME_1, ... of a vector."""
        try:
            if name in self.names:
                column = self.table.column(name).combine_chunks()
                values, nulls = self.part.convert(name, dtype, column)
                return (values if isinstance(values, np.ndarray) else np.array(values.to_pylist(), object)), nulls
            parts = [self.column(f"{name}_{i}", Float64)[0] for i in range(dtype.width)]
            return np.stack(parts, axis=1).astype(dtype.numpy), None
        except Refused as error:
            raise error.error(f"{self.where}: column '{name}' of {self.path.name}", dtype) from None

    def has(self, name: str) -> bool:
        return name in self.names or f"{name}_0" in self.names

    def input(self, reference: str, references: Sequence[str], dtype: DType, instead: Any) -> Array:
        """Return the values of a reference, with what replaces missing ones. instead: None if nothing does."""
        name = reference.removeprefix("request:")
        plain = plain_name(reference)
        if not self.has(name) and sum(plain_name(item) == plain for item in references) == 1:
            name = plain
        if not self.has(name):
            raise InvalidArgument(
                f"{self.where}: {self.path.name} has no column '{reference.removeprefix('request:')}', which feeds the"
                f" model; its columns: {', '.join(self.names)}"
            )
        values, nulls = self.column(name, dtype)
        if nulls is not None and nulls.any():
            if instead is not None:
                values = np.array(values)
                values[nulls] = instead
            elif not (dtype.is_float or dtype.is_vector):
                raise InvalidArgument(
                    f"{self.where}: column '{name}' of {self.path.name} has no value in row {int(np.argmax(nulls))},"
                    " and nothing replaces it"
                )
        return values

    def output(self, tensor: TensorInfo) -> Array | None:
        """Return the values expected of an output, None if the file has no column for it."""
        if not self.has(tensor.name):
            return None
        if tensor.name in self.names:
            kind = self.table.schema.field(tensor.name).type
            width = len(self.table.column(tensor.name)[0].as_py() or ()) if "list" in str(kind) else 1
        else:
            width = next(i for i in range(len(self.names) + 1) if f"{tensor.name}_{i}" not in self.names)
        dtype = TENSOR_TYPES[tensor.dtype]
        if width > 1 or tensor.name not in self.names:
            dtype = Vector(width, Float64)
        elif tensor.name in self.names and "list" in str(self.table.schema.field(tensor.name).type):
            dtype = Vector(1, Float64)
        values, nulls = self.column(tensor.name, dtype)
        if nulls is not None and nulls.any() and not (dtype.is_float or dtype.is_vector):
            raise InvalidArgument(
                f"{self.where}: output '{tensor.name}' has no value in row {int(np.argmax(nulls))} of {self.path.name}"
            )
        return values


def header(path: Path) -> list[str]:
    """Return the names in the first line of a CSV file; nothing for another file, which has its names itself."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return []
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


class InputsOf(BufferBuilder):
    """Makes the arrays of a model's inputs of columns that are all in memory: reference -> values."""

    def __init__(self, columns: Mapping[str, Array], rows: int):
        super().__init__()
        self.columns, self.rows = columns, rows
        self.fills: list[tuple[str, int, int]] = []

    def fill(self, reference: str, buffer: int, offset: int, marker: bytes | None = None) -> None:
        self.fills.append((reference, buffer, offset))

    def arrays(self, catalog: Catalog, info: VersionInfo) -> list[Array]:
        self.fill_inputs(catalog, info.model, info.inputs)
        made = [np.empty(self.rows if width is None else (self.rows, width), dtype) for dtype, width in self.buffers]
        for reference, buffer, offset in self.fills:
            values, array = self.columns[reference], made[buffer]
            with np.errstate(over="ignore", invalid="ignore"):
                if array.ndim == 1:
                    array[:] = values.reshape(self.rows)
                else:
                    matrix = values.reshape(self.rows, -1)
                    array[:, offset : offset + matrix.shape[1]] = matrix
        self.run_transforms(made, self.rows)
        return made[: len(info.inputs)]
