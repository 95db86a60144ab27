"""Reads the inputs and outputs of an ONNX file, and checks that a model's definition and the views fit them.

Every mismatch of definition, views and file is found here, before the file is registered. Afterwards a request can
only fail because of its own content.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shorttail.config import LIMITS
from shorttail.define.catalog import TENSOR_TYPES, Catalog, TensorInfo
from shorttail.define.dtypes import (
    WIDE_VECTOR_CODE,
    Bool,
    DType,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Vector,
)
from shorttail.define.inputs import copy_of
from shorttail.define.models import Column, Model, column_label, missing_reference
from shorttail.define.names import REQUEST, lookup_of, quoted
from shorttail.define.ondemand import OnDemandFeature
from shorttail.define.values import Refused, as_value
from shorttail.errors import InvalidArgument, NotFound
from shorttail.models.onnx_weights import names_without_shape, parse_model, take_in_weights
from shorttail.models.raw import check_carried
from shorttail.models.trial import try_file
from shorttail.models.zipmap import remove_zipmaps


@dataclass(frozen=True)
class ModelFile:
    """An ONNX file that is read once, so that exactly the checked bytes are copied into the store.

    model_name: the model it is for, named in errors. data: the file with all of its weights (models/onnx_weights.py)
    and without ZipMap (models/zipmap.py). sha256: of `data`, in hexadecimal. shapeless: inputs and outputs without a
    shape. vet_s: how long one look at the file may take.
    """

    model_name: str
    path: Path
    data: bytes
    sha256: str
    shapeless: frozenset[str]
    vet_s: float

    @classmethod
    def read(cls, path: str | Path, model_name: str, vet_s: float = LIMITS.vet_s) -> ModelFile:
        """Read a file, and the files beside it that hold its weights.

        Raises NotFound; InvalidArgument for a symbolic link, for a file that is no ONNX model, and for weights that are
        elsewhere or too large for one file.
        """
        path, file = Path(path), copy_of(path)
        where = f"model '{model_name}'"
        if file.is_symlink():
            raise InvalidArgument(f"{where}: {path} is a symbolic link; give the path of the file itself")
        if not file.is_file():
            raise NotFound(f"{where}: there is no file {path}")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InvalidArgument(f"{where}: cannot read {path}: {error.strerror}") from None
        label = f"{where}: {path.name}"
        model = parse_model(data, label)
        changed = take_in_weights(model, path, label)
        changed |= remove_zipmaps(model)
        if changed:
            data = model.SerializeToString()
        return cls(model_name, path, data, hashlib.sha256(data).hexdigest(), names_without_shape(model), vet_s)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Give the path of a file that holds `data`, and lies alone in its folder, as it will in the store."""
        # ONNX Runtime takes the format of a file from its name, and in the store the name ends so.
        name = self.path.name if self.path.suffix == ".onnx" else f"{self.path.name}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, name)
            copy.write_bytes(self.data)
            yield copy

    @cached_property
    def tensors(self) -> tuple[list[TensorInfo], list[TensorInfo]]:
        """The file's inputs and outputs, which ONNX Runtime tells when it has loaded the model, in another process."""
        with self.on_disk() as path:
            found = try_file(read_tensors, path, self.model_name, model=self.model_name, limit_s=self.vet_s)
        inputs, outputs = (
            [replace(tensor, any_rank=tensor.name in self.shapeless) for tensor in tensors] for tensors in found
        )
        return inputs, outputs


