"""Define the features of the flights from New York in 2013, and a model: will a flight land over 15 minutes late?"""
# fmt: off

import shorttail as st

plane = st.Entity("plane", keys={"tailnum": st.String})
airport_hour = st.Entity("airport_hour", keys={"origin": st.String, "hour_utc": st.Int64})  # hours since 1970
route = st.Entity("route", keys={"origin": st.String, "dest": st.String})
carrier = st.Entity("carrier", keys={"carrier": st.String})

plane_view = st.FeatureView(
    "plane", entity=plane,
    source=st.ParquetSource("out/plane.parquet"),
    features=[
        st.Feature("year", st.Int32, description="year of manufacture"),
        st.Feature("seats", st.Int32),
        st.Feature("engines", st.Int32),
        st.Feature("jet", st.Bool),
        st.Feature("manufacturer", st.String),
    ],
)

weather_view = st.FeatureView(
    "weather", entity=airport_hour, description="the last observation before that hour",
    source=st.ParquetSource("out/weather.parquet", timestamp="observed"),
    features=[
        st.Feature("temp", st.Float32, description="degrees Fahrenheit"),
        st.Feature("dewp", st.Float32, description="dew point, degrees Fahrenheit"),
        st.Feature("humid", st.Float32, description="relative humidity, percent"),
        st.Feature("wind_dir", st.Float32, description="degrees"),
        st.Feature("wind_speed", st.Float32, description="miles per hour"),
        st.Feature("precip", st.Float32, description="inches"),
        st.Feature("pressure", st.Float32, description="millibars"),
        st.Feature("visib", st.Float32, description="miles"),
    ],
)

route_view = st.FeatureView(
    "route", entity=route, description="over flights that landed on earlier days",
    source=st.ParquetSource("out/route.parquet", timestamp="as_of"),
    features=[
        st.Feature("flights", st.Int64),
        st.Feature("late_share", st.Float32),
        st.Feature("mean_delay", st.Float32, description="minutes"),
    ],
)

carrier_view = st.FeatureView(
    "carrier", entity=carrier, description="over flights that landed on earlier days",
    source=st.ParquetSource("out/carrier.parquet", timestamp="as_of"),
    features=[
        st.Feature("name", st.String),
        st.Feature("late_share", st.Float32),
        st.Feature("mean_delay", st.Float32, description="minutes"),
        st.Feature("late_by_part", st.Vector(4), description="late share by night, morning, afternoon, evening"),
    ],
)

late = st.Model(
    "late", path="out/late.onnx", outputs=["probabilities"],
    inputs=[
        "request:hour", "request:day_of_week", "request:distance",
        "plane:year", "plane:seats", "plane:engines", "plane:jet",
        "weather:temp", "weather:dewp", "weather:humid", "weather:wind_dir", "weather:wind_speed",
        "weather:precip", "weather:pressure", "weather:visib",
        "route:late_share", "route:mean_delay",
        "carrier:late_share", "carrier:mean_delay", "carrier:late_by_part",
    ],
)
