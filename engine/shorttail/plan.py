"""Compiles definitions into a plan: names become column numbers, buffers and offsets once, before any request."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.columns import CopyColumns
from shorttail._native.pages import Lookup, crc32c
from shorttail._native.route import Split
from shorttail._native.transforms import TransformProgram
from shorttail.define.catalog import Catalog, TensorInfo, VersionInfo
from shorttail.define.dtypes import DType
from shorttail.define.models import Model
from shorttail.define.names import REQUEST, lookup_of, split_reference
from shorttail.define.ondemand import OnDemandFeature
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.models.buffers import Buffer, input_buffer
from shorttail.models.load import Runner
from shorttail.models.missing import marker, replaced_in_requests, required_columns
from shorttail.models.serving import Key
from shorttail.models.signature import key_columns, request_columns
from shorttail.ondemand.compile import compile_on_demand, copy_function
from shorttail.ondemand.trust import check_code
from shorttail.pipeline import Plan, Shadow
from shorttail.store import Store


def compile_model(
    store: Store,
    name: str,
    version: int | None,
    runner: Runner,
    key: tuple[Any, ...],
    request: dict[str, DType] | None = None,
    split: Split | None = None,
    shadow: Shadow | None = None,
) -> Plan:
    """The plan of a model's version (None: the current one). Raises NotFound, InvalidArgument.

    request: the columns that requests bring, where they may be more than the version needs. split: the requests that a
    canary answers; shadow: a version that is compared with this one.
    """
    # Read the version before the catalog: if a writer commits between the two, the plan counts as outdated, not as new.
    catalog_version, catalog = store.catalog_version, store.catalog
    entry = catalog.model(name)
    number = entry.current if version is None else version
    info = entry.version(number)
    model = info.model
    made_of, catalog = parts_of(catalog, key), catalog.as_pinned(info)
    check_code(model, store.runs_code)
    given = request or request_columns(catalog, model, runner.inputs)
    required, instead = required_columns(catalog, info), replaced_in_requests(info)
    builder = PlanBuilder(store, catalog, catalog_version, made_of, given, required, instead, info.replacements)
    tensors = info.inputs if model.is_raw else None
    if tensors is None:
        builder.fill_inputs(catalog, model, runner.inputs)
    return builder.finish(
        "predict", key, model=name, version=number, runner=runner, split=split, shadow=shadow, tensors=tensors
    )


def compile_features(store: Store, references: Sequence[str], key: tuple[Any, ...]) -> Plan:
    """The plan of a list of feature references. Raises NotFound, InvalidArgument."""
    if not references:
        raise InvalidArgument("no features asked for: give at least one 'view:feature'")
    catalog_version, catalog = store.catalog_version, store.catalog
    found = [catalog.feature(reference) for reference in references]
    builder = PlanBuilder(store, catalog, catalog_version, parts_of(catalog, key), key_columns(catalog, references))
    # Features of one type share a matrix, so that one array is allocated for all of them and rows are copied in one
    # piece.
    widths = Counter(feature.dtype.name for _, feature in found if not feature.dtype.is_vector)
    shared: dict[str, tuple[int, Iterator[int]]] = {}
    places: list[tuple[int, int | None]] = []
    for reference, (_, feature) in zip(references, found, strict=True):
        dtype = feature.dtype
        if dtype.is_vector:
            places.append((builder.add_buffer(dtype, dtype.width), None))
        else:
            if dtype.name not in shared:
                shared[dtype.name] = builder.add_buffer(dtype, widths[dtype.name]), itertools.count()
            buffer, columns = shared[dtype.name]
            places.append((buffer, next(columns)))
        builder.fill(reference, places[-1][0], places[-1][1] or 0)
    return builder.finish("features", key, feature_names=tuple(references), feature_places=tuple(places))


def columns_of(catalog: Catalog, info: VersionInfo, runner: Runner) -> dict[str, DType]:
    """The columns of requests for a version, and their types. Raises NotFound, InvalidArgument."""
    return request_columns(catalog.as_pinned(info), info.model, runner.inputs)


def make_split(catalog: Catalog, current: Key, asked: dict[str, DType], canary: Key, percent: float) -> Split:
    """Split requests by the keys of the first view that has keys, or by all columns if there is no such view.

    asked: the columns of requests for the current version.
    """
    info = catalog.model(current.model).version(current.version)
    # Request columns begin with the keys of the first view with keys that is mentioned.
    looked_up = (key_columns(catalog.as_pinned(info), [name]) for name in info.model.references)
    keys = next((len(columns) for columns in looked_up if columns), len(asked))
    # The salt depends on the version, so that the next canary gets other keys.
    salt = crc32c(f"{canary.model}:{canary.version}".encode())
    return Split(canary.version, percent, salt, keys)


def make_shadow(
    store: Store, current: Key, asked: dict[str, DType], shadow: Key, runners: Mapping[Key, Runner], percent: float
) -> Shadow | None:
    """The shadow's plan, or None if it does not fit. asked: the columns of requests for the current version."""
    entry, runner, key = store.catalog.model(shadow.model), runners[shadow], ("shadow", *shadow[:2])
    try:
        needed = columns_of(store.catalog, entry.version(shadow.version), runner)
        if any(asked.get(name) != dtype for name, dtype in needed.items()):
            return None
        plan = compile_model(store, shadow.model, shadow.version, runner, key, asked)
    except (NotFound, InvalidArgument, Unavailable):
        return None
    ours, other = entry.version(current.version), entry.version(shadow.version)
    same_values = ours.model.inputs == other.model.inputs and ours.replacements == other.replacements
    same_values = same_values and ours.pins == other.pins
    return Shadow(plan, percent / 100, same_values and runner.inputs == runners[current].inputs)