def read_tensors(path: Path, model_name: str) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Load a file into ONNX Runtime and return its inputs and outputs. Raises InvalidArgument."""
    from shorttail.models.session import Session

    try:
        session = Session(path)
    except InvalidArgument as error:
        raise InvalidArgument(f"model '{model_name}': {error.message}") from None
    return session.inputs, session.outputs


def select_outputs(model: Model, outputs: Sequence[TensorInfo], label: str) -> tuple[TensorInfo, ...]:
    """Return the outputs that the definition names, or all of them. label: what errors call the file.

    Raises InvalidArgument for an unknown name, and for an output that is not a tensor of a supported type.
    """
    where = f"model '{model.name}'"
    by_name = {tensor.name: tensor for tensor in outputs}
    for name in model.outputs or ():
        if name not in by_name:
            raise InvalidArgument(f"{where}: {label} has no output {quoted(name)}; its outputs: {', '.join(by_name)}")
    selected = tuple(by_name[name] for name in model.outputs or by_name)
    if model.is_raw:
        check_carried(model.name, "output", selected, label)
        return selected
    for tensor in selected:
        if tensor.dtype not in TENSOR_TYPES:
            others = [known.name for known in outputs if known.dtype in TENSOR_TYPES]
            cure = f"; name the others: outputs={others}" if others else ""
            raise InvalidArgument(
                f"{where}: output '{tensor.name}' of {label} is {tensor.dtype}; supported:"
                f" {', '.join(TENSOR_TYPES)}{cure}"
            )
    return selected


def check_inputs(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo], label: str) -> None:
    """Check that the definition's columns exist and fit the file's inputs in number and type. label: as above.

    Raises NotFound for a view or feature that does not exist, InvalidArgument for any other mismatch.
    """
    where = f"model '{model.name}'"
    if model.is_raw:
        check_carried(model.name, "input", inputs, label)
        return
    names = [tensor.name for tensor in inputs]
    if isinstance(model.inputs, Mapping):
        if set(model.inputs) != set(names):
            takes, given = (", ".join(f"'{name}'" for name in side) for side in (names, model.inputs))
            raise InvalidArgument(f"{where}: {label} takes the inputs {takes}, but inputs= names {given}")
    elif len(names) != 1:
        needed = ", ".join(f"'{name}': [...]" for name in names)
        raise InvalidArgument(f"{where}: {label} takes {len(names)} inputs; write inputs={{{needed}}}")
    try:
        for reference in model.references:
            stored_dtype(catalog, reference)
    except NotFound as error:
        raise NotFound(f"{where}: {error.message}") from None
    columns = model.inputs_by_name(names)
    if len(fixed := {tensor.shape[0] for tensor in inputs if tensor.shape and tensor.shape[0]}) > 1:
        raise InvalidArgument(f"{where}: the inputs of {label} take different numbers of rows: {sorted(fixed)}")
    for tensor in inputs:
        check_shape(f"{where}: input '{tensor.name}' of {label}", tensor)
        check_width(where, label, tensor, columns[tensor.name], catalog)
    missing_values(catalog, model, request_columns(catalog, model, inputs))
    for tensor in inputs:
        for column in columns[tensor.name]:
            check_types(f"{where}: {column_label(column)}", label, tensor, column, catalog)


def check_shape(where: str, tensor: TensorInfo) -> None:
    """Check that an input is a matrix or a column of a supported type. Raises InvalidArgument."""
    if tensor.dtype not in TENSOR_TYPES:
        raise InvalidArgument(
            f"{where} is {tensor.dtype}; supported: {', '.join(TENSOR_TYPES)}; without inputs= the model takes tensors,"
            " of more types and of any shape"
        )
    if len(tensor.shape) not in (1, 2):
        raise InvalidArgument(
            f"{where} has {len(tensor.shape)} axes; it must be [rows, columns] or [rows]; without inputs= the model"
            " takes tensors of any shape"
        )


def check_width(where: str, label: str, tensor: TensorInfo, columns: Sequence[Column], catalog: Catalog) -> None:
    """Check that the columns of the definition fill exactly the columns of the input. Raises InvalidArgument."""
    takes = tensor.shape[1] if len(tensor.shape) == 2 else 1
    width = sum(column_width(catalog, column, tensor, len(columns)) for column in columns)
    if takes is None or takes == width:
        return
    given = f"{width}" if width == len(columns) else f"{len(columns)} entries that make {width} columns"
    shown = ", ".join(column_label(column) for column in columns[:5]) + (", ..." if len(columns) > 5 else "")
    raise InvalidArgument(
        f"{where}: {label} takes {takes} column{'s' * (takes != 1)} (input '{tensor.name}'),"
        f" but inputs= lists {given}; first: {shown}"
    )


def check_types(where: str, label: str, tensor: TensorInfo, column: Column, catalog: Catalog) -> None:
    """Check that the input can hold the column's type, and on-demand parameters the types of their arguments."""
    if isinstance(column, OnDemandFeature):
        for feature in column.walk():
            check_arguments(where, feature, catalog)
    gives = column.function.returns if isinstance(column, OnDemandFeature) else stored_dtype(catalog, column)
    if gives is not None and not fits(gives, TENSOR_TYPES[tensor.dtype]):
        raise InvalidArgument(
            f"{where} is {gives}, but input '{tensor.name}' of {label} takes {tensor.dtype}, which cannot hold it"
        )


