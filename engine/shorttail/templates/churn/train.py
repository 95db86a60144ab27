"""Train a gradient boosting model on the tables in data/, and write it to churn.onnx: python train.py"""

import sys
from pathlib import Path

try:
    import numpy as np
    import pandas as pd
    import pyarrow  # noqa: F401  pandas reads Parquet with it
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    install = "pip install 'shorttail[arrow,bench,http,pandas]' scikit-learn skl2onnx"
    sys.exit(f"error: {error.name} is missing; run: {install}")

import make_data
from definitions import churn, customer_view

HERE = Path(__file__).parent


def features(customers: pd.DataFrame) -> np.ndarray:
    """Return what the store answers for the model's inputs, in their order: float32 [customers, columns]."""
    defaults = {feature.name: feature.default for feature in customer_view.features if feature.default is not None}
    columns = customers.fillna(defaults).add_prefix("customer:")  # named as definitions.py names them
    return columns[churn.columns].to_numpy("float32")


def main() -> GradientBoostingClassifier:
    make_data.write()
    customers = pd.read_parquet(make_data.DATA / "customers.parquet")
    labels = pd.read_parquet(make_data.DATA / "churned.parquet")
    customers = customers.merge(labels, on="customer_id")
    x, y = features(customers), customers["churned"].to_numpy()
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0)

    model = GradientBoostingClassifier(n_estimators=60, max_depth=4, random_state=0)
    model.fit(x_train, y_train)
    auc = roc_auc_score(y_test, model.predict_proba(x_test)[:, 1])
    print(f"{len(x_train):,} customers; AUC on {len(x_test):,} others: {auc:.3f}")

    # zipmap=False: the probabilities are a matrix, and not a dict per row.
    onnx = to_onnx(model, x[:1], options={"zipmap": False})
    (HERE / churn.path).write_bytes(onnx.SerializeToString())
    print(f"wrote {churn.path}")
    return model


if __name__ == "__main__":
    main()
