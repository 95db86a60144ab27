import numpy as np

import shorttail as st

user = st.FeatureView(
    "user",
    entity=st.Entity("user", keys={"user_id": st.Int64}),
    source=st.ParquetSource("user.parquet", timestamp="event_time"),
    features=[*(st.Feature(f"u{i}", st.Float32) for i in range(16)), st.Feature("taste", st.Vector(32))],
)
item = st.FeatureView(
    "item",
    entity=st.Entity("item", keys={"item_id": st.Int64}),
    source=st.ParquetSource("item.parquet", timestamp="event_time"),
    features=[*(st.Feature(f"i{i}", st.Float32) for i in range(16)), st.Feature("style", st.Vector(32))],
)


@st.on_demand
def similarity(taste: st.Vector(32), style: st.Vector(32)) -> st.Float32:
    return np.dot(taste, style)


ranking = st.Model(
    "ranking",
    path="model.onnx",
    inputs=[
        similarity("user:taste", "item:style"),
        *(f"user:u{i}" for i in range(16)),
        *(f"item:i{i}" for i in range(16)),
        "item:style",
    ],
    outputs=["probabilities"],
)
