"""Examines a version of a model before it is registered or promoted: loads it, runs it, and looks how its rows depend.

All of it happens in a process that can be killed (models/trial.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog, VersionInfo
from shorttail.define.models import BATCHING, Model
from shorttail.define.names import REQUEST, lookup_of
from shorttail.errors import Internal
from shorttail.models import missing
from shorttail.models.examples import Examples
from shorttail.models.golden import GoldenRows
from shorttail.models.raw import WHY_BY_ITSELF
from shorttail.models.row_check import examine_rows
from shorttail.models.serving import load_version, open_version
from shorttail.models.settings import tuned
from shorttail.models.trial import try_file

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What an examination found: the version as it is to be registered, and warnings of one line each."""

    info: VersionInfo
    warnings: list[str]


def vet(
    catalog: Catalog,
    info: VersionInfo,
    number: int,
    path: Path,
    warn: Callable[[str], object] | None = None,
    golden: GoldenRows | None = None,
    limit_s: float = LIMITS.vet_s,
) -> VersionInfo:
    """Load, warm, check and examine a version before it is registered or promoted, a forest at every leaf.

    warn: called with each warning, in one line; None logs them. golden: as for `load_version`. limit_s: how long all of
    it may take. Returns the version with what the examination found (`with_findings`). Raises the errors of
    `load_version` and `try_file`.
    """
    name = info.model.name
    read = read_by(catalog.as_pinned(info), info.model)
    found = try_file(examine, read, info, number, path, golden, model=name, limit_s=limit_s)
    for text in found.warnings:
        if warn is not None:
            warn(text)
        else:
            log.warning("model '%s' version %d: %s", name, number, text)
    return found.info


def read_by(catalog: Catalog, model: Model) -> Catalog:
    """Return a catalog of the views that a model reads, to be sent to another process. Raises NotFound.

    In a store of 1,000 models it takes longer to send the whole catalog than to try a small model.
    """
    lookups = dict.fromkeys(map(lookup_of, model.references))
    views = [catalog.looked_up(lookup)[0] for lookup in lookups if lookup != REQUEST]
    columns = {view.name: catalog.columns[view.name] for view in views}
    return Catalog(views={view.name: view for view in views}, columns=columns, aliases=catalog.aliases)


def examine(catalog: Catalog, info: VersionInfo, number: int, path: Path, golden: GoldenRows | None) -> Found:
    """Do all of `vet` in this process. Raises the errors of `load_version`."""
    info = replace(info, batching="request" if info.model.is_raw else info.model.batching or info.batching)
    settings = tuned(info.tuning)[0]
    runner = load_version(path, info, catalog, number, settings, every_leaf=True, golden=golden)
    said = [missing.warning(catalog, info)]
    if runner.unwarmed:
        said.append(f"no example of it could run ({runner.unwarmed}), so it was not tried; send it a request to try it")
    warnings = [text for text in said if text]
    info = replace(info, forest_differs=runner.forest_differs)
    if info.batching_why is not None:
        return Found(info, warnings)  # examined before: a version's file never changes
    if info.model.is_raw:  # there are no rows to make examples of
        return Found(replace(info, batching_why=WHY_BY_ITSELF), warnings)
    if info.batching == "request":
        return Found(replace(info, batching_why="by its definition"), warnings)
    data, random = path.read_bytes(), np.random.default_rng(0)
    examples = Examples.of(catalog, info, data)
    with suppress(Internal):  # without examples that run, the scan of the graph decides alone
        examples.keep_those_that_run(runner.run, random, runner.exact_rows or 1)
    found = examine_rows(runner, data, lambda rows: examples(rows, random))
    why = found.why
    if found.depends and info.model.batching == "rows":
        why = f"by its definition, though {why}"
    elif found.depends:
        info = replace(info, batching="request")
        load_version(path, info, catalog, number, settings, golden=golden)  # as it will run
    if why:
        log.warning("model '%s' version %d %s: %s", info.model.name, number, BATCHING[info.batching], why)
    return Found(replace(info, batching_why=why), warnings)


def describe_run(path: Path, info: VersionInfo, number: int) -> str:
    """Return how a version runs on this host, and why. Raises InvalidArgument."""
    return open_version(path, info, number, tuned(info.tuning)[0]).description


def with_findings(info: VersionInfo, vetted: VersionInfo) -> VersionInfo:
    """Return `info` with what `vet` found out about the same version's file."""
    return replace(
        info,
        batching=vetted.batching,
        batching_why=vetted.batching_why,
        replacements=vetted.replacements,
        forest_differs=vetted.forest_differs,
        examples_sha256=vetted.examples_sha256,
    )
