import math

import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})

profile = st.FeatureView(
    "profile",
    entity=user,
    source=st.ParquetSource("profile.parquet", timestamp="event_time"),
    features=[st.Feature(f"profile_{i}", st.Float32) for i in range(16)],
)
activity = st.FeatureView(
    "activity",
    entity=user,
    source=st.ParquetSource("activity.parquet", timestamp="event_time"),
    features=[
        st.Feature("avg_amount_30d", st.Float32),
        st.Feature("max_amount_30d", st.Float32),
        *(st.Feature(f"activity_{i}", st.Float32) for i in range(22)),
    ],
)


@st.on_demand
def amount_ratio(amount: st.Float64, average: st.Float64) -> st.Float32:
    return amount / max(average, 0.01)


@st.on_demand
def over_max(amount: st.Float64, largest: st.Float64) -> st.Float32:
    return 1.0 if amount > largest else 0.0


@st.on_demand
def night(hour: st.Float64) -> st.Float32:
    return math.cos(hour * math.pi / 12.0)


fraud = st.Model(
    "fraud",
    path="model.onnx",
    inputs=[
        *(f"profile:profile_{i}" for i in range(16)),
        "activity:avg_amount_30d",
        "activity:max_amount_30d",
        *(f"activity:activity_{i}" for i in range(22)),
        "request:amount",
        amount_ratio("request:amount", "activity:avg_amount_30d"),
        over_max("request:amount", "activity:max_amount_30d"),
        night("request:hour"),
    ],
    outputs=["probabilities"],
)
