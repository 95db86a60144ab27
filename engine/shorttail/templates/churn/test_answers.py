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
        engine.materialize("customer")
        yield engine


def test_answers_are_those_of_the_trained_model(engine: st.Engine, model: GradientBoostingClassifier) -> None:
    customers = pd.read_parquet(make_data.DATA / "customers.parquet")
    unknown = pd.DataFrame({"customer_id": [999_999]})  # gets the defaults
    customers = pd.concat([customers, unknown], ignore_index=True)
    expected = model.predict_proba(train.features(customers))
    answers = engine.predict("churn", {"customer_id": customers["customer_id"].to_numpy()})
    np.testing.assert_allclose(answers.outputs["probabilities"], expected, atol=1e-5)


def test_a_customer_who_is_not_satisfied_is_likelier_to_leave(engine: st.Engine) -> None:
    rows = {"customer_id": [900_001, 900_002], "satisfaction": [5.0, 1.0], "country": "DE", "tickets_90d": 1}
    rows |= {"tenure_months": 6, "contract_months": 1, "monthly_charge": 19.99, "autopay": True, "logins_30d": 4}
    engine.push("customer", rows)
    happy, unhappy = engine.predict("churn", {"customer_id": [900_001, 900_002]}).outputs["probabilities"][:, 1]
    assert unhappy > happy


def test_the_status_tells_unknown_customers(engine: st.Engine) -> None:
    answer = engine.predict("churn", {"customer_id": [1, 999_999]})
    assert answer.statuses["customer"].tolist() == [st.Status.PRESENT, st.Status.NOT_FOUND]
