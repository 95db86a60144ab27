"""The embedded API: looks features up and runs models in the calling process, as a server does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shorttail import pipeline
from shorttail import plan as planning
from shorttail._native.route import Route
from shorttail.config import LIMITS
from shorttail.define.durations import parse_duration
from shorttail.define.event_times import AsOf, as_of_us
from shorttail.errors import InvalidArgument, NotFound, ShorttailError, Unavailable
from shorttail.models.device import CPU, Device, check_cuda
from shorttail.models.raw import take_tensors
from shorttail.models.serving import Key, Versions, follow
from shorttail.models.session import ModelFailed
from shorttail.pipeline import BatchResult, Plan, PlanOutdated
from shorttail.registry import versions as registry
from shorttail.registry.contents import StoreContents
from shorttail.results import Features, Prediction, RowCount
from shorttail.store import Store

if TYPE_CHECKING:
    from shorttail._native.columns import Columns
    from shorttail.define.collect import Definitions
    from shorttail.registry.changes import Change
    from shorttail.registry.planning import ChangePlan
    from shorttail.store.erasing import Erasure

Progress = Callable[[int, int | None], None]  # called with the rows done, and the number of rows if it is known


class ColumnsChanged(Unavailable):
    """Raised for a batch whose columns the newest plan does not take. Its requests must be read again."""


class Engine(StoreContents):
    """A store that is open in this process: `Engine.open(path)`. A context manager. Threads may share an engine.

    A forked child may only close the engine of its parent, and any other use there raises InvalidArgument. An engine
    that was closed before the fork can be opened in the child.
    """

    def __init__(self, store: Store, device: Device = CPU):
        self._store = store
        self._device = device
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._last_features: tuple[list[str], Route] | None = None
        self._versions = Versions(store, device)
        self._routes_of = 0  # the value of `self._versions.changes` when the routes were made
        self._broken: set[str | None] = set()  # models whose last plan could not be made

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        create: bool = False,
        device: str = "cpu",
        pretouch: bool = False,
        lock_memory: bool = False,
        max_clock_skew: str | timedelta | None = None,
        code: bool = True,
        by: str = "",
    ) -> Engine:
        """Open the store at `path`.

        create: make the store if there is none. device: "cuda" or "cuda:N" runs models on that GPU, except compiled
        forests. pretouch: map the store's file and build all directories now, so that no request waits for that.
        lock_memory: the same, and keep the file in memory, also as it grows. max_clock_skew: how far event times may be
        ahead of the clock, such as "5m". The store keeps it, for all processes; a new store has "1h". code: False runs
        none of the store's on-demand functions; models that need them are unavailable. by: who makes changes, for the
        history ("ci", "alice"); "" is the user of the process.

        Raises NotFound if there is no store and create is False, InvalidArgument if this host lacks what the device
        needs or the skew is no positive time, ResourceExhausted if the system does not allow that much locked memory
        (ulimit -l).
        """
        where = Device.parse(device)
        if where.kind == "cuda":
            check_cuda(where)
        skew_us = None if max_clock_skew is None else parse_duration(max_clock_skew, "max_clock_skew", "'1h' or '5m'")
        store = Store.open(path, create=create, code=code, by=by)
        try:
            if skew_us not in (None, store.catalog.max_clock_skew_us):
                store.set_max_clock_skew(skew_us)
            if pretouch or lock_memory:
                store.pretouch(lock=lock_memory)
        except BaseException:
            store.close()
            raise
        return cls(store, where)

    def close(self) -> None:
        self._routes.clear()
        self._last_features = None
        self._versions.close()
        self._store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def store(self) -> Store:
        return self._store

    # -- predictions and lookups -----------------------------------------------------------------------------

    def predict(
        self, model: str, columns: Mapping[str, Any], *, version: int | None = None, as_of: AsOf = None
    ) -> Prediction:
        """Run `model` on {column: value or values}: the keys of its views, and its request columns.

        A scalar beside arrays is repeated. version: the version to ask; None is the current one. While the model has a
        canary, the keys of the first row decide whether the canary answers. as_of: as for `get_online_features`.
        docs/types.md says what a column takes. A model without `inputs` takes {input of its file: NumPy array}, and
        gives its outputs in their own shapes. Raises NotFound, InvalidArgument, Internal, Unavailable (not loaded).
        """
        moment_us = None if as_of is None else as_of_us(as_of)
        route = self._route(("predict", model, version))
        if route.plan.tensors is not None:
            return self._predict_raw(route.plan, columns)
        if route.plan.split is not None:
            route = self._route(self.plan_for_request(route.plan, columns).key)
        plan, result = self._ask(route, columns, moment_us)
        statuses = dict(zip(plan.lookup_names, result.view_statuses, strict=True))
        return Prediction(model, result.version, dict(zip(result.names, result.values, strict=True)), statuses)

    def _predict_raw(self, plan: Plan, given: Mapping[str, Any]) -> Prediction:
        assert plan.runner is not None
        assert plan.tensors is not None
        result = BatchResult.of_inputs(plan, take_tensors(plan.model, plan.tensors, given))
        try:
            pipeline.infer(plan.runner, result)
        except ModelFailed as error:
            raise plan.runner.explain(error) from error
        return Prediction(plan.model, plan.version, dict(result.outputs), {})

    def get_online_features(
        self, features: Sequence[str], columns: Mapping[str, Any], *, as_of: AsOf = None
    ) -> Features:
        """Look up "view:feature" and "alias:view:feature" references for {key column: value or values}.

        as_of: the moment at which TTLs are judged (a datetime, ISO 8601 text, or microseconds since 1970; UTC); a row
        that is newer is NOT_FOUND, and the row that it replaced is gone. None: now. Raises NotFound, InvalidArgument.
        """
        moment_us = None if as_of is None else as_of_us(as_of)
        if isinstance(features, str):
            raise InvalidArgument(f"features must be a list of references: [{features!r}]")
        # Callers mostly ask for the same list again. To compare it takes a fifth of the time to hash it, and to hash it
        # takes a tenth of a lookup.
        last = self._last_features
        if type(features) is list and last and features == last[0] and self._is_current(last[1]):
            route = last[1]
        else:
            route = self._route(("features", tuple(features)))
            self._last_features = list(features), route
        plan, result = self._ask(route, columns, moment_us)
        statuses = result.feature_statuses
        assert statuses is not None
        return Features(plan.feature_names, result.values, statuses, plan.has_default, plan.feature_types)

    def plan_for_request(self, plan: Plan, values: Mapping[str, Any]) -> Plan:
        """The plan that answers a request: the canary's, if the model has one and it answers for these keys."""
        split = plan.split
        if split is None:
            return plan
        columns = plan.new_columns()
        columns.append(values)
        if columns.n_rows and split.takes(columns, 0):
            return self.plan_for_model(plan.model, split.version)
        return plan

    def _ask(self, route: Route, values: Mapping[str, Any], moment_us: int | None) -> tuple[Plan, BatchResult]:
        while True:
            columns = route.take_columns()
            try:
                rows = columns.append(values)
                if moment_us is not None:
                    columns.judge_at(moment_us, rows)
                return self.run(route, columns)
            except ColumnsChanged:
                pass
            finally:
                route.give_back(columns)
            route = self._route(route.plan.key)

    def run(self, route: Route, columns: Columns) -> tuple[Plan, BatchResult]:
        """Run a batch, and return the plan that was used with the result.

        If the catalog changed since the route's plan was compiled, the plan's successor runs instead. Raises
        ColumnsChanged if that takes other columns, InvalidArgument if the model refuses these rows.
        """
        plan = route.plan
        try:
            try:
                return plan, pipeline.run_batch(route, self._store, columns)
            except PlanOutdated:
                plan, result = self.prepare(route, columns)
                if plan.runner is not None:
                    pipeline.infer(plan.runner, result)
                return plan, result
        except ModelFailed as error:
            assert plan.runner is not None
            raise plan.runner.explain(error) from error

    def prepare(self, route: Route, columns: Columns) -> tuple[Plan, BatchResult]:
        """Do all of `run` except the model, and return the plan that was used with the result.

        `pipeline.infer(plan.runner, result)` does the rest, in any thread. Raises ColumnsChanged as `run` does.
        """
        asked = route.plan
        while True:
            try:
                return route.plan, pipeline.prepare(route, self._store, columns)
            except PlanOutdated:
                route = self._route(asked.key)
                if not route.plan.takes(columns):
                    raise ColumnsChanged("the definitions changed while this request waited; send it again") from None

    # -- plans -----------------------------------------------------------------------------------------------

    def plan_for_model(self, name: str, version: int | None = None) -> Plan:
        """The compiled plan of a model (the current version, or that one). Raises NotFound."""
        return self._route(("predict", name, version)).plan

    def plan_for_features(self, references: tuple[str, ...]) -> Plan:
        """The compiled plan of a list of feature references. Raises NotFound, InvalidArgument."""
        return self._route(("features", references)).plan

    def _route(self, key: tuple[Any, ...]) -> Route:
        """The route of a plan's key. The plan is compiled if there is none for the present catalog."""
        route = self._routes.get(key)
        if route is not None and self._is_current(route) and self._routes_of == self._versions.changes:
            return route
        self.refresh()  # the model or view asked for may be newer than the snapshot
        with self._versions.lock:
            model = key[1] if key[0] == "predict" and key[2] is None else None
            known = None if route is None or self._routes_of != self._versions.changes else route.plan
            try:
                route = Route((known and planning.renewed(self._store, known)) or self._compile(key))
            except Unavailable:
                self._broken.add(model)
                raise
            self._broken.discard(model)
            if self._routes_of != self._versions.changes:
                self._routes_of = self._versions.changes
                self._routes.clear()
            if len(self._routes) >= LIMITS.feature_plans_cached:
                self._routes = {other: kept for other, kept in self._routes.items() if other[0] != "features"}
            self._routes[key] = route
            return route

    def _is_current(self, route: Route) -> bool:
        return route.plan.catalog_version == self._store.catalog_version

    def unavailable(self) -> dict[str, str]:
        """The models that were asked for and cannot answer now, and why."""
        found = {}
        for name in self._store.catalog.models.keys() & self._broken:
            try:
                self.plan_for_model(name)
            except ShorttailError as error:
                found[name] = error.message
        return found

    def _compile(self, key: tuple[Any, ...]) -> Plan:
        if key[0] == "features":
            return planning.compile_features(self._store, key[1], key)
        _, name, version = key
        if version is not None:
            asked = self._versions.asked(name, version)
            return planning.compile_model(self._store, name, version, self._versions.runners[asked], key)
        serving = self._versions.serving(name)
        current, entry = serving.current, self._store.catalog.model(name)
        runner = self._versions.runners[current]
        try:
            wanted = planning.columns_of(self._store.catalog, entry.version(current.version), runner)
            canary, shadowed = serving.canary, serving.shadow
            split = canary and planning.make_split(self._store.catalog, current, wanted, *canary)
            shadow = shadowed and planning.make_shadow(
                self._store, current, wanted, shadowed[0], self._versions.runners, shadowed[1]
            )
            return planning.compile_model(
                self._store, name, current.version, runner, key, wanted, split=split, shadow=shadow
            )
        except (NotFound, InvalidArgument) as error:
            if current.version == entry.current:  # such as an on-demand function that does not compile on this host
                where = "" if error.message.startswith("model '") else f"model '{name}' version {entry.current}: "
                raise Unavailable(f"{where}{error.message}") from error
            raise Unavailable(f"model '{name}' version {entry.current} is being loaded; send it again") from None

    # -- versions ----------------------------------------------------------------------------------------------

    def load_in_background(self, changed: Callable[[], object]) -> None:
        """From now on load new versions in a thread, while the loaded versions serve. For servers, once they are ready.

        changed: called from that thread when another version answers. `plans_version` has grown by then.
        """
        self._versions.load_in_background(changed)

    def follow(self) -> None:
        """Load all versions that the catalog names, in the background if `load_in_background` was called."""
        follow(self._versions, self._store.catalog)

    def ban(self, banned: frozenset[int]) -> None:
        """Stop running these versions (models.serving.run_key): server processes died in them."""
        with self._versions.lock:
            self._versions.ban(banned)

    @property
    def is_loading(self) -> bool:
        """Whether a version is loading in the background."""
        return self._versions.is_loading

    @property
    def runners(self) -> list[tuple[Key, Any]]:
        """The versions that are loaded."""
        return list(self._versions.runners.items())

    @property
    def plans_version(self) -> int:
        """A number that grows when existing plans have to be compiled again."""
        return self._store.catalog_version + self._versions.changes

    # -- changing --------------------------------------------------------------------------------------------

    def plan(
        self, definitions: str | Path | Definitions | Iterable[object], *, prune: bool = False, accept: bool = False
    ) -> ChangePlan:
        """What `apply` with these arguments would change: `plan.changes`, `plan.errors`, `plan.id`. Writes nothing."""
        from shorttail.registry.apply import plan
        from shorttail.registry.planning import Options

        return plan(self._store, definitions, Options(prune, accept))

    def apply(
        self,
        definitions: str | Path | Definitions | Iterable[object],
        *,
        dry_run: bool = False,
        prune: bool = False,
        accept: bool = False,
        plan: str = "",
        vet_timeout: str | timedelta | None = None,
    ) -> list[Change]:
        """Validate definitions (a file's path, or objects) and register all of them, or none if one is wrong.

        dry_run: only return the changes. prune: remove the views and models that are not among them. accept: let models
        that are not deployed anew take changed definitions too. plan: the id of the plan that must be carried out.
        vet_timeout: how long a model's file may be tried ("10m"). Raises InvalidArgument, NotFound, Internal,
        DeadlineExceeded, ResourceExhausted.
        """
        from shorttail.registry.apply import apply
        from shorttail.registry.planning import Options

        return apply(self._store, definitions, dry_run, vet_timeout, Options(prune, accept), plan)

    def materialize(
        self,
        view: str,
        progress: Progress | None = None,
        *,
        memory_bytes: int | None = None,
        allow_shrink: bool = False,
    ) -> RowCount:
        """Replace the rows of a view by the rows of its source. Readers see all of them at once.

        For the result and the arguments see `load`. Raises NotFound, InvalidArgument, ResourceExhausted (disk).
        """
        definition = self._store.catalog.view(view)
        if definition.source is None:
            raise InvalidArgument(
                f"view '{view}' has no source; give it source=st.ParquetSource(...), or push its rows"
            )
        path = definition.source.path
        return self.load(view, path, progress, memory_bytes=memory_bytes, allow_shrink=allow_shrink)

    def load(
        self,
        view: str,
        data: Any,
        progress: Progress | None = None,
        *,
        memory_bytes: int | None = None,
        allow_shrink: bool = False,
    ) -> RowCount:
        """Replace the rows of a view by the rows of files or of data in memory. Readers see all of them at once.

        data: the path of a Parquet, Arrow or CSV file, of a folder of such files, or a pattern ("rows/*.parquet"); a
        list of paths; a pyarrow RecordBatchReader or iterable of RecordBatches; or rows as `push` takes them. Files and
        Arrow data are read a batch at a time. Folders named `country=DE` give a column. The columns of all files are
        checked before rows are read; where a file lacks a feature that others have, it is null. Other columns are
        ignored. docs/loading.md has the rules.

        Event times come from the view's timestamp column, else from `event_time`; without either they are now. One that
        cannot be right is refused (docs/types.md). Of rows of equal keys that of the latest event time stays. What is
        pushed to the view during the load comes after its rows.
        memory_bytes: what the load may take in memory (default LIMITS.load_memory_bytes); rows beyond it wait in a file
        in the store's directory. allow_shrink: also load if no row is left, or less than half of 1,000 or more rows.

        Returns the rows stored, with the numbers of the other rows. A load that fails changes nothing. Raises NotFound,
        InvalidArgument, ResourceExhausted (disk).
        """
        from shorttail.sources.rows import column_batch, may_hold_objects

        catalog = self._store.newest_catalog()
        definition, skew_us = catalog.view(view), catalog.max_clock_skew_us
        total: int | None  # unknown before CSV is read
        origin: dict[str, Any] = {}
        read = catalog.read_definition(view)
        if may_hold_objects(data):
            batch = column_batch(definition, data, skew_us, may_be_empty=True)
            batches, total, read = iter([batch]), len(batch), catalog.definition(view)
        else:
            from shorttail.sources.batches import open_source, row_batches  # these need PyArrow

            source, n = open_source(data, read.view), len(definition.features)
            batches = row_batches(source, read.view, definition.timestamp, skew_us, needed_features=n)
            total = source.rows
            given = data if isinstance(data, list | tuple) else [data]
            origin["from"] = [str(path) for path in given if isinstance(path, str | os.PathLike)]
        done = 0

        def report(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, total)

        return self._store.load(view, batches, report, memory_bytes, allow_shrink, origin, read)

    def push(self, view: str, rows: Any, *, partial: bool = False) -> RowCount:
        """Upsert rows: a dict of columns, or a pandas, polars or pyarrow table. They are durable when it returns.

        The view's timestamp column, else `event_time`, holds event times; without either they are now, or 1 us after
        that of the stored row if this is later. An event time that cannot be right is refused (docs/types.md). Other
        columns are ignored. A row that is older than the stored row of its key is dropped. partial: the rows have only
        some features, and no other columns; the rest keep what is stored, and are null in a new row. Returns the number
        of the other rows given, with the numbers of older and duplicate rows. Raises NotFound, InvalidArgument,
        ResourceExhausted (disk).
        """
        from shorttail.sources.rows import column_batch

        catalog = self._store.newest_catalog()
        batch = column_batch(catalog.view(view), rows, catalog.max_clock_skew_us, partial=partial)
        return self._store.upsert(view, batch)

    def delete(self, view: str, keys: Mapping[str, Any]) -> int:
        """Delete the rows of these keys. Returns how many rows there were, once that is durable."""
        from shorttail.sources.rows import key_arrays

        return self._store.delete(view, key_arrays(self._store.catalog.view(view), keys))

    def delete_entity(self, entity: str, keys: Mapping[str, Any]) -> Erasure:
        """Delete the rows of these keys in every view of an entity, in one commit, and keep them away.

        keys: {key column: value or values}; {} for an entity without keys. Loads and pushes drop rows of the keys whose
        event times are not after the deletion. Returns the receipt, once all is durable. Raises NotFound,
        InvalidArgument, ResourceExhausted (disk), Internal (a damaged table); nothing is deleted then.
        """
        from shorttail.sources.rows import key_arrays

        definition = self._store.newest_catalog().entity(entity)
        arrays = key_arrays(definition, keys)
        return self._store.delete_entity(entity, dict(zip(definition.keys, arrays, strict=True)))

    def deploy(self, model: str, path: str | Path, **options: Any) -> int:
        """Register an ONNX file as the next version of `model` and make it current. Returns the version.

        options: of `shorttail.registry.versions.deploy`: promote, owner, description, run, metrics, examples,
        canary_percent, vet_timeout.
        """
        return registry.deploy(self._store, model, Path(path), **options)

    def refresh(self, *, force: bool = False) -> bool:
        """Move to the newest snapshot. Returns whether there was a newer one. Lookups do this by themselves.

        force: ask LMDB even if no commit was counted.
        """
        return self._store.refresh(force)
