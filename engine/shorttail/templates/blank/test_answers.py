"""Check that the store answers what is in the data: pytest"""

from collections.abc import Iterator
from pathlib import Path

import make_data
import pyarrow.parquet as pq
import pytest

import shorttail as st

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[st.Engine]:
    """The engine of `shorttail serve` inside this process, on a store of its own."""
    make_data.write()
    with st.Engine.open(tmp_path_factory.mktemp("test") / "store", create=True) as engine:
        engine.apply(HERE / "definitions.py")
        engine.materialize("user")
        yield engine


def test_answers_are_the_rows_of_the_file(engine: st.Engine) -> None:
    users = pq.read_table(make_data.DATA / "users.parquet").to_pydict()
    answer = engine.get_online_features(["user:visits_30d", "user:country"], {"user_id": users["user_id"]})
    assert answer.to_dict() == {"user:visits_30d": users["visits_30d"], "user:country": users["country"]}


def test_an_unknown_user_is_not_found(engine: st.Engine) -> None:
    answer = engine.get_online_features(["user:country"], {"user_id": 999_999})
    assert answer.to_dict() == {"user:country": [None]}
    assert answer.statuses["user"] == [st.Status.NOT_FOUND]
