"""Loads the model versions that the catalog names, and decides which loaded versions answer requests.

A version is loaded, warmed and checked before it answers: in the caller's thread, or, in a server, in a background
thread while the previous version goes on answering. A version that cannot be loaded never answers: the previous version
goes on, `Versions.problem` says why, and the next change of the catalog tries it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shorttail._native import runs
from shorttail.config import LIMITS
from shorttail.define.catalog import TENSOR_TYPES, Catalog, ModelEntry, Share, VersionInfo
from shorttail.define.models import column_label
from shorttail.errors import Internal, InvalidArgument, NotFound, ShorttailError, Unavailable
from shorttail.models import missing
from shorttail.models.buffers import input_buffer
from shorttail.models.device import CPU, Device
from shorttail.models.examples import Examples, depends_on_values
from shorttail.models.golden import FILE, GoldenRows
from shorttail.models.load import Runner, load_runner
from shorttail.models.settings import RunSettings, tuned
from shorttail.store import Store
from shorttail.store.files import model_path
from shorttail.store.preparing import not_ready

log = logging.getLogger(__name__)

# While a model loads, threads hand over the GIL after 0.2 ms, not after Python's default of 5 ms, so that the event
# loop waits less for the loading thread.
LOADING_SWITCH_S = 0.0002
SWITCH_S = sys.getswitchinterval()
LOADING_NICE = 10  # the loading thread yields a CPU that an answering thread wants


class Key(NamedTuple):
    """Identifies a loaded model: its name, its version, the settings that it runs with on this host, how requests share
    its runs, and the hash of its file: a model that was removed and comes back begins with version 1 again.
    """

    model: str
    version: int
    settings: RunSettings
    batching: str = "rows"
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """The loaded versions that answer requests for a model. canary, shadow: a version and its percent of requests."""

    current: Key
    canary: tuple[Key, float] | None = None
    shadow: tuple[Key, float] | None = None

    def versions(self) -> Iterator[Key]:
        """Yield the current version, then the canary and the shadow if there are any."""
        yield self.current
        for part in (self.canary, self.shadow):
            if part is not None:
                yield part[0]


def run_key(model: str, version: int) -> int:
    """Return the number by which native/runs.pyx and the supervisor know a version: 63 bits of a hash, never 0."""
    digest = hashlib.blake2b(f"{model}\0{version}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


class Banned(Unavailable):
    """Processes died while they ran or loaded this version, so it is not run any more."""


def open_version(
    path: Path,
    info: VersionInfo,
    number: int,
    settings: RunSettings,
    device: Device = CPU,
    *,
    every_leaf: bool = False,
) -> Runner:
    """Load a version as it runs in a server, without running it. every_leaf: check each leaf of a forest.

    Raises InvalidArgument if ONNX Runtime cannot load the file.
    """
    return load_runner(
        path,
        [tensor.name for tensor in info.outputs],
        settings,
        device,
        by_request=info.batching == "request",
        raw=info.model.is_raw,
        run_key=run_key(info.model.name, number),
        run_timeout_s=(info.model.run_timeout_us or 1e6 * LIMITS.run_timeout_s) / 1e6,
        forest_differs=info.forest_differs,
        every_leaf=every_leaf,
    )


def load_version(
    path: Path,
    info: VersionInfo,
    catalog: Catalog,
    number: int,
    settings: RunSettings,
    device: Device = CPU,
    every_leaf: bool = False,
    golden: GoldenRows | None = None,
) -> Runner:
    """Load and warm a version, and check that its file is the registered one and has the manifest's inputs and outputs.

    path: the ONNX file. catalog: holds the views that feed the model. number: the version, for errors. every_leaf: see
    `load_runner`. golden: rows with expected outputs, None for those that are kept with the version.
    Raises NotFound, InvalidArgument or Internal; the message names the model and the version.
    """
    catalog = catalog.as_pinned(info)
    try:
        if not path.is_file():
            raise NotFound(f"its file {path} is gone")
        if hashlib.sha256(path.read_bytes()).hexdigest() != info.sha256:
            raise InvalidArgument(f"{path.name} is not the file that was registered: its SHA-256 differs")
        runner = open_version(path, info, number, settings, device, every_leaf=every_leaf)
        if runner.forest_differs and not info.forest_differs:
            log.warning("model '%s' version %d runs in ONNX Runtime: %s", info.model.name, number, runner.why)
        check_schema(runner, info)
        if info.model.is_raw:
            runner.warm_raw(info.inputs)
            return runner
        if golden is None and info.examples_sha256:
            golden = GoldenRows.read(path.with_name(FILE))
        if golden is not None:
            golden.compare(runner.run, runner.output_names, input_labels(catalog, info), runner.exact_rows)
        warm(runner, info, Examples.of(catalog, info, path.read_bytes(), golden.inputs if golden else None))
        if (refuse := missing.refuser(catalog, info)) is not None:
            runner.refuse(refuse)
    except (InvalidArgument, Internal, NotFound) as error:
        known = "" if error.message.startswith("model '") else f"model '{info.model.name}' version {number}: "
        raise type(error)(f"{known}{error.message}") from error
    except OSError as error:
        raise Internal(f"model '{info.model.name}' version {number}: cannot read {path}: {error.strerror}") from error
    return runner


def warm(runner: Runner, info: VersionInfo, examples: Examples) -> None:
    """Run a loaded version on example rows, so that no request pays for a first run, and check what it gives.

    If no example can run for a reason that may lie in its values, `runner.unwarmed` says so.
    Raises InvalidArgument if the outputs do not fit, Internal if no row could run.
    """
    random = np.random.default_rng(0)
    try:
        outputs = examples.keep_those_that_run(runner.run, random, runner.exact_rows or 1)
        for tensor, array in zip(info.outputs, outputs, strict=True):
            if np.asarray(array).dtype != np.dtype(TENSOR_TYPES[tensor.dtype].numpy):
                raise InvalidArgument(
                    f"output '{tensor.name}' is {tensor.dtype} in the manifest but gives {array.dtype}"
                )
        runner.warm(lambda rows: examples(rows, random))
    except Internal as error:
        if not depends_on_values(error, examples.operators):
            raise
        runner.leave_unwarmed(error.message)


def input_labels(catalog: Catalog, info: VersionInfo) -> list[list[str]]:
    """Return the name of each column of each input, as the definition has it. A vector gives its name to several."""
    columns = info.model.inputs_by_name([tensor.name for tensor in info.inputs])
    labels = []
    for tensor in info.inputs:
        widths = input_buffer(catalog, tensor, columns[tensor.name])[1]
        labels.append([column_label(c) for c, n in zip(columns[tensor.name], widths, strict=True) for _ in range(n)])
    return labels


def check_schema(runner: Runner, info: VersionInfo) -> None:
    """Check that the file has the inputs that its version was registered with. Raises InvalidArgument."""
    takes = [(tensor.name, tensor.dtype) for tensor in runner.inputs]
    registered = [(tensor.name, tensor.dtype) for tensor in info.inputs]
    if takes != registered:
        raise InvalidArgument(f"takes the inputs {takes}, but was registered with {registered}")


class Versions:
    """The loaded versions of a store's models.

    The caller holds `lock` when it calls a method, except for the methods that say "Needs no lock".
    """

    def __init__(self, store: Store, device: Device):
        self.lock = threading.Lock()
        self.runners: dict[Key, Runner] = {}
        self.changes = 0  # grows when another version answers: older plans must be made again
        self._store = store
        self._device = device
        self._serving: dict[str, Serving] = {}
        self._asked: dict[Key, None] = {}  # versions that requests named; the most recent is last
        self._failed: dict[Key, tuple[int, ShorttailError]] = {}  # (version of the catalog at the attempt, error)
        self._loading: set[Key] = set()
        self._banned: frozenset[int] = frozenset()  # run_key of versions in which workers died
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None  # normal and low priority
        self._changed: Callable[[], object] = lambda: None

    def load_in_background(self, changed: Callable[[], object]) -> None:
        """Load versions in background threads from now on. Needs no lock.

        changed: the loading thread calls it when another version may answer.
        """
        self._start_threads()
        self._changed = changed

    def _start_threads(self) -> None:
        for thread in self._threads or ():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads = ThreadPoolExecutor(1, "load"), ThreadPoolExecutor(1, "load-low", initializer=lower_priority)

    def close(self) -> None:
        """Stop loading and forget all loaded models. Needs no lock."""
        for thread in self._threads or ():
            thread.shutdown(wait=False, cancel_futures=True)
        self.runners.clear()
        self._serving.clear()

    # -- what answers ------------------------------------------------------------------------------------------

    def serving(self, name: str) -> Serving:
        """Return the versions that answer requests for the model now. Loads missing versions, here or in background.

        Raises NotFound; Unavailable while the first version loads in the background, or if it could not be loaded.
        """
        entry = self._store.catalog.model(name)
        target = self._target(name, entry)
        before = self._serving.get(name)
        for key in target.versions():
            self._ensure_loaded(key)
        current = target.current
        if current in self.runners:
            now = Serving(current, self._if_loaded(target.canary), self._if_loaded(target.shadow))
        elif before is not None and before.current in self.runners and before.current.version in entry.versions:
            now = before
        elif current in self._failed:
            raise Unavailable(self._failed[current][1].message)
        else:
            raise Unavailable(f"model '{name}' version {current.version} is being loaded; send it again")
        if now != before:
            self._serving[name] = now
            if before is not None:  # a first version replaces none, and a store may have thousands of models
                self.changes += 1
                self._release_unused()
        return now

    def asked(self, name: str, version: int) -> Key:
        """Return the key of a version that a request names, and load it if needed.

        The last LIMITS.versions_asked such versions stay loaded.
        Raises NotFound; Unavailable while it loads in the background, or if it could not be loaded.
        """
        entry = self._store.catalog.model(name)
        entry.version(version)
        key = self._key(name, entry, version)
        self._asked.pop(key, None)
        self._asked[key] = None
        while len(self._asked) > LIMITS.versions_asked:
            del self._asked[next(iter(self._asked))]
            self.changes += 1  # so that the engine drops the plan of that version
        self._ensure_loaded(key)
        self._release_unused()
        if key in self.runners:
            return key
        if key in self._failed:
            raise Unavailable(self._failed[key][1].message)
        raise Unavailable(f"model '{name}' version {version} is being loaded; send it again")

    def serving_now(self, name: str) -> Serving | None:
        """Return the versions that answered last, None if the model was never loaded. Loads nothing."""
        return self._serving.get(name)

    def ban(self, banned: frozenset[int]) -> None:
        """Stop running these versions (`run_key`), because processes died in them. Others are not affected."""
        if banned != self._banned:
            self._banned = banned
            self._failed = {key: error for key, error in self._failed.items() if not isinstance(error[1], Banned)}
            for key in [key for key in self.runners if run_key(key.model, key.version) in banned]:
                del self.runners[key]
            if any(run_key(key.model, key.version) in banned for key in self._loading):
                self._loading.clear()  # the thread may never end: what waits for it is loaded by another one
                self._start_threads()
            self.changes += 1

    def problem(self, name: str) -> str | None:
        """Return why versions that the catalog names for the model could not be loaded, None if all could."""
        entry = self._store.catalog.model(name)
        failed = [self._failed[key][1].message for key in self._target(name, entry).versions() if key in self._failed]
        return "; ".join(failed) or None

    def _target(self, name: str, entry: ModelEntry) -> Serving:
        """Return the versions that the catalog names, loaded or not."""

        def part(share: Share | None) -> tuple[Key, float] | None:
            return None if share is None else (self._key(name, entry, share.version), share.percent)

        return Serving(self._key(name, entry, entry.current), part(entry.canary), part(entry.shadow))

    def _if_loaded(self, part: tuple[Key, float] | None) -> tuple[Key, float] | None:
        return part if part is not None and part[0] in self.runners else None

    def _key(self, name: str, entry: ModelEntry, version: int) -> Key:
        info = entry.version(version)
        settings = tuned(info.tuning, str(self._device))[0]
        if info.forest_differs:  # a key of its own, so that what was loaded before that was found is replaced
            settings = replace(settings, runner="onnxruntime")
        return Key(name, version, settings, info.batching, info.sha256)

    def _release_unused(self) -> None:
        """Release the versions that neither the catalog nor recent requests name. A running batch keeps its version.

        The previous version stays loaded, so that a rollback takes effect at once.
        """
        catalog = self._store.catalog
        keep = set(self._asked)
        for name in list(self._serving):
            if name not in catalog.models:
                del self._serving[name]
                continue
            entry = catalog.models[name]
            keep.update(self._serving[name].versions(), self._target(name, entry).versions())
            if entry.previous is not None:
                keep.add(self._key(name, entry, entry.previous))
        for key in [key for key in self.runners if key not in keep]:
            del self.runners[key]

    @property
    def is_loading(self) -> bool:
        """Whether a background thread loads a version now. Needs no lock."""
        return bool(self._loading)

    # -- loading -----------------------------------------------------------------------------------------------

    def _ensure_loaded(self, key: Key) -> None:
        """Load a version, here or in background, unless it is loaded, loading, or failed with the current catalog."""
        if run_key(key.model, key.version) in self._banned:
            self._failed[key] = (
                self._store.catalog_version,
                Banned(
                    f"model '{key.model}' version {key.version} is not run any more: server processes died in it, or"
                    " hung; deploy another version, or reload the server to try it again"
                ),
            )
            return
        tried = self._failed.get(key)
        if key in self.runners or key in self._loading or (tried and tried[0] == self._store.catalog_version):
            return
        catalog = self._store.catalog
        job = (key, catalog.model(key.model).version(key.version), catalog, self._store.catalog_version)
        if self._threads is None:
            self._record(key, job[3], self._load(*job[:3]))
        else:
            self._loading.add(key)
            # ONNX Runtime's own threads would inherit, and keep, the low priority of the thread that starts them.
            low_priority = key.settings.threads == 1 and self._device == CPU
            # Held from here on, so that who waits for readers waits for this too.
            self._threads[low_priority].submit(self._load_in_background, not_ready(self._store.environment), *job)

    def _load(self, key: Key, info: VersionInfo, catalog: Catalog) -> Runner | ShorttailError:
        path = model_path(self._store.path, key.model, key.version)
        place = runs.begin_load(run_key(key.model, key.version))  # if this process dies now, the supervisor knows why
        try:
            return load_version(path, info, catalog, key.version, key.settings, self._device)
        except ShorttailError as error:
            return error
        except Exception as error:  # the loading thread must always report an outcome: requests wait for it
            text = " ".join(str(error).split())[:300]
            return Internal(f"model '{key.model}' version {key.version}: {type(error).__name__}: {text}")
        finally:
            runs.end_load(place)

    def _record(self, key: Key, catalog_version: int, outcome: Runner | ShorttailError) -> None:
        """Keep the outcome of an attempt to load a version. catalog_version: of the catalog at the attempt."""
        if run_key(key.model, key.version) in self._banned:
            return  # it was banned meanwhile
        if isinstance(outcome, Runner):
            info = self._store.catalog.models[key.model].versions.get(key.version)
            if outcome.unwarmed and not (
                info and info.model.is_raw
            ):  # examples of raw tensors fail often: `apply` said it
                log.warning(
                    "model '%s' version %d serves, but no example of it could run: %s",
                    key.model,
                    key.version,
                    outcome.unwarmed,
                )
            self.runners[key] = outcome
            self._failed.pop(key, None)
            return
        known = self._failed.get(key)
        self._failed[key] = (catalog_version, outcome)
        before = self._serving.get(key.model)
        # If no other version serves, the error goes to the client, and the log need not repeat it.
        other = before.current.version if before else self._store.catalog.model(key.model).current
        if (known is None or known[1].message != outcome.message) and (before or other != key.version):
            log.warning("%s; version %d serves", outcome.message, other)

    def _load_in_background(
        self, held: ExitStack, key: Key, info: VersionInfo, catalog: Catalog, catalog_version: int
    ) -> None:
        with held:
            sys.setswitchinterval(LOADING_SWITCH_S)
            try:
                outcome = self._load(key, info, catalog)
            finally:
                sys.setswitchinterval(SWITCH_S)
            with self.lock:
                self._loading.discard(key)
                self._record(key, catalog_version, outcome)
                self.changes += 1
            self._changed()


def lower_priority() -> None:
    """Give the calling thread, and the threads that it starts later, a low scheduling priority (nice 10)."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)


def follow(versions: Versions, catalog: Catalog) -> None:
    """Start to load every version that the catalog names. Takes the lock itself."""
    with versions.lock:
        for name in catalog.models:
            try:
                versions.serving(name)
            except ShorttailError as error:
                log.debug("%s", error.message)  # a request for the model gets the error