def check_arguments(where: str, feature: OnDemandFeature, catalog: Catalog) -> None:
    """Check that each argument of an on-demand feature fits its parameter. Raises InvalidArgument."""
    for (name, dtype), argument in zip(feature.function.params, feature.args, strict=True):
        gives = stored_dtype(catalog, argument) if isinstance(argument, str) else argument.function.returns
        if gives is not None and not (fits(gives, dtype) and gives.is_vector == dtype.is_vector):
            raise InvalidArgument(f"{where}: parameter '{name}' is {dtype}, but {column_label(argument)} is {gives}")


def fits(source: DType, target: DType) -> bool:
    """Return whether `target` takes every value of `source`. Numbers that become floats may be rounded."""
    if source == target:
        return True
    if String in (source, target) or target.is_vector:
        return False
    if target.is_float:
        return True
    allowed = {Int32: (Bool,), Int64: (Bool, Int32, Timestamp), Timestamp: (Int64,)}
    return source in allowed.get(target, ())


def stored_dtype(catalog: Catalog, reference: str) -> DType | None:
    """Return the type of a stored feature, None for a request column. Raises NotFound."""
    return None if reference.startswith("request:") else catalog.feature(reference)[1].dtype


def column_width(catalog: Catalog, column: Column, tensor: TensorInfo, entries: int) -> int:
    """Return how many columns of the tensor an entry of the definition fills: a vector's length, else 1.

    entries: how many entries feed the tensor. A request column that is the only entry is a vector as wide as the input.
    """
    if isinstance(column, OnDemandFeature):
        return column.function.returns.width
    stored = stored_dtype(catalog, column)
    if stored is not None:
        return stored.width
    fixed = tensor.shape[1] if len(tensor.shape) == 2 else None
    return fixed if entries == 1 and fixed is not None else 1


def key_columns(catalog: Catalog, references: Iterable[str]) -> dict[str, DType]:
    """Return the key columns that a request for these references must carry: name -> type.

    Raises NotFound for a view or an alias that does not exist, InvalidArgument if two lookups give a column of the same
    name different types.
    """
    keys: dict[str, DType] = {}
    origin: dict[str, str] = {}
    for lookup in dict.fromkeys(map(lookup_of, references)):
        if lookup == REQUEST:
            continue
        view, columns = catalog.looked_up(lookup)
        for name, dtype in zip(columns, view.keys.values(), strict=True):
            if keys.setdefault(name, dtype) != dtype:
                raise InvalidArgument(
                    f"key '{name}' is {keys[name]} in view '{origin[name]}' but {dtype} in view '{lookup}';"
                    " rename one, so that a request can carry both"
                )
            origin.setdefault(name, lookup)
    return keys


