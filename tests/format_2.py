"""Stores of format 2, as earlier versions wrote them: made by the present code, which still builds their pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from shorttail.define import catalog
from shorttail.store import Store


@contextmanager
def tables_of_format_2() -> Iterator[None]:
    """Make all new tables in page format 2 during the `with` block."""
    with mock.patch.object(catalog, "PAGE_FORMAT", 2):
        yield


def make_format_2(path: str | Path) -> None:
    """Make a store of format 2 of one whose tables were all made within tables_of_format_2()."""
    with Store.open(path) as store, store.environment.write() as writer:
        document = json.loads(bytes(writer.get_catalog() or b"{}"))
        for name, entry in document["tables"].items():
            assert entry[5] == 2
            assert document["columns"][name] == list(range(len(document["columns"][name])))
            del entry[3:]
        for each in ("columns", "next_columns", "filling", "coming", "previous", "definitions"):
            del document[each]
        for model in document["models"].values():
            for version in model["versions"].values():
                del version["pins"]
        writer.put_catalog(json.dumps(document, separators=(",", ":")).encode())
        writer.txn.put(b"format", b"2")


def format_of(path: str | Path) -> int:
    """Return the format of a store."""
    with Store.open(path) as store, store.environment.read() as txn:
        return int(bytes(txn.get(b"format")))