def renewed(store: Store, plan: Plan) -> Plan | None:
    """The same plan for the present catalog, if that has changed nothing that the plan was compiled from; else None."""
    catalog_version, catalog = store.catalog_version, store.catalog
    same = plan.made_of == parts_of(catalog, plan.key)
    return replace(plan, catalog_version=catalog_version) if same else None


def parts_of(catalog: Catalog, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of a catalog the plan of a key is compiled from."""
    if key[0] == "features":
        return tuple(lookup_parts(catalog, key[1]))
    entry = catalog.models.get(key[1])
    if entry is None:
        return ()
    shares = [share.version for share in (entry.canary, entry.shadow) if share is not None]
    infos = [entry.versions.get(number) for number in (key[2] or entry.current, *shares)]
    views = [
        part
        for info in infos
        if info is not None
        for part in lookup_parts(catalog.as_pinned(info), info.model.references)
    ]
    return (entry, *views)


def lookup_parts(catalog: Catalog, references: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what of a catalog determines the lookups of features."""
    for lookup in dict.fromkeys(lookup_of(reference) for reference in references):
        alias, _, name = lookup.rpartition(":")
        if name in catalog.views:
            view = catalog.views[name]
            features = [(feature.name, feature.dtype, repr(feature.default)) for feature in view.features]
            yield (
                catalog.aliases.get(alias),
                list(view.keys.items()),
                features,
                view.ttl_us,
                catalog.columns[name],
                catalog.tables[name],
            )


class BufferBuilder:
    """Collects the buffers of a model's inputs and functions, and the functions that fill some of them.

    Subclasses fill the others, with features and request columns.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.transforms: list[tuple[int, list[tuple[int, Any, int]], tuple[int, Any, int, int]]] = []
        self.functions: list[str] = []  # the names of the functions in `transforms`
        self.arguments: dict[tuple[str | OnDemandFeature, str], int] = {}  # (argument, type) -> buffer

    def fill(self, reference: str, buffer: int, offset: int, marker: bytes | None = None) -> None:
        """Fill a buffer with a feature or a request column.

        marker: what stands for a missing value of a feature that has neither a replacement nor a default, in the bytes
        of the buffer's type; None: NaN, 0, False or None.
        """
        raise NotImplementedError

    def fill_inputs(self, catalog: Catalog, model: Model, inputs: Sequence[TensorInfo]) -> None:
        """Add the buffers of a model's inputs, in order, and fill them."""
        by_name = model.inputs_by_name([tensor.name for tensor in inputs])
        pending: list[tuple[OnDemandFeature, int, int]] = []
        for tensor in inputs:
            columns = by_name[tensor.name]
            array, widths = input_buffer(catalog, tensor, columns)
            buffer = len(self.buffers)
            self.buffers.append(array)
            offset = 0
            for column, width in zip(columns, widths, strict=True):
                if isinstance(column, OnDemandFeature):
                    pending.append((column, buffer, offset))
                else:
                    self.fill(column, buffer, offset, marker(array.dtype))
                offset += width
        # Arguments get buffers after the inputs, because the model's inputs must come first.
        uses = Counter(part for feature, _, _ in pending for part in set(feature.walk()))
        for feature, buffer, offset in pending:
            self.transform(feature, buffer, offset, used_again=uses[feature] > 1)

    def add_buffer(self, dtype: DType, width: int | None) -> int:
        self.buffers.append(Buffer(np.dtype(dtype.numpy), width))
        return len(self.buffers) - 1

    def run_transforms(self, arrays: Sequence[NDArray[Any]], rows: int) -> None:
        """Run the functions on arrays for all buffers, whose other buffers are filled."""
        if self.transforms:
            TransformProgram(self.transforms).run(arrays, rows)

    def transform(self, feature: OnDemandFeature, buffer: int, offset: int, used_again: bool = False) -> None:
        """Fill a buffer with an on-demand feature. A feature that is used again gets its own buffer: computed once."""
        function, args = feature.function, feature.args
        if used_again:
            function, args = copy_function(function.returns), (feature,)
        arguments = [
            (self.argument(argument, dtype), dtype.numpy, dtype.width)
            for argument, (_, dtype) in zip(args, function.params, strict=True)
        ]
        target = self.buffers[buffer].dtype
        address = compile_on_demand(function, target)
        self.transforms.append((address, arguments, (buffer, target, function.returns.width, offset)))
        self.functions.append(feature.function.name)

    def argument(self, argument: str | OnDemandFeature, dtype: DType) -> int:
        """The buffer that holds an argument in that type. If the argument is on-demand, an earlier step fills it."""
        key = (argument, dtype.name)
        if key not in self.arguments:
            buffer = self.add_buffer(dtype, dtype.width if dtype.is_vector else None)
            if isinstance(argument, str):
                self.fill(argument, buffer, 0)
            elif argument.function.returns != dtype:
                self.transform(
                    argument, buffer, 0, used_again=True
                )  # computed once, even if it is used in several types
            else:
                self.transform(argument, buffer, 0)
            self.arguments[key] = buffer
        return self.arguments[key]


class PlanBuilder(BufferBuilder):
    """Collects the buffers of a plan and the operations that fill them."""

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        catalog_version: int,
        made_of: tuple[Any, ...],
        columns: dict[str, DType],
        required: tuple[str, ...] = (),
        instead: Mapping[str, Any] | None = None,
        replacements: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.store = store
        self.catalog, self.catalog_version, self.made_of = catalog, catalog_version, made_of
        self.columns = columns
        self.required, self.instead, self.replacements = required, instead or {}, replacements or {}
        self.column_number = {name: number for number, name in enumerate(columns)}
        self.copies: list[tuple[int, int, int]] = []
        # "view" or "alias:view" -> operations of that lookup
        self.gathers: dict[str, list[tuple[int, int, int, Any]]] = {}

    def fill(self, reference: str, buffer: int, offset: int, marker: bytes | None = None) -> None:
        lookup, name = split_reference(reference)
        if lookup == REQUEST:
            self.copies.append((self.column_number[name], buffer, offset))
            return
        view, feature = self.catalog.feature(reference)
        default = self.replacements.get(reference, feature.default)
        if default is None:
            default = marker
        place = self.catalog.stored(view.name).place(name)
        self.gathers.setdefault(lookup, []).append((place, buffer, offset, default))

    def finish(
        self,
        kind: str,
        key: tuple[Any, ...],
        *,
        model: str = "",
        version: int = 0,
        runner: Runner | None = None,
        feature_names: tuple[str, ...] = (),
        feature_places: tuple[tuple[int, int | None], ...] = (),
        split: Split | None = None,
        shadow: Shadow | None = None,
        tensors: tuple[TensorInfo, ...] | None = None,
    ) -> Plan:
        lookups, table_ids = [], []
        features = [self.catalog.feature(name)[1] for name in feature_names]
        for name, operations in self.gathers.items():
            view, columns = self.catalog.looked_up(name)
            keys = [self.column_number[column] for column in columns]
            lookups.append(Lookup(self.store.layout(view.name), keys, operations, view.ttl_us))
            table_ids.append(self.catalog.tables[view.name].id)
        # Statuses are written lookup by lookup; the answer has them in the order of the request.
        gathered = [operation[1:3] for operations in self.gathers.values() for operation in operations]
        failures = None if runner is None else [runner.counts.of_function(name) for name in self.functions]
        row_of = {place: row for row, place in enumerate(gathered)}
        status_rows = [row_of[buffer, column or 0] for buffer, column in feature_places]
        in_order = status_rows == list(range(len(status_rows)))
        return Plan(
            kind=kind,
            key=key,
            catalog_version=self.catalog_version,
            model=model,
            version=version,
            names=tuple(self.columns),
            dtypes=tuple(self.columns.values()),
            required=self.required,
            instead=self.instead,
            lookup_names=tuple(self.gathers),
            table_ids=tuple(table_ids),
            lookups=tuple(lookups),
            buffers=tuple(self.buffers),
            copy=CopyColumns(self.copies) if self.copies else None,
            transforms=TransformProgram(self.transforms, failures) if self.transforms else None,
            runner=runner,
            feature_names=feature_names,
            feature_places=feature_places,
            status_rows=None if in_order else status_rows,
            feature_types=tuple(feature.dtype.name for feature in features),
            has_default=tuple(feature.default is not None for feature in features),
            split=split,
            shadow=shadow,
            tensors=tensors,
            made_of=self.made_of,
        )
