"""The values of an HTTP answer, in the order of a scenario, from where a peer.json says that they are.

"answer": a path into the JSON; "*" takes all elements of a list. "names": with it the path leads to one list a column,
and this is the path of their names, in which `separator` stands for the colon of "view:feature"; other columns (the
keys) are left out. Without it the path leads to the values themselves, or to lists of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def values_of(answer: Any, peer: Mapping[str, Any], inputs: Sequence[str]) -> list[float]:
    """Row after row. Raises KeyError, IndexError or TypeError when the answer is built otherwise."""
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
