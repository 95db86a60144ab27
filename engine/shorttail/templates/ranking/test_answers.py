"""Check that the store and the model together answer what was trained: pytest"""

from collections.abc import Iterator
from pathlib import Path

import make_data
import numpy as np
import pandas as pd
import pytest
import train
from sklearn.ensemble import GradientBoostingClassifier

import shorttail as st

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model() -> GradientBoostingClassifier:
    return train.main()


@pytest.fixture(scope="module")
def engine(model: GradientBoostingClassifier, tmp_path_factory: pytest.TempPathFactory) -> Iterator[st.Engine]:
    """The engine of `shorttail serve` inside this process, on a store of its own."""
    with st.Engine.open(tmp_path_factory.mktemp("test") / "store", create=True) as engine:
        engine.apply(HERE / "definitions.py")
        engine.materialize("user")
        engine.materialize("item")
        yield engine


def test_answers_are_those_of_the_trained_model(engine: st.Engine, model: GradientBoostingClassifier) -> None:
    candidates = np.append(np.arange(1, 500), 999_999)  # the last is unknown, and gets the defaults
    pairs = pd.DataFrame({"user_id": 42, "item_id": candidates})
    expected = model.predict_proba(train.features(pairs))
    answers = engine.predict("ranking", {"user_id": 42, "item_id": candidates})  # one user, 500 items
    np.testing.assert_allclose(answers.outputs["probabilities"], expected, atol=1e-5)


def test_users_get_what_they_like(engine: st.Engine) -> None:
    taste = np.eye(4, dtype="float32")
    engine.push("user", {"user_id": np.arange(4) + 900_001, "visits_30d": 5, "avg_price": 20.0, "taste": list(taste)})
    items = pd.read_parquet(make_data.DATA / "items.parquet")
    for category in range(4):
        answer = engine.predict("ranking", {"user_id": 900_001 + category, "item_id": items["item_id"].to_numpy()})
        clicks = answer.outputs["probabilities"][:, 1]
        liked = items["category"] == category
        assert clicks[liked].mean() > clicks[~liked].mean()


def test_the_status_tells_unknown_items(engine: st.Engine) -> None:
    answer = engine.predict("ranking", {"user_id": 42, "item_id": [1, 999_999]})
    assert answer.statuses["item"].tolist() == [st.Status.PRESENT, st.Status.NOT_FOUND]
