"""The zygote that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from zygote import Zygote, build_shim


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(build_shim(tmp_path_factory.mktemp("shim"))) as running:
        yield running
