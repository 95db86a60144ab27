"""What the store holds: `shorttail apply definitions.py --store store` registers it."""

import shorttail as st

# An entity is what features are looked up by: its keys come with each request.
user = st.Entity("user", keys={"user_id": st.Int64})

# A feature view is a table of the store: one row per entity, loaded from a source by `shorttail materialize`.
user_view = st.FeatureView(
    "user",
    entity=user,
    source=st.ParquetSource("data/users.parquet", timestamp="as_of"),
    features=[
        st.Feature("visits_30d", st.Int64),
        st.Feature("country", st.String),
    ],
)

# A model is an ONNX file and the columns that feed it:
# st.Model("name", path="model.onnx", inputs=["user:visits_30d", "request:amount"])
