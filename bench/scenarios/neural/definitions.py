import shorttail as st

user = st.FeatureView(
    "user",
    entity=st.Entity("user", keys={"user_id": st.Int64}),
    source=st.ParquetSource("user.parquet", timestamp="event_time"),
    features=[st.Feature("taste", st.Vector(64))],
)
item = st.FeatureView(
    "item",
    entity=st.Entity("item", keys={"item_id": st.Int64}),
    source=st.ParquetSource("item.parquet", timestamp="event_time"),
    features=[st.Feature("style", st.Vector(64))],
)

neural = st.Model("neural", path="model.onnx", inputs=["user:taste", "item:style"], outputs=["score"])
