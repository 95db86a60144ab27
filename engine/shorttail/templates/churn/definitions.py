"""What the store holds and what the model reads: `shorttail apply definitions.py --store store` registers it."""

import shorttail as st

# An entity is what features are looked up by: its keys come with each request.
customer = st.Entity("customer", keys={"customer_id": st.Int64})

# A feature view is a table of the store: one row per entity, loaded from a source by `shorttail materialize`.
customer_view = st.FeatureView(
    "customer",
    entity=customer,
    # Of rows with the same key, the one with the latest timestamp is served. With ttl="30d" a row that is older than
    # 30 days would count as missing.
    source=st.ParquetSource("data/customers.parquet", timestamp="as_of"),
    # A default stands in where the store has no row or no value. train.py fills with the same values.
    features=[
        st.Feature("country", st.String),
        st.Feature("tenure_months", st.Int32, default=0),
        st.Feature("contract_months", st.Int32, default=1, description="1, 12 or 24"),
        st.Feature("monthly_charge", st.Float32, default=9.99, description="EUR"),
        st.Feature("autopay", st.Bool, default=False),
        st.Feature("logins_30d", st.Int32, default=0),
        st.Feature("tickets_90d", st.Int32, default=0, description="support tickets"),
        st.Feature("satisfaction", st.Float32, default=3.0, description="last survey, 1 to 5; null for no answer"),
    ],
)

# `inputs` are the columns of the model's matrix, in order: "view:feature" from the store, "request:column" from the
# caller. train.py reads them from here, so that training and serving cannot differ.
churn = st.Model(
    "churn",
    path="churn.onnx",
    outputs=["probabilities"],
    inputs=[
        "customer:tenure_months",
        "customer:contract_months",
        "customer:monthly_charge",
        "customer:autopay",
        "customer:logins_30d",
        "customer:tickets_90d",
        "customer:satisfaction",
    ],
)
