"""Read the values of an HTTP answer, in the order of a scenario, from the place that peer.json names.

"answer" is a path into the JSON; "*" takes all elements of a list. Without "names" the path leads to the values, or to
lists of values. With "names" it leads to one list per column, and "names" is the path of the names of the columns. In
these names, `separator` replaces the colon of "view:feature". Other columns (the keys) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def values_of(answer: Any, peer: Mapping[str, Any], inputs: Sequence[str]) -> list[float]:
    """Return the values row by row. Raises KeyError, IndexError or TypeError if the answer has another structure."""
    found = follow(answer, peer["answer"])
    if "names" not in peer:
        return list(flat(found))
    columns = dict(zip(follow(answer, peer["names"]), found, strict=True))
    ordered = [columns[reference.replace(":", peer["separator"])] for reference in inputs]
    return [value for row in zip(*ordered, strict=True) for value in row]


def follow(answer: Any, path: Sequence[str | int]) -> Any:
    for i, step in enumerate(path):
        if step == "*":
            return [follow(part, path[i + 1 :]) for part in answer]
        answer = answer[step]
    return answer


def flat(values: Any) -> Iterator[float]:
    if isinstance(values, list):
        for value in values:
            yield from flat(value)
    else:
        yield values
