"""Train a gradient boosting model on the tables in data/, and write it to ranking.onnx: python train.py"""

import sys
from pathlib import Path

try:
    import numpy as np
    import pandas as pd
    import pyarrow  # noqa: F401  pandas reads Parquet with it
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupShuffleSplit
except ModuleNotFoundError as error:
    install = "pip install 'shorttail[arrow,bench,http,pandas]' scikit-learn skl2onnx"
    sys.exit(f"error: {error.name} is missing; run: {install}")

import make_data
from definitions import item_view, ranking, user_view

HERE = Path(__file__).parent


def features(pairs: pd.DataFrame) -> np.ndarray:
    """Return what the store answers for the model's inputs, in their order: float32 [pairs, columns].

    `pairs` has the columns user_id and item_id. The four elements of `taste` are four columns of the input.
    """
    joined = pairs
    for view in (user_view, item_view):
        rows = pd.read_parquet(make_data.DATA / f"{view.name}s.parquet").set_index(f"{view.name}_id")
        # Columns are named as definitions.py names them. fillna takes no vectors; each user of the data has a taste.
        joined = joined.join(rows.add_prefix(f"{view.name}:"), on=f"{view.name}_id")
        defaults = {f"{view.name}:{f.name}": f.default for f in view.features if isinstance(f.default, int | float)}
        joined = joined.fillna(defaults)
    return np.column_stack([np.stack(joined[column].to_numpy()) for column in ranking.columns]).astype("float32")


def main() -> GradientBoostingClassifier:
    make_data.write()
    shown = pd.read_parquet(make_data.DATA / "shown.parquet")
    x, y = features(shown), shown["clicked"].to_numpy()
    # The users of the test are not among those of the training.
    train, test = next(GroupShuffleSplit(test_size=0.2, random_state=0).split(x, y, groups=shown["user_id"]))

    model = GradientBoostingClassifier(n_estimators=60, max_depth=4, random_state=0)
    model.fit(x[train], y[train])
    auc = roc_auc_score(y[test], model.predict_proba(x[test])[:, 1])
    print(f"{len(train):,} items shown; AUC on {len(test):,} to other users: {auc:.3f}")

    # zipmap=False: the probabilities are a matrix, and not a dict per row.
    onnx = to_onnx(model, x[:1], options={"zipmap": False})
    (HERE / ranking.path).write_bytes(onnx.SerializeToString())
    print(f"wrote {ranking.path}")
    return model


if __name__ == "__main__":
    main()
