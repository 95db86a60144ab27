"""Checks that answers under load are right: sends sampled requests again, one at a time, and compares the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shorttail import protocol
from shorttail.client import Client, calls
from shorttail.errors import ShorttailError


class Verified(NamedTuple):
    """compared: number of compared answers. different: how many of them differ. example: the first, in one line."""

    compared: int
    different: int
    example: str


def verify(address: str, pairs: Sequence[tuple[bytes, bytes]], timeout_s: float) -> Verified:
    """Send requests again through the Python client and compare. pairs: (request, reply) bytes; pushes are skipped."""
    compared = different = 0
    example = ""
    with Client(address, timeout_s=timeout_s) as client:
        for request, reply in pairs:
            method, params = unpack(request)[2:]
            if method == "push":
                continue
            before = values_of(method, params, unpack(reply)[3])
            try:
                after = ask(client, method, params)
            except ShorttailError as error:
                after = {"error": np.array([f"{error.code}: {error.message}"], object)}
            compared += 1
            if problem := difference(before, after):
                different += 1
                example = example or f"{method} {params[0]}: {problem}"
    return Verified(compared, different, example)


def unpack(message: bytes) -> list[Any]:
    unpacker = protocol.new_unpacker()
    unpacker.feed(message)
    return list(unpacker.unpack())


def values_of(method: str, params: Sequence[Any], result: Any) -> dict[str, Any]:
    if method == "predict":
        return dict(calls.read_prediction(params[0], result).outputs)
    found = calls.read_features(result)
    return dict(zip(result["feature_names"], [np.asarray(v) for v in found.to_dict().values()], strict=True))


def ask(client: Client, method: str, params: Sequence[Any]) -> dict[str, Any]:
    if method == "predict":
        return dict(client.predict(params[0], params[1]).outputs)
    found = client.get_online_features(params[0], params[1])
    return {name: np.asarray(values) for name, values in found.to_dict().items()}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the first difference in a few words, "" if there is none."""
    if list(before) != list(after):
        return f"{list(before)} under load, {list(after)} afterwards"
    for name, values in before.items():
        first, second = np.asarray(values), np.asarray(after[name])
        same = first.shape == second.shape and (
            np.array_equal(first, second, equal_nan=True)
            if first.dtype.kind == "f" and second.dtype.kind == "f"
            else first.tolist() == second.tolist()
        )
        if not same:
            return f"'{name}' was {first.ravel()[:4].tolist()} under load, {second.ravel()[:4].tolist()} afterwards"
    return ""
