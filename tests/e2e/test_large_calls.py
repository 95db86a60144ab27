"""Calls of more than 16,384 rows through both clients, beside a real server: the answers are those of single rows."""

import asyncio

import numpy as np
import pytest
from serving import TIMEOUT_S, make_store

import shorttail as st
from shorttail.config import LIMITS

ROWS = 2 * LIMITS.rows_per_request + 1000
KEYS = np.arange(ROWS, dtype=np.int64)


@pytest.fixture(params=["Client", "AsyncClient"])
def ask(request, start, tmp_path):
    """Return ask(method, ...), which calls that method of a client of a fresh server."""
    address = "{}:{}".format(*start(of=make_store(tmp_path)).address)

    def blocking(method, *arguments, **options):
        with st.Client(address, timeout_s=TIMEOUT_S) as client:
            return getattr(client, method)(*arguments, **options)

    def asynchronous(method, *arguments, **options):
        async def run():
            async with await st.AsyncClient.connect(address, timeout_s=TIMEOUT_S) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(run())

    return blocking if request.param == "Client" else asynchronous


def pushed(keys):
    return {
        "user_id": keys,
        "age": (keys % 100).astype(np.float32),
        "visits": keys * 10,
        "tier": [None if key % 7 == 0 else f"tier {key}" for key in keys.tolist()],
        "taste": np.stack([keys, -keys], 1).astype(np.float32),
    }


def test_large_calls_answer_as_single_rows_do(ask):
    """Every third key has no row."""
    assert ask("delete", "stats", {"user_id": [1, 2, 3]}) == 3
    stored = KEYS[KEYS % 3 > 0]
    assert ask("push", "stats", pushed(stored)) == len(stored)

    prediction = ask("predict", "total", {"user_id": KEYS, "amount": 0.5}, statuses=True)
    assert prediction.version == 1
    has_row = KEYS % 3 > 0
    np.testing.assert_array_equal(prediction.statuses["stats"], np.where(has_row, 0, 2))
    right = (KEYS % 100) + 10.0 * KEYS + 0.5
    np.testing.assert_allclose(prediction.outputs["total"][has_row], right[has_row], rtol=1e-6)
    for key in (0, 1, LIMITS.rows_per_request - 1, LIMITS.rows_per_request, ROWS - 1):
        alone = ask("predict", "total", {"user_id": [key], "amount": 0.5}).outputs["total"]
        np.testing.assert_array_equal(prediction.outputs["total"][key : key + 1], alone)

    references = ["stats:tier", "stats:taste", "stats:visits", "stats:age"]
    found = ask("get_online_features", references, {"user_id": KEYS.tolist()})
    assert found.feature_names == references
    assert list(found.feature_types.values()) == ["String", "Vector(2)", "Int64", "Float32"]
    tiers = [f"tier {key}" if key % 3 and key % 7 else None for key in KEYS.tolist()]
    assert found["stats:tier"].tolist() == tiers
    np.testing.assert_array_equal(found["stats:taste"][has_row], np.stack([KEYS, -KEYS], 1)[has_row])
    np.testing.assert_array_equal(found["stats:visits"][has_row], 10 * KEYS[has_row])
    np.testing.assert_array_equal(found["stats:age"], np.where(has_row, KEYS % 100, 1.5))
    statuses = np.where(has_row, np.where(KEYS % 7 == 0, 1, 0), 2)
    np.testing.assert_array_equal(found.feature_statuses["stats:tier"], statuses)

    assert ask("delete", "stats", {"user_id": KEYS}) == len(stored)
    left = ask("get_online_features", ["stats:age"], {"user_id": KEYS})
    assert set(left.statuses["stats"].tolist()) == {2}


def test_a_wrong_row_of_a_push_says_its_part_and_what_is_written(ask):
    rows = pushed(KEYS)
    rows["visits"] = rows["visits"].astype(object)
    rows["visits"][LIMITS.rows_per_request + 5] = "many"
    with pytest.raises(st.errors.InvalidArgument) as caught:
        ask("push", "stats", rows)
    assert caught.value.message.endswith(
        f"at row 5 (in a part of the call: its row 0 is row {LIMITS.rows_per_request}; the rows before it are pushed)"
    )
    found = ask("get_online_features", ["stats:visits"], {"user_id": KEYS}).feature_statuses["stats:visits"]
    assert (found == 0).sum() == LIMITS.rows_per_request
    assert (found[: LIMITS.rows_per_request] == 0).all()


def test_later_rows_of_equal_keys_win(ask):
    rows = pushed(np.zeros(ROWS, np.int64))
    rows["visits"] = KEYS
    assert ask("push", "stats", rows | {"event_time": 1_700_000_000_000_000}) == ROWS
    assert ask("get_online_features", ["stats:visits"], {"user_id": [0]})["stats:visits"].tolist() == [ROWS - 1]
