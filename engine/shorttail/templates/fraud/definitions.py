"""What the store holds and what the model reads: `shorttail apply definitions.py --store store` registers it."""

import shorttail as st

# An entity is what features are looked up by: its keys come with each request.
user = st.Entity("user", keys={"user_id": st.Int64})
merchant = st.Entity("merchant", keys={"merchant_id": st.String})

# A feature view is a table of the store: one row per entity, loaded from a source by `shorttail materialize`.
# Of rows with the same key, the one with the latest timestamp is served. With ttl="2d" a row that is older than two
# days would count as missing. A default stands in where the store has no row or no value; train.py fills with the same.
user_view = st.FeatureView(
    "user",
    entity=user,
    source=st.ParquetSource("data/users.parquet", timestamp="as_of"),
    features=[
        st.Feature("account_days", st.Int32, default=0, description="age of the account"),
        st.Feature("payments_7d", st.Int32, default=0),
        st.Feature("avg_amount_30d", st.Float32, default=30.0, description="EUR; null for no payment in 30 days"),
        st.Feature("chargebacks", st.Int32, default=0),
    ],
)

merchant_view = st.FeatureView(
    "merchant",
    entity=merchant,
    source=st.ParquetSource("data/merchants.parquet", timestamp="as_of"),
    features=[
        st.Feature("category", st.String),
        st.Feature("payments_7d", st.Int32, default=0),
        st.Feature("fraud_share_90d", st.Float32, default=0.02, description="share of payments that were fraud"),
    ],
)


# A feature that depends on the request cannot be stored. This function is compiled, and runs over the whole batch
# between the lookup and the model.
@st.on_demand
def amount_ratio(amount: st.Float64, average: st.Float64) -> st.Float32:
    return amount / max(average, 1.0)


# `inputs` are the columns of the model's matrix, in order: "view:feature" from the store, "request:column" from the
# caller, or a function of these. train.py reads them from here, so that training and serving cannot differ.
fraud = st.Model(
    "fraud",
    path="fraud.onnx",
    outputs=["probabilities"],
    inputs=[
        "request:amount",
        "request:hour",
        "request:distance_km",
        "user:account_days",
        "user:payments_7d",
        "user:avg_amount_30d",
        "user:chargebacks",
        "merchant:payments_7d",
        "merchant:fraud_share_90d",
        amount_ratio("request:amount", "user:avg_amount_30d"),
    ],
)
