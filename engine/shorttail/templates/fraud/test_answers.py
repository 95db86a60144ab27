"""Check that the store, the function and the model together answer what was trained: pytest"""

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
        engine.materialize("merchant")
        yield engine


def test_answers_are_those_of_the_trained_model(engine: st.Engine, model: GradientBoostingClassifier) -> None:
    payments = pd.read_parquet(make_data.DATA / "payments.parquet").head(1_000)
    payments.loc[:9, "user_id"] = 999_999  # unknown: gets the defaults
    expected = model.predict_proba(train.features(payments))
    answers = engine.predict("fraud", payments.drop(columns="fraud"))
    np.testing.assert_allclose(answers.outputs["probabilities"], expected, atol=1e-5)


def test_an_unusual_amount_is_likelier_to_be_fraud(engine: st.Engine) -> None:
    user = {"user_id": [900_001], "account_days": [100], "payments_7d": [3], "avg_amount_30d": [25.0]}
    engine.push("user", user | {"chargebacks": [0]})
    request = {"user_id": 900_001, "merchant_id": "m-017", "amount": [25.0, 400.0], "hour": 14, "distance_km": 3.0}
    usual, unusual = engine.predict("fraud", request).outputs["probabilities"][:, 1]
    assert unusual > usual


def test_the_status_tells_an_unknown_user(engine: st.Engine) -> None:
    request = {"user_id": 999_999, "merchant_id": "m-017", "amount": 25.0, "hour": 14, "distance_km": 3.0}
    answer = engine.predict("fraud", request)
    assert answer.statuses["user"] == [st.Status.NOT_FOUND]
    assert answer.statuses["merchant"] == [st.Status.PRESENT]
