"""Whether the on-demand functions of a store may run in this process, and which of them have run here before.

A function in a store is Python source, which is executed to compile it. So whoever can write a store can run code as
the user who opens it. A function that this user has not run on this machine is announced before it is executed: a file
in the cache of compiled functions, which no other user can write, says which are known. `code=False` (--no-code)
executes none of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable

from shorttail.define.models import Model
from shorttail.define.ondemand import OnDemand, OnDemandFeature
from shorttail.errors import Unavailable
from shorttail.ondemand import codecache

log = logging.getLogger(__name__)

_known: set[OnDemand] = set()  # those that this process has looked up


def functions_of(model: Model) -> list[OnDemand]:
    """Return the on-demand functions that feed a model, in order."""
    features = [part for column in model.columns if isinstance(column, OnDemandFeature) for part in column.walk()]
    return list(dict.fromkeys(feature.function for feature in features))


def check_code(model: Model, allowed: bool) -> None:
    """Announce in one line the functions of a model that have not run here before.

    Raises Unavailable if the model has functions and they are not allowed to run.
    """
    functions = functions_of(model)
    if functions and not allowed:
        raise Unavailable(
            f"model '{model.name}' needs the on-demand functions of the store ({listed(functions)}), and the store was"
            " opened without code (--no-code, code=False)"
        )
    if new := note_known(functions):
        log.warning(
            "model '%s': the store holds Python code that has not run here before, and runs now: on-demand functions %s"
            " (--no-code, or code=False, runs none)",
            model.name,
            listed(new),
        )


def note_known(functions: Iterable[OnDemand]) -> list[OnDemand]:
    """Note that this user runs these functions. Returns those that were not known."""
    new = [function for function in functions if function not in _known]
    _known.update(new)
    return [function for function in new if codecache.note(digest(function))]


def digest(function: OnDemand) -> str:
    return hashlib.sha256(json.dumps(function.to_json()).encode()).hexdigest()


def listed(functions: Iterable[OnDemand]) -> str:
    return ", ".join(function.name for function in functions)
