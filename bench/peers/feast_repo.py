"""Make a Feast repository of a scenario, with a filled online store, for both Feast peers.

The configuration is the best according to Feast's documentation: the registry is a file that stays in memory for ever
(cache_ttl_seconds 0), the feature service is resolved once, no TTL is checked, metrics and feature logs are off. 0.67
has no usage telemetry.

With `precompute_online=True`, a FeatureService keeps one serialized vector of all its features per entity, and
get_online_features reads it instead of the fields of each view. Feast fills these vectors only from Redis
(`feast precompute` has to list the entities). For SQLite this module writes them, with the method of the online store
that Feast itself uses, OnlineStore.write_precomputed_vector.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import redis
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.online_stores.online_store import OnlineStore
from feast.types import Bytes, Float32
from lookups import Scenario

SERVICE: Final = "scenario"
VARIANTS: Final = ("redis", "redis-precomputed", "sqlite", "sqlite-precomputed")
CHUNK: Final = 1000  # rows per write; Feast makes a protobuf object of each value


def configuration(project: str, folder: Path, variant: str, redis_url: str) -> dict[str, Any]:
    """Return the settings for the repository's feature_store.yaml."""
    online: dict[str, Any] = {"type": "sqlite", "path": str(folder / "online.db")}
    if variant.startswith("redis"):
        found = urlsplit(redis_url)
        online = {"type": "redis", "connection_string": f"{found.hostname}:{found.port or 6379}", "skip_dedup": True}
    return {
        "project": project,
        "provider": "local",
        "registry": {"registry_type": "file", "path": str(folder / "registry.db"), "cache_ttl_seconds": 0},
        "online_store": online,
        "offline_store": {"type": "file"},
        "entity_key_serialization_version": 3,
    }


def make(scenario: Scenario, variant: str, redis_url: str) -> tuple[FeatureStore, Path]:
    """Make a repository with a filled online store, and return its folder, which is beside the scenario's folder.

    Scenarios that differ only in the rows per request share one repository, because filling it takes minutes. In Redis,
    the data of another scenario belong to another project, so they are not read and make no hash larger.
    """
    project = f"bench_{digest(scenario)}_{variant}".replace("-", "_")
    folder = scenario.folder.absolute().parent / ".feast" / project
    folder.mkdir(parents=True, exist_ok=True)
    settings = configuration(project, folder, variant, redis_url)
    (folder / "feature_store.yaml").write_text(json.dumps(settings))  # JSON is valid YAML
    store = FeatureStore(config=RepoConfig(repo_path=folder, **settings))
    entity = Entity(name="entity", join_keys=[scenario.key], value_type=ValueType.INT64)
    views = [
        FeatureView(
            name=view.name,
            entities=[entity],
            schema=[Field(name=feature, dtype=Float32) for feature in view.features],
            source=FileSource(path=str(scenario.folder / f"{view.name}.parquet"), timestamp_field="event_time"),
            online=True,
        )
        for view in scenario.views
    ]
    service = FeatureService(name=SERVICE, features=views, precompute_online=variant.endswith("-precomputed"))
    store.apply([entity, *views, service])
    filled = Filled(variant, folder, project, redis_url)
    if not filled:
        fill(store, scenario)
        if service.precompute_online and variant.startswith("redis"):
            store.precompute_feature_service(SERVICE)
        elif service.precompute_online:
            precompute_elsewhere(store, scenario)
        filled.set()
    return store, folder


def digest(scenario: Scenario) -> str:
    found = hashlib.sha256()
    for view in scenario.views:
        found.update(f"{view.name}:{','.join(view.features)};".encode())
        found.update(view.keys.tobytes())
        found.update(view.rows.tobytes())
    return found.hexdigest()[:12]


class Filled:
    """Records that a project's online store is filled: as a key in Redis, which may be a new server, or as a file."""

    def __init__(self, variant: str, folder: Path, project: str, redis_url: str):
        self._file = folder / "filled"
        self._key = f"filled:{project}"
        self._redis = redis.Redis.from_url(redis_url) if variant.startswith("redis") else None

    def __bool__(self) -> bool:
        return bool(self._redis.exists(self._key)) if self._redis is not None else self._file.exists()

    def set(self) -> None:
        if self._redis is not None:
            self._redis.set(self._key, 1)
        else:
            self._file.touch()


def fill(store: FeatureStore, scenario: Scenario) -> None:
    now = pd.Timestamp.now(tz="UTC")
    for view in scenario.views:
        frame = pd.DataFrame(view.rows, columns=view.features)
        frame.insert(0, scenario.key, view.keys)
        frame["event_time"] = now
        for start in range(0, len(frame), CHUNK):
            store.write_to_online_store(view.name, df=frame.iloc[start : start + CHUNK])


def precompute_elsewhere(store: FeatureStore, scenario: Scenario) -> None:
    """Write the vectors that FeatureStore.precompute_feature_service would write if the store could list entities."""
    from feast.protos.feast.core.PrecomputedFeatureVector_pb2 import PrecomputedFeatureVector
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    online: OnlineStore = store._get_provider().online_store
    table = FeatureView(
        name=f"__precomputed__{SERVICE}", entities=[], schema=[Field(name="vector", dtype=Bytes)], source=None
    )
    online.update(store.config, [], [table], [], [], partial=True)
    names = [f"{view.name}__{feature}" for view in scenario.views for feature in view.features]
    rows = {view.name: dict(zip(view.keys.tolist(), view.rows.tolist(), strict=True)) for view in scenario.views}
    for key in scenario.views[0].keys.tolist():
        values = [Value(float_val=value) for view in scenario.views for value in rows[view.name][key]]
        vector = PrecomputedFeatureVector(feature_names=names, values=values)
        vector.precomputed_at.GetCurrentTime()
        entity_key = EntityKey(join_keys=[scenario.key], entity_values=[Value(int64_val=key)])
        online.write_precomputed_vector(store.config, SERVICE, store.project, entity_key, vector.SerializeToString())


def matrix(answer: dict[str, list[float]], scenario: Scenario) -> np.ndarray:
    """Convert OnlineResponse.to_dict() with full names to float32 [rows, inputs]."""
    names = [reference.replace(":", "__") for reference in scenario.inputs]
    return np.column_stack([np.array(answer[name], np.float32) for name in names])
