"""What the store holds and what the model reads: `shorttail apply definitions.py --store store` registers it."""

import shorttail as st

# An entity is what features are looked up by: its keys come with each request.
user = st.Entity("user", keys={"user_id": st.Int64})
item = st.Entity("item", keys={"item_id": st.Int64})

# A feature view is a table of the store: one row per entity, loaded from a source by `shorttail materialize`.
# Of rows with the same key, the one with the latest timestamp is served. With ttl="2d" a row that is older than two
# days would count as missing. A default stands in where the store has no row or no value; train.py fills with the same.
user_view = st.FeatureView(
    "user",
    entity=user,
    source=st.ParquetSource("data/users.parquet", timestamp="as_of"),
    features=[
        st.Feature("visits_30d", st.Int32, default=0),
        st.Feature("avg_price", st.Float32, default=20.0, description="EUR; null for who bought nothing"),
        st.Feature("taste", st.Vector(4), default=[0.25] * 4, description="clicks on books, games, music, sports"),
    ],
)

item_view = st.FeatureView(
    "item",
    entity=item,
    source=st.ParquetSource("data/items.parquet", timestamp="as_of"),
    features=[
        st.Feature("title", st.String),
        st.Feature("category", st.Int32, default=0, description="0 books, 1 games, 2 music, 3 sports"),
        st.Feature("price", st.Float32, default=20.0, description="EUR"),
        st.Feature("days_online", st.Int32, default=0),
        st.Feature("click_rate_7d", st.Float32, default=0.05),
    ],
)

# `inputs` are the columns of the model's matrix, in order: "view:feature" from the store, "request:column" from the
# caller; a vector fills a column per element. train.py reads them from here, so that training and serving cannot
# differ. A request names one user and many items: the user's row is used for all of them.
ranking = st.Model(
    "ranking",
    path="ranking.onnx",
    outputs=["probabilities"],
    inputs=[
        "user:visits_30d",
        "user:avg_price",
        "user:taste",
        "item:category",
        "item:price",
        "item:days_online",
        "item:click_rate_7d",
    ],
)
