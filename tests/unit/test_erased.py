"""delete-entity: the rows of keys are deleted in every view of an entity, and their events do not come back."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import shorttail as st
from shorttail._native.pages import secret_hashes
from shorttail.config import LIMITS
from shorttail.define import clock
from shorttail.errors import Internal, InvalidArgument, NotFound
from shorttail.registry.history import line
from shorttail.store import Store, Upsert
from shorttail.store.backup import backup
from shorttail.store.erased import Erased, secret_of
from shorttail.store.table import UNTIMED, ColumnBatch
from shorttail.store.verify import verify

USER = st.Entity("user", keys={"user_id": st.Int64})
SEAT = st.Entity("seat", keys={"plane": st.String, "number": st.Int64})
SEAT_TURNED = st.Entity("seat", keys={"number": st.Int64, "plane": st.String})
SITE = st.Entity("site", keys={})
VIEWS = [
    st.FeatureView("age", entity=USER, features=[st.Feature("years", st.Int64), st.Feature("note", st.String)]),
    st.FeatureView("tier", entity=USER, features=[st.Feature("name", st.String)]),
    st.FeatureView("price", entity=SEAT, features=[st.Feature("usd", st.Float32)]),
    st.FeatureView("row", entity=SEAT_TURNED, features=[st.Feature("letter", st.String)]),
    st.FeatureView("rates", entity=SITE, features=[st.Feature("usd", st.Float32)]),
]
LONG_AGO = 1_600_000_000_000_000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True, by="alice") as engine:
        for definitions in ([*VIEWS[:3], USER.alias("buyer", user_id="buyer_id")], VIEWS[3:]):
            engine.apply(definitions)
        engine.push("age", ages([1, 2, 3, 4]))
        engine.push("tier", {"user_id": [2, 3, 4, 5], "name": ["b", "c", "d", "e"]})
        yield engine


def ages(users: list[int], event_time_us: int | list[int] | None = None) -> dict[str, Any]:
    times = {} if event_time_us is None else {"event_time": event_time_us}
    return {"user_id": users, "years": [10 * user for user in users], "note": [f"n{u}" for u in users], **times}


def users(engine: st.Engine, view: str = "age") -> list[int]:
    return sorted(engine.views[view].to_pandas()["user_id"].tolist())


# -- what is deleted ---------------------------------------------------------------------------------------------------


def test_rows_go_from_every_view_in_one_commit_with_a_receipt(engine: st.Engine) -> None:
    before_us = clock.now_us()
    with engine.store.environment.read() as txn:
        commits = engine.store.environment.sequence(txn)
    receipt = engine.delete_entity("user", {"user_id": [3, 4, 77]})
    assert (users(engine), users(engine, "tier")) == ([1, 2], [2, 5])
    assert (receipt.entity, receipt.keys, receipt.rows) == ("user", 3, {"age": 2, "tier": 2})
    assert before_us <= receipt.time_us <= clock.now_us()
    with engine.store.environment.read() as txn:
        assert receipt.commit == engine.store.environment.sequence(txn) == commits + 1
    last = engine.history()[-1]
    assert (receipt.event, last.who, line(last)) == (last.number, "alice", "deleted entity user: 3 keys, 4 rows")
    assert [event.number for event in engine.history("user")] == [last.number]
    assert last.detail == {"keys": 3, "rows": 4, "views": receipt.rows, "hashes": receipt.hashes}  # and no key
    assert verify(engine.store.path).ok


def test_a_deletion_of_what_is_not_there_is_a_commit_and_keeps_the_keys_away(engine: st.Engine) -> None:
    receipt = engine.delete_entity("user", {"user_id": 99})
    assert receipt.rows == {"age": 0, "tier": 0}
    assert engine.load("age", ages([1, 99], LONG_AGO)).older == 1
    with Store.open(engine.store.path) as other, other.environment.read() as txn:
        assert other.environment.sequence(txn) >= receipt.commit


def test_composite_keys_are_the_same_whatever_their_order_in_a_view(engine: st.Engine) -> None:
    seats = {"plane": ["a", "a", "b"], "number": [1, 2, 1]}
    engine.push("price", {**seats, "usd": [1.0, 2.0, 3.0]})
    engine.push("row", {**seats, "letter": ["x", "y", "z"]})
    assert engine.delete_entity("seat", {"plane": "a", "number": [1, 2]}).rows == {"price": 2, "row": 2}
    for view, column, value in (("price", "usd", 1.0), ("row", "letter", "x")):
        count = engine.push(view, {**seats, column: [value] * 3, "event_time": LONG_AGO})
        assert (count.older, int(count)) == (3, 0)  # two are erased; that of plane b is older than the stored row
        assert engine.load(view, {**seats, column: [value] * 3, "event_time": LONG_AGO}).older == 2
        assert engine.views[view].to_pandas()["plane"].tolist() == ["b"]


def test_the_row_of_an_entity_without_keys(engine: st.Engine) -> None:
    engine.push("rates", {"usd": 1.0})
    receipt = engine.delete_entity("site", {})
    assert (receipt.keys, receipt.rows) == (1, {"rates": 1})
    assert engine.push("rates", {"usd": 2.0, "event_time": receipt.time_us}).older == 1
    assert engine.views["rates"].to_pandas().empty
    assert engine.push("rates", {"usd": 3.0, "event_time": receipt.time_us + 1}) == 1


@pytest.mark.parametrize(
    ("entity", "keys", "error", "said"),
    [
        ("usr", {"user_id": 1}, NotFound, "no entity 'usr'; did you mean 'user'?"),
        ("buyer", {"buyer_id": 1}, NotFound, "no entity 'buyer': it is an alias of entity 'user'"),
        ("user", {}, InvalidArgument, "entity 'user': key column 'user_id' is missing; keys: user_id"),
        ("user", {"user_id": 1, "x": 2}, InvalidArgument, "entity 'user' has no key 'x'; keys: user_id"),
        ("user", {"user_id": "a"}, InvalidArgument, "entity 'user': key 'user_id' takes Int64; got 'a'"),
        ("user", {"user_id": [1, None]}, InvalidArgument, "entity 'user': key 'user_id' is null at row 1"),
        ("user", {"user_id": []}, InvalidArgument, "entity 'user': no rows; send at least one"),
        ("seat", {"plane": ["a", "b"], "number": [1, 2, 3]}, InvalidArgument, "has 2 values where others have 3"),
        ("site", {"user_id": 1}, InvalidArgument, "entity 'site' has no key 'user_id'; keys: none"),
        ("user", {"user_id": list(range(40_000))}, InvalidArgument, "40,000 keys; give at most 32,768 at once"),
    ],
)
def test_bad_input_deletes_nothing(
    engine: st.Engine, entity: str, keys: dict[str, Any], error: type[Exception], said: str
) -> None:
    engine.push("rates", {"usd": 1.0})
    events = len(engine.history())
    with pytest.raises(error, match=re.escape(said)):
        engine.delete_entity(entity, keys)
    assert (users(engine), len(engine.history())) == ([1, 2, 3, 4], events)


def test_an_entity_without_views_and_a_view_of_an_older_entity(engine: st.Engine) -> None:
    engine.apply([st.Entity("shop", keys={"shop_id": st.Int64})])
    with pytest.raises(InvalidArgument, match="entity 'shop' has no feature views"):
        engine.delete_entity("shop", {"shop_id": 1})
    changed = st.Entity("seat", keys={"code": st.String})
    engine.apply([st.FeatureView("legroom", entity=changed, features=[st.Feature("cm", st.Float32)])])
    with pytest.raises(
        InvalidArgument, match="'price' has the keys of an older entity 'seat' \\(plane, number\\); apply"
    ):
        engine.delete_entity("seat", {"code": "a"})
    assert users(engine) == [1, 2, 3, 4]


def test_a_damaged_table_deletes_nothing_elsewhere(engine: st.Engine) -> None:
    table = engine.store.catalog.tables["tier"]
    with engine.store.environment.write() as writer:
        key, page = writer.find_bucket(table.id, bytes(8))
        assert page is not None
        damaged = bytearray(page)
        damaged[40] ^= 1
        writer.put_page(table.id, key, bytes(damaged))
    with pytest.raises(Internal, match="the table of view 'tier' is damaged"):
        engine.delete_entity("user", {"user_id": 3})
    assert users(engine) == [1, 2, 3, 4]
    assert engine.history()[-1].action == "applied"


# -- what does not come back -------------------------------------------------------------------------------------------


def test_events_up_to_the_deletion_do_not_come_back(engine: st.Engine) -> None:
    then_us = engine.delete_entity("user", {"user_id": [3, 4]}).time_us
    count = engine.push("age", ages([1, 3, 4, 5], [LONG_AGO, then_us, LONG_AGO, LONG_AGO]))
    assert (count.given, count.older, int(count)) == (4, 3, 1)  # the row of user 1 is older than the stored one
    assert users(engine) == [1, 2, 5]
    count = engine.load("age", ages([1, 3, 3, 4, 5], [LONG_AGO, LONG_AGO, then_us, then_us + 1, LONG_AGO]))
    assert (count.given, count.older, count.duplicate, int(count)) == (5, 2, 0, 3)
    assert users(engine) == [1, 4, 5]
    assert engine.history()[-1].detail == {"rows": 3, "given": 5, "older": 2, "duplicate": 0}
    engine.push("age", ages([3]))  # its event is of now
    assert users(engine) == [1, 3, 4, 5]


def test_a_push_of_only_erased_rows_writes_nothing(engine: st.Engine) -> None:
    then_us = engine.delete_entity("user", {"user_id": [3, 4]}).time_us
    count = engine.push("age", ages([3, 4], then_us))
    assert (count.given, count.older, count.duplicate, int(count)) == (2, 2, 0, 0)
    assert users(engine) == [1, 2]


def test_partial_pushes_and_pushes_that_are_joined_keep_their_counts(engine: st.Engine) -> None:
    then_us = engine.delete_entity("user", {"user_id": 3}).time_us
    count = engine.push("age", {"user_id": [3, 6], "years": [1, 2], "event_time": then_us}, partial=True)
    assert (count.given, count.older) == (2, 1)

    def rows(keys: list[int], time_us: int) -> Upsert:
        n = len(keys)
        features = [(np.arange(n), None), (np.array(["x"] * n, object), None)]
        return Upsert("age", ColumnBatch([np.array(keys, np.int64)], np.full(n, time_us), features))

    edits = [
        rows([3], then_us),
        rows([3, 7], then_us),
        rows([8, 3, 8], then_us + 5),
        rows([], then_us),
        rows([3], UNTIMED),
    ]
    counts = engine.store.commit(edits)
    assert [(c.given, c.older, c.duplicate) for c in counts] == [(1, 1, 0), (2, 1, 0), (3, 0, 1), (0, 0, 0), (1, 0, 0)]
    assert users(engine) == [1, 2, 3, 4, 6, 7, 8]


def test_a_deletion_between_encoding_and_commit_is_seen(engine: st.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, deleted = Store._encode, []

    def encode_and_delete(store: Store, *given: Any) -> Any:
        tables = encode(store, *given)
        if not deleted:
            deleted.append(engine.delete_entity("user", {"user_id": 9}))
        return tables

    monkeypatch.setattr(Store, "_encode", encode_and_delete)
    assert engine.push("age", ages([9], LONG_AGO)).older == 1
    assert users(engine) == [1, 2, 3, 4]


def test_a_deletion_while_a_view_is_loaded_is_not_undone(engine: st.Engine) -> None:
    """The deletion also waits for the new table, and for the table that a rollback would return to."""
    import pyarrow as pa

    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict(ages([1, 2, 3]))
        engine.delete_entity("user", {"user_id": 3})
        yield pa.RecordBatch.from_pydict(ages([4]))

    engine.load("age", pa.RecordBatchReader.from_batches(pa.RecordBatch.from_pydict(ages([1])).schema, batches()))
    assert users(engine) == [1, 2, 4]
    engine.delete_entity("user", {"user_id": 2})
    assert users(engine) == [1, 4]
    engine.store.rollback("age")
    assert {2, 3}.isdisjoint(users(engine))
    assert verify(engine.store.path).ok


def test_a_load_without_erased_rows_may_shrink(engine: st.Engine) -> None:
    engine.delete_entity("user", {"user_id": [1, 2, 3, 4]})
    assert engine.load("age", ages([1, 2, 3, 4], LONG_AGO)) == 0
    engine.push("age", ages([7]))
    with pytest.raises(InvalidArgument, match="the load has 0 rows, and 1 are served"):
        engine.load("age", ages([1, 2, 3, 4], LONG_AGO))


def test_the_list_belongs_to_one_entity_and_survives_the_process(engine: st.Engine) -> None:
    engine.apply([st.FeatureView("items", entity=st.Entity("item", {"item_id": st.Int64}), features=VIEWS[0].features)])
    engine.delete_entity("user", {"user_id": 3})
    engine.push("items", {"item_id": [3], "years": [1], "note": ["x"], "event_time": LONG_AGO})
    assert len(engine.views["items"].to_pandas()) == 1
    with st.Engine.open(engine.store.path) as other:
        assert other.push("age", ages([3], LONG_AGO)).older == 1


def test_a_later_deletion_counts_and_an_earlier_one_stays(engine: st.Engine) -> None:
    first_us = engine.delete_entity("user", {"user_id": 3}).time_us
    engine.push("age", ages([3]))
    then_us = engine.delete_entity("user", {"user_id": 3}).time_us
    assert then_us > first_us
    assert engine.push("age", ages([3], then_us)).older == 1
    assert engine.push("age", ages([3], then_us + 1)) == 1


# -- backups -----------------------------------------------------------------------------------------------------------


def test_a_receipt_names_the_backups_and_a_backup_holds_the_list(engine: st.Engine, tmp_path: Path) -> None:
    done = backup(engine.store, tmp_path / "before")
    assert done.unnoted == ""
    engine.delete_entity("user", {"user_id": 1})
    backup(engine.store.path, tmp_path / "between", by="nightly")
    receipt = engine.delete_entity("user", {"user_id": 3})
    assert [(b["path"], b["commit"]) for b in receipt.to_dict()["backups"]] == [
        (str(tmp_path / "before"), done.commit),
        (str(tmp_path / "between"), receipt.commit - 1),
    ]
    assert [event.who for event in receipt.backups] == ["alice", "nightly"]
    with st.Engine.open(tmp_path / "between") as restored:
        assert restored.push("age", ages([1, 3], LONG_AGO)).older == 2  # erased, and older than the stored row
        assert users(restored) == [2, 3, 4]
    assert verify(tmp_path / "between").ok


def test_a_backup_that_cannot_be_noted_is_made(
    engine: st.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise st.ResourceExhausted("the disk is full")

    monkeypatch.setattr("shorttail.store.history.append", full)
    result = commands.run("backup", str(tmp_path / "copy"), "--store", engine.store.path)
    assert result.code == 0
    assert result.err.endswith("does not tell of this backup: the disk is full\n")
    assert verify(tmp_path / "copy").ok


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_receipt(engine: st.Engine, tmp_path: Path) -> None:
    store = ("--store", engine.store.path)
    commands.run_well("backup", str(tmp_path / "copy"), *store)
    result = commands.run_well("delete-entity", "user", "user_id=3,4", *store, "--by", "dpo")
    first, *rows, note, kept = result.out.splitlines()
    assert first.startswith("user: 2 keys erased at 20")
    assert rows == ["  age   2 rows removed", "  tier  2 rows removed"]
    assert note == "loads and pushes drop rows of these keys with events up to that time"
    assert kept.startswith(f"made before, may hold it: backup {tmp_path / 'copy'} (20")
    assert engine.history()[-1].who == "dpo"
    found = commands.run_well("delete-entity", "user", "user_id=3", *store, "--json").json
    assert (found["keys"], found["rows"], len(found["hashes"])) == (1, {"age": 0, "tier": 0}, 1)
    assert [item["path"] for item in found["backups"]] == [str(tmp_path / "copy")]
    assert commands.error_of("delete-entity", "user", "user=3", *store) == (
        "error: entity 'user' takes no column 'user'; columns: user_id Int64\n"
    )
    assert "no store at" in commands.error_of("delete-entity", "user", "user_id=3", "--store", str(tmp_path / "no"))


# -- the list itself ---------------------------------------------------------------------------------------------------


def siphash(key: bytes, message: bytes) -> bytes:
    """SipHash-2-4 of 128 bits, by its paper; `test_the_hash_is_siphash` compares it with the authors' first vector."""
    mask = (1 << 64) - 1
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D ^ 0xEE, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotated(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) & mask

    def rounds(n: int) -> None:
        for _ in range(n):
            for a, b, turn in ((0, 1, 13), (2, 3, 16), (0, 3, 21), (2, 1, 17)):
                v[a] = (v[a] + v[b]) & mask
                v[b] = rotated(v[b], turn) ^ v[a]
                if turn in (13, 17):
                    v[a] = rotated(v[a], 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    parts = []
    for which, more in ((2, 0xEE), (1, 0xDD)):
        v[which] ^= more
        rounds(4)
        parts.append(v[0] ^ v[1] ^ v[2] ^ v[3])
    return struct.pack("<QQ", *parts)


def test_the_hash_is_siphash() -> None:
    key = bytes(range(16))
    assert siphash(key, b"").hex() == "a3817f04ba25a8e66df67214c7550293"
    assert secret_hashes(key, [], 1) == siphash(key, b"")


@given(some.binary(min_size=16, max_size=16), some.lists(some.tuples(some.integers(-(2**63), 2**63 - 1), some.text())))
def test_hashes_of_columns(secret: bytes, rows: list[tuple[int, str]]) -> None:
    numbers = np.array([number for number, _ in rows], np.int64)
    texts = [text.encode(errors="replace") for _, text in rows]
    offsets = np.cumsum([0, *map(len, texts)])
    data = b"".join(texts)
    for kind in (np.int32, np.int64):
        found = secret_hashes(secret, [(numbers, None, None), (data, offsets.astype(kind), None)], len(rows))
        for i, ((number, _), text) in enumerate(zip(rows, texts, strict=True)):
            message = struct.pack("<Qq", 0, number) + struct.pack("<Q", len(text) + 1) + text
            assert found[16 * i : 16 * i + 16] == siphash(secret, message + bytes(-len(message) % 8))


@pytest.mark.parametrize(
    ("secret", "columns", "n"),
    [
        (b"short", [], 1),
        (bytes(16), [(np.zeros(2, np.int64), None, None)], 3),
        (bytes(16), [(b"abc", np.zeros(3, np.int64), None)], 3),
        (bytes(16), [(b"abc", b"", None)], 1),
    ],
)
def test_buffers_of_wrong_lengths_are_refused(secret: bytes, columns: list[Any], n: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        secret_hashes(secret, columns, n)


@given(some.data())
def test_the_mask_is_that_of_a_dict(tmp_path_factory: pytest.TempPathFactory, data: some.DataObject) -> None:
    keys = some.lists(some.integers(0, 40), min_size=1, max_size=8)
    deletions = data.draw(some.lists(keys, max_size=6))
    with st.Engine.open(tmp_path_factory.mktemp("mask") / "store", create=True) as engine:
        engine.apply([VIEWS[1]])
        until: dict[int, int] = {}
        known: Erased | None = None
        for deleted in deletions:
            time_us = engine.delete_entity("user", {"user_id": deleted}).time_us
            until |= dict.fromkeys(deleted, time_us)
            if data.draw(some.booleans()):
                known = Erased.newest(engine.store.environment, "user", known)
        found = Erased.newest(engine.store.environment, "user", known)
        assert found.is_empty == (not deletions)
        asked = np.array(data.draw(keys), np.int64)
        around = sorted(set(until.values())) or [1]
        time = some.sampled_from([UNTIMED, 0, 2**62, *around, *(time_us + 1 for time_us in around)])
        times = np.array([data.draw(time) for _ in asked], np.int64)
        mask = found.mask({"user_id": (asked, None, None)}, times)
        wanted = [
            t != UNTIMED and t <= until.get(key, UNTIMED) for key, t in zip(asked.tolist(), times.tolist(), strict=True)
        ]
        assert (mask.tolist() if mask is not None else [False] * len(asked)) == wanted


def test_many_keys_of_strings(engine: st.Engine) -> None:
    shop = st.Entity("shop", keys={"name": st.String})
    engine.apply([st.FeatureView("shops", entity=shop, features=[st.Feature("n", st.Int64)])])
    gone = [f"shop {n}" for n in range(0, 60_000, 3)]
    engine.delete_entity("shop", {"name": gone})
    names = [f"shop {n}" for n in range(60_000)]
    count = engine.load("shops", {"name": names, "n": np.arange(60_000), "event_time": LONG_AGO})
    assert (int(count), count.older) == (40_000, 20_000)
    assert set(engine.views["shops"].to_pandas()["name"]) == set(names) - set(gone)


def test_verify_finds_damage_to_the_lists_and_writes_stop(engine: st.Engine) -> None:
    path, environment = engine.store.path, engine.store.environment
    engine.delete_entity("user", {"user_id": 3})
    engine.delete_entity("user", {"user_id": 4})
    key = b"euser\0" + struct.pack(">Q", 2)
    with environment.read() as txn:
        value, secret = bytes(txn.get(key)), bytes(txn.get(b"e"))
    for name, bad, said in (
        (key, value[:-1] + bytes([value[-1] ^ 1]), "deletion 2 in the list of erased keys of entity 'user' is damaged"),
        (key, value[:-1], "deletion 2 in the list of erased keys of entity 'user' is damaged"),
        (key, b"", "deletion 2 in the list of erased keys of entity 'user' is damaged"),
        (b"e", secret[:-1] + bytes([secret[-1] ^ 1]), "the secret of the lists of erased keys is"),
    ):
        with environment.write() as writer:
            writer.txn.put(name, bad)
        (problem,) = verify(path).problems
        assert problem.startswith(said)
        for write in (engine.push, engine.load):
            with pytest.raises(Internal, match="restore the store from a backup"):
                write("age", ages([9]))
        with environment.write() as writer:
            writer.txn.put(name, value if name == key else secret)
    assert verify(path).ok
    with environment.write() as writer:
        writer.txn.delete(b"euser\0" + struct.pack(">Q", 1))
        writer.txn.put(b"eno number", b"")
    assert verify(path).problems == [
        "LMDB holds the unknown key b'eno number'",
        "the list of erased keys of entity 'user' lacks its deletion 1",
    ]


def test_the_secret_is_made_once(engine: st.Engine) -> None:
    with engine.store.environment.write() as writer:
        first = secret_of(writer.txn)
    with engine.store.environment.write() as writer:
        assert secret_of(writer.txn) == first
    assert LIMITS.name_bytes + 10 <= 511  # LMDB's longest key holds the name of any entity
