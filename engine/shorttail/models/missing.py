"""Decides what a model gets where a value is missing: in a request, or in a view (null, not found or stale).

A float is NaN then. Texts and integers have no value that says "missing", so one is fed only if the definition names it
(`Model(missing=...)`, a feature's default) or the model's file has exactly one text for it. Otherwise the rows are
refused: an answer that looks right and is wrong helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import TENSOR_TYPES, Catalog, TensorInfo, VersionInfo
from shorttail.define.dtypes import String
from shorttail.define.models import Model
from shorttail.errors import InvalidArgument
from shorttail.models.buffers import input_buffer
from shorttail.models.session import RowsRefused
from shorttail.models.signature import missing_values, request_columns, request_uses, stored_dtype
from shorttail.models.vocabulary import Feed, read_feeds

Array = NDArray[Any]


class Fed(NamedTuple):
    """A reference that feeds columns of a model's input directly, not through a function.

    number, tensor: the input. first, width: its columns that the reference fills.
    """

    reference: str
    number: int
    tensor: TensorInfo
    first: int
    width: int


def direct_columns(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo]) -> Iterator[Fed]:
    """Yield every "view:feature" and "request:column" that feeds an input directly, in order."""
    if model.is_raw:
        return
    by_input = model.inputs_by_name([tensor.name for tensor in inputs])
    for number, tensor in enumerate(inputs):
        first = 0
        for column, width in zip(
            by_input[tensor.name], input_buffer(catalog, tensor, by_input[tensor.name])[1], strict=True
        ):
            if isinstance(column, str):
                yield Fed(column, number, tensor, first, width)
            first += width


def find_replacements(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo], data: bytes) -> dict[str, Any]:
    """Return the value that replaces a missing one, by "request:column" or "view:feature".

    data: the model's file. Raises InvalidArgument if a value of `Model.missing` is not of its column's type, and if the
    file has several texts that could stand for a missing one.
    """
    if model.is_raw:
        return {}
    columns = request_columns(catalog, model, inputs)
    found = missing_values(catalog, model, columns)
    for reference, feed in feeds_of(catalog, model, inputs, data).items():
        if reference in found or default_of(catalog, reference) is not None:
            continue
        stored = stored_dtype(catalog, reference)
        dtype = stored or columns[reference.removeprefix("request:")]
        if dtype == String:
            texts = [""] if feed.is_unused else feed.missing_texts()
            if len(texts) > 1:
                both = " and ".join(map(repr, texts))
                raise InvalidArgument(
                    f"model '{model.name}': {reference} feeds a vocabulary with {both}; say which of them stands for a"
                    f" missing value: missing={{{reference!r}: {texts[0]!r}}}"
                )
            if texts:
                found[reference] = texts[0]
        elif stored is not None and feed.is_unused and not (dtype.is_float or dtype.is_vector):
            found[reference] = 0
    check_bools(catalog, model, inputs, found)
    return found


def feeds_of(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo], data: bytes) -> dict[str, Feed]:
    """Return what each reference that feeds an input directly feeds there, over all its columns."""
    places = list(direct_columns(catalog, model, inputs))
    if not any(takes_no_nan(place.tensor) for place in places):
        return {}
    by_input = model.inputs_by_name([tensor.name for tensor in inputs])
    buffers = {tensor.name: input_buffer(catalog, tensor, by_input[tensor.name])[0] for tensor in inputs}
    feeds = read_feeds(data, {name: buffer.width for name, buffer in buffers.items()})
    merged: dict[str, Feed] = {}
    for reference, _, tensor, first, width in places:
        if takes_no_nan(tensor):
            total = merged.setdefault(reference, Feed())
            for feed in feeds[tensor.name][first : first + width]:
                total.known.extend(feed.known)
                total.opaque |= feed.opaque
    return merged


def takes_no_nan(tensor: TensorInfo) -> bool:
    return not TENSOR_TYPES[tensor.dtype].is_float


def default_of(catalog: Catalog, reference: str) -> Any:
    """Return the default of a stored feature, None if it has none, and for a request column."""
    return None if reference.startswith("request:") else catalog.feature(reference)[1].default


def required_columns(catalog: Catalog, info: VersionInfo) -> tuple[str, ...]:
    """Return the request columns in which a missing value is refused.

    These columns feed the model, their type has no NaN (integers, bools, strings, times), and the version has no value
    that replaces a missing one. In floats and vectors a missing value is NaN, and a missing key matches no row.
    """
    catalog = catalog.as_pinned(info)
    columns = request_columns(catalog, info.model, info.inputs)
    used = [
        name for name in request_uses(catalog, info.model, info.inputs) if f"request:{name}" not in info.replacements
    ]
    return tuple(name for name in used if not (columns[name].is_float or columns[name].is_vector))


def replaced_in_requests(info: VersionInfo) -> dict[str, Any]:
    """Return {request column: the value that replaces a missing value}. A vector is a list of floats."""
    given = info.replacements.items()
    return {name.removeprefix("request:"): value for name, value in given if name.startswith("request:")}


# -- missing values of views that nothing replaces ---------------------------------------------------------------------


def marker(dtype: np.dtype[Any]) -> bytes | None:
    """Return what a lookup writes into an input where a value is missing and nothing replaces it.

    In an integer input that is the smallest integer, as NumPy and R mark a missing value, in bytes. None: the lookup
    writes NaN into floats, None into texts, and False into bools, for which `check_bools` wants a replacement.
    """
    return np.array(np.iinfo(dtype).min, dtype).tobytes() if dtype.kind in "iu" else None


def unreplaced(catalog: Catalog, info: VersionInfo) -> list[Fed]:
    """Return the stored columns in texts and integers whose missing values nothing in the version replaces."""
    return [
        place
        for place in direct_columns(catalog, info.model, info.inputs)
        if takes_no_nan(place.tensor)
        and not place.reference.startswith("request:")
        and place.reference not in info.replacements
    ]


def refuser(catalog: Catalog, info: VersionInfo) -> Callable[[Sequence[Array]], None] | None:
    """Return a function that raises RowsRefused for inputs in which a stored value is missing and not replaced.

    None: the version needs no such function. A column with a default is looked at too, because the default may be
    dropped while the version is loaded.
    """
    places = [place for place in unreplaced(catalog, info) if place.tensor.dtype != "bool"]
    if not places:
        return None

    def refuse(inputs: Sequence[Array]) -> None:
        for reference, number, _, first, _ in places:
            array = inputs[number]
            values = array if array.ndim == 1 else array[:, first]
            if values.dtype.hasobject:
                found = values.tolist()
                row = found.index(None) if None in found else -1
            else:
                missing = values == np.iinfo(values.dtype).min
                row = int(missing.argmax()) if missing.any() else -1
            if row >= 0:
                raise RowsRefused(
                    f"model '{info.model.name}': {reference} has no value at row {row} (it is null, stale or not found)"
                    f" and nothing that replaces it; {cure([reference])}"
                )

    return refuse


def cure(references: Sequence[str]) -> str:
    """Say how to give columns a value for a missing one."""
    return f"give the feature a default, or the model missing={{{', '.join(f'{name!r}: ...' for name in references)}}}"


def warning(catalog: Catalog, info: VersionInfo) -> str:
    """Return the warning about stored columns whose missing values are refused, "" if there are none."""
    names = list(dict.fromkeys(place.reference for place in unreplaced(catalog, info)))
    names = [name for name in names if default_of(catalog, name) is None]
    if not names:
        return ""
    return f"rows in which {' or '.join(names)} is missing in the store are refused; to take them, {cure(names)}"


def check_bools(catalog: Catalog, model: Model, inputs: Sequence[TensorInfo], given: Mapping[str, Any]) -> None:
    """Check that what is missing in a stored column of a bool input has a replacement. Raises InvalidArgument.

    given: the replacements. A bool has no third value that could mark a missing one.
    """
    for place in direct_columns(catalog, model, inputs):
        reference = place.reference
        if place.tensor.dtype != "bool" or reference.startswith("request:") or reference in given:
            continue
        if default_of(catalog, reference) is None:
            raise InvalidArgument(
                f"model '{model.name}': {reference} feeds the bool input '{place.tensor.name}', which has no value that"
                f" says missing; {cure([reference])}"
            )