@dataclass(frozen=True)
class Use:
    """A place that a request column feeds.

    required: the type that the place takes. natural: the type that a request should have for it. where: in words.
    """

    required: DType
    natural: DType
    where: str

    def takes(self, dtype: DType) -> bool:
        if self.natural.code == WIDE_VECTOR_CODE and dtype != self.natural:
            return False  # its elements would be rounded to float32 before they become doubles
        return fits(dtype, self.required) and dtype.width == self.natural.width


def request_columns(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo]) -> dict[str, DType]:
    """Return every column that a request for the model carries: name -> type, with the keys of its views first.

    A request column that is also a key has the key's type. Another has the type of the place that it feeds: a parameter
    of an on-demand function, or an input (Float64 for a float matrix, so that it takes integers too).
    Raises InvalidArgument if no single type fits all uses of a column.
    """
    try:
        columns = key_columns(catalog, model.references)
    except InvalidArgument as error:
        raise InvalidArgument(f"model '{model.name}': {error.message}") from None
    for name, uses in request_uses(catalog, model, inputs).items():
        candidates = [columns[name]] if name in columns else [use.natural for use in uses]
        fitting = [dtype for dtype in candidates if all(use.takes(dtype) for use in uses)]
        if not fitting:
            key = f" is a key of type {columns[name]}, but" if name in columns else ""
            if whole := next((use for use in uses if use.natural.is_vector and not use.required.is_float), None):
                raise InvalidArgument(
                    f"model '{model.name}': request:{name} feeds all {whole.natural.width} columns of {whole.where}, of"
                    f" type {whole.required}, and a vector has floats; name the columns one by one:"
                    f" ['request:{name}_0', 'request:{name}_1', ...]"
                )
            needed = " and ".join(dict.fromkeys(f"{use.required} for {use.where}" for use in uses))
            raise InvalidArgument(f"model '{model.name}': request:{name}{key} must be {needed}")
        columns[name] = fitting[0]
    return columns


def missing_values(catalog: Catalog, model: Model, columns: Mapping[str, DType]) -> dict[str, Any]:
    """Return the values of `Model.missing`, converted to the types of their columns, by reference.

    A vector is a list of floats. columns: the model's request columns, name -> type. Raises InvalidArgument.
    """
    found = {}
    for name, given in model.missing.items():
        reference = missing_reference(name)
        dtype = stored_dtype(catalog, reference) or columns[reference.removeprefix("request:")]
        try:
            value = as_value(dtype, given)
        except Refused as error:
            raise error.error(f"model '{model.name}': missing: column '{name}'", dtype) from None
        if value is None:
            raise InvalidArgument(f"model '{model.name}': missing: column '{name}' needs a value, not {given!r}")
        found[reference] = list(value) if dtype.is_vector else value
    return found


def request_uses(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo]) -> dict[str, list[Use]]:
    """Return the uses of each request column, in the order in which the columns first occur."""
    by_input = model.inputs_by_name([tensor.name for tensor in inputs])
    uses: dict[str, list[Use]] = {}
    for tensor in inputs:
        entries = by_input[tensor.name]
        for column in entries:
            if isinstance(column, OnDemandFeature):
                for feature in column.walk():
                    for argument, (_, dtype) in zip(feature.args, feature.function.params, strict=True):
                        if isinstance(argument, str):
                            use = Use(dtype, Float64 if dtype.is_float else dtype, feature.label)
                            add_use(uses, argument, use)
            else:
                dtype, width = TENSOR_TYPES[tensor.dtype], column_width(catalog, column, tensor, len(entries))
                wide = Float64 if dtype == Float64 else Float32
                natural = Vector(width, wide) if width > 1 else Float64 if dtype.is_float else dtype
                add_use(uses, column, Use(dtype, natural, f"input '{tensor.name}'"))
    return uses


def add_use(uses: dict[str, list[Use]], reference: str, use: Use) -> None:
    if reference.startswith("request:"):
        uses.setdefault(reference.removeprefix("request:"), []).append(use)
