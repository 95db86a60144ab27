"""Which versions of models this process has loaded, and which of them answer.

The catalog says what should serve. A version that is not loaded yet is loaded, warmed and checked first: in the
caller's thread, or in a server in a thread of its own, while the version that served before goes on. One that cannot be
loaded never answers: what served before goes on, `problems` says why, and a change of the catalog tries it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.catalog import TENSOR_TYPES, Catalog, ModelEntry, Share, VersionInfo
from shorttail.errors import Internal, InvalidArgument, NotFound, ShorttailError, Unavailable
from shorttail.models.buffers import input_buffer
from shorttail.models.device import CPU, Device
from shorttail.models.load import Runner, load
from shorttail.models.settings import RunSettings, tuned
from shorttail.store import Store
from shorttail.store.files import model_path

log = logging.getLogger(__name__)
T = TypeVar("T")

# A thread that loads a model and one that answers take turns this often, not every 5 ms as Python has it by default.
LOADING_SWITCH_S = 0.0002
SWITCH_S = sys.getswitchinterval()
LOADING_NICE = 10  # where a thread that loads and one that answers want the same CPU, the latter has it


class Key(NamedTuple):
    """A version, and how it is run here: what a loaded model is found by."""

    model: str
    version: int
    settings: RunSettings


@dataclass(frozen=True, slots=True)
class Serving:
    """What answers requests for a model, all of it loaded. canary, shadow: and their percent of requests."""

    current: Key
    canary: tuple[Key, float] | None = None
    shadow: tuple[Key, float] | None = None

    def versions(self) -> Iterator[Key]:
        yield self.current
        for part in (self.canary, self.shadow):
            if part is not None:
                yield part[0]


def load_version(
    path: Path, info: VersionInfo, catalog: Catalog, number: int, settings: RunSettings, device: Device = CPU
) -> Runner:
    """A version that may serve: its file is the one registered, it is loaded and warm, and takes and gives what the
    manifest says.

    path: of the ONNX file; catalog: of the views that feed it. Raises NotFound, InvalidArgument or Internal, with the
    model and version named.
    """
    try:
        if not path.is_file():
            raise NotFound(f"its file {path} is gone")
        if hashlib.sha256(path.read_bytes()).hexdigest() != info.sha256:
            raise InvalidArgument(f"{path.name} is not the file that was registered: its SHA-256 differs")
        runner = load(path, [tensor.name for tensor in info.outputs], settings, device)
        check_schema(runner, info)
        columns = info.model.inputs_by_name([tensor.name for tensor in info.inputs])
        buffers = [input_buffer(catalog, tensor, columns[tensor.name])[0] for tensor in info.inputs]
        random = np.random.default_rng(0)
        example = [buffer.example(1, random) for buffer in buffers]
        for tensor, array in zip(info.outputs, runner.run(example), strict=True):
            if np.asarray(array).dtype != np.dtype(TENSOR_TYPES[tensor.dtype].numpy):
                raise InvalidArgument(
                    f"output '{tensor.name}' is {tensor.dtype} in the manifest but gives {array.dtype}"
                )
        runner.warm(lambda rows: [buffer.example(rows, random) for buffer in buffers])
    except (InvalidArgument, Internal, NotFound) as error:
        known = "" if error.message.startswith("model '") else f"model '{info.model.name}' version {number}: "
        raise type(error)(f"{known}{error.message}") from error
    except OSError as error:
        raise Internal(f"model '{info.model.name}' version {number}: cannot read {path}: {error.strerror}") from error
    return runner


def vet(catalog: Catalog, info: VersionInfo, number: int, path: Path) -> None:
    """Load, warm and check a version in this process: only what passes may serve. Raises as `load_version`."""
    load_version(path, info, catalog, number, tuned(info.tuning)[0])


def check_schema(runner: Runner, info: VersionInfo) -> None:
    """That the file takes what its version was registered with."""
    takes = [(tensor.name, tensor.dtype) for tensor in runner.inputs]
    registered = [(tensor.name, tensor.dtype) for tensor in info.inputs]
    if takes != registered:
        raise InvalidArgument(f"takes the inputs {takes}, but was registered with {registered}")


class Versions:
    """The loaded versions of one store's models. Its methods are called with `lock` held, but for those that say so."""

    def __init__(self, store: Store, device: Device):
        self.lock = threading.Lock()
        self.runners: dict[Key, Runner] = {}
        self.changes = 0  # grows when another version answers: plans made before are to be made again
        self._store = store
        self._device = device
        self._serving: dict[str, Serving] = {}
        self._asked: dict[Key, None] = {}  # versions that requests named, the latest last
        self._failed: dict[Key, tuple[int, ShorttailError]] = {}  # and the catalog that it was tried with
        self._loading: set[Key] = set()
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None  # one that all others go before
        self._changed: Callable[[], object] = lambda: None

    def load_in_background(self, changed: Callable[[], object]) -> None:
        """From now on load in a thread; `changed` is called from it when another version answers. Takes no lock."""
        self._threads = ThreadPoolExecutor(1, "load"), ThreadPoolExecutor(1, "load-behind", initializer=go_behind)
        self._changed = changed

    def close(self) -> None:
        """Takes no lock."""
        for thread in self._threads or ():
            thread.shutdown(wait=False, cancel_futures=True)
        self.runners.clear()
        self._serving.clear()

    # -- what answers ------------------------------------------------------------------------------------------

    def serving(self, name: str) -> Serving:
        """What answers requests for the model now. Loads what is missing, or has it loaded.

        Raises NotFound; Unavailable while the first version loads in the background; what `load_version` raises.
        """
        entry = self._store.catalog.model(name)
        wanted = self._wanted(name, entry)
        before = self._serving.get(name)
        for key in wanted.versions():
            self._provide(key)
        current = wanted.current
        if current in self.runners:
            now = Serving(current, self._loaded(wanted.canary), self._loaded(wanted.shadow))
        elif before is not None and before.current in self.runners and before.current.version in entry.versions:
            now = before
        elif current in self._failed:
            raise self._failed[current][1]
        else:
            raise Unavailable(f"model '{name}' version {current.version} is being loaded; send it again")
        if now != before:
            self._serving[name] = now
            if before is not None:
                self.changes += 1
            self._trim()
        return now

    def asked(self, name: str, version: int) -> Key:
        """A version that a request names. The latest LIMITS.versions_asked of them stay loaded.

        Raises NotFound; Unavailable while it loads in the background; what `load_version` raises.
        """
        entry = self._store.catalog.model(name)
        entry.version(version)
        key = self._key(name, entry, version)
        self._asked.pop(key, None)
        self._asked[key] = None
        while len(self._asked) > LIMITS.versions_asked:
            del self._asked[next(iter(self._asked))]
            self.changes += 1  # so that nobody keeps its plan
        self._provide(key)
        self._trim()
        if key in self.runners:
            return key
        if key in self._failed:
            raise self._failed[key][1]
        raise Unavailable(f"model '{name}' version {version} is being loaded; send it again")

    def serving_now(self, name: str) -> Serving | None:
        """What answers as far as known, without loading anything."""
        return self._serving.get(name)

    def problem(self, name: str) -> str | None:
        """Why what the catalog names for the model does not serve."""
        entry = self._store.catalog.model(name)
        failed = [self._failed[key][1].message for key in self._wanted(name, entry).versions() if key in self._failed]
        return "; ".join(failed) or None

    def _wanted(self, name: str, entry: ModelEntry) -> Serving:
        def part(share: Share | None) -> tuple[Key, float] | None:
            return None if share is None else (self._key(name, entry, share.version), share.percent)

        return Serving(self._key(name, entry, entry.current), part(entry.canary), part(entry.shadow))

    def _loaded(self, part: tuple[Key, float] | None) -> tuple[Key, float] | None:
        return part if part is not None and part[0] in self.runners else None

    def _key(self, name: str, entry: ModelEntry, version: int) -> Key:
        return Key(name, version, tuned(entry.version(version).tuning, str(self._device))[0])

    def _trim(self) -> None:
        """Let go of the versions that nothing names any more. A batch that runs keeps its own.

        The one that served before stays, so that rolling back takes effect at once.
        """
        catalog = self._store.catalog
        keep = set(self._asked)
        for name in list(self._serving):
            if name not in catalog.models:
                del self._serving[name]
                continue
            entry = catalog.models[name]
            keep.update(self._serving[name].versions(), self._wanted(name, entry).versions())
            if entry.previous is not None:
                keep.add(self._key(name, entry, entry.previous))
        for key in [key for key in self.runners if key not in keep]:
            del self.runners[key]

    @property
    def is_loading(self) -> bool:
        """Takes no lock."""
        return bool(self._loading)

    # -- loading -----------------------------------------------------------------------------------------------

    def _provide(self, key: Key) -> None:
        """Load that version if it is not, now or soon. A failure is kept, and tried again with another catalog."""
        tried = self._failed.get(key)
        if key in self.runners or key in self._loading or (tried and tried[0] == self._store.catalog_version):
            return
        catalog = self._store.catalog
        job = (key, catalog.model(key.model).version(key.version), catalog, self._store.catalog_version)
        if self._threads is None:
            self._take(key, job[3], self._load(*job[:3]))
        else:
            self._loading.add(key)
            # ONNX Runtime's own threads would stay behind with the one that makes them.
            behind = key.settings.threads == 1 and self._device == CPU
            self._threads[behind].submit(self._load_apart, *job)

    def _load(self, key: Key, info: VersionInfo, catalog: Catalog) -> Runner | ShorttailError:
        path = model_path(self._store.path, key.model, key.version)
        try:
            return load_version(path, info, catalog, key.version, key.settings, self._device)
        except ShorttailError as error:
            return error
        except Exception as error:  # a loader thread must not end with a request waiting for it
            text = " ".join(str(error).split())[:300]
            return Internal(f"model '{key.model}' version {key.version}: {type(error).__name__}: {text}")

    def _take(self, key: Key, catalog_version: int, outcome: Runner | ShorttailError) -> None:
        if isinstance(outcome, Runner):
            self.runners[key] = outcome
            self._failed.pop(key, None)
            return
        known = self._failed.get(key)
        self._failed[key] = (catalog_version, outcome)
        before = self._serving.get(key.model)
        # Where nothing else serves, whoever asked hears it.
        other = before.current.version if before else self._store.catalog.model(key.model).current
        if (known is None or known[1].message != outcome.message) and (before or other != key.version):
            log.warning("%s; version %d serves", outcome.message, other)

    def _load_apart(self, key: Key, info: VersionInfo, catalog: Catalog, catalog_version: int) -> None:
        sys.setswitchinterval(LOADING_SWITCH_S)
        try:
            outcome = self._load(key, info, catalog)
        finally:
            sys.setswitchinterval(SWITCH_S)
        with self.lock:
            self._loading.discard(key)
            self._take(key, catalog_version, outcome)
            self.changes += 1
        self._changed()


def behind(work: Callable[[], T]) -> T:
    """Run it in a thread to which all others go first."""
    with ThreadPoolExecutor(1, "load-behind", initializer=go_behind) as thread:
        return thread.submit(work).result()


def go_behind() -> None:
    """From now on all other threads go before this one, and before those that it starts."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)


def follow(versions: Versions, catalog: Catalog) -> None:
    """Have everything loaded that the catalog names. Takes the lock."""
    with versions.lock:
        for name in catalog.models:
            try:
                versions.serving(name)
            except ShorttailError as error:
                log.debug("%s", error.message)  # whoever asks for it hears it
