"""Train a gradient boosting model on the tables in data/, and write it to fraud.onnx: python train.py"""

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
    install = "pip install 'shorttail[arrow,bench,http,numba,pandas]' scikit-learn skl2onnx"
    sys.exit(f"error: {error.name} is missing; run: {install}")

import make_data
from definitions import fraud, merchant_view, user_view

HERE = Path(__file__).parent


def features(payments: pd.DataFrame) -> np.ndarray:
    """Return what the store answers for the model's inputs, in their order: float32 [payments, columns]."""
    joined = payments.add_prefix("request:")  # columns are named as definitions.py names them
    for view in (user_view, merchant_view):
        rows = pd.read_parquet(make_data.DATA / f"{view.name}s.parquet").set_index(f"{view.name}_id")
        joined = joined.join(rows.add_prefix(f"{view.name}:"), on=f"request:{view.name}_id")
        defaults = {f"{view.name}:{f.name}": f.default for f in view.features if f.default is not None}
        joined = joined.fillna(defaults)
    ratio = joined["request:amount"] / joined["user:avg_amount_30d"].clip(lower=1)
    columns = [joined[column] if isinstance(column, str) else ratio for column in fraud.columns]
    return np.column_stack(columns).astype("float32")


def main() -> GradientBoostingClassifier:
    make_data.write()
    payments = pd.read_parquet(make_data.DATA / "payments.parquet")
    x, y = features(payments), payments["fraud"].to_numpy()
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0)

    model = GradientBoostingClassifier(n_estimators=60, max_depth=4, random_state=0)
    model.fit(x_train, y_train)
    auc = roc_auc_score(y_test, model.predict_proba(x_test)[:, 1])
    print(f"{len(x_train):,} payments; AUC on {len(x_test):,} others: {auc:.3f}")

    # zipmap=False: the probabilities are a matrix, and not a dict per row.
    onnx = to_onnx(model, x[:1], options={"zipmap": False})
    (HERE / fraud.path).write_bytes(onnx.SerializeToString())
    print(f"wrote {fraud.path}")
    return model


if __name__ == "__main__":
    main()
