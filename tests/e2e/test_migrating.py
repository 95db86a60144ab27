"""A server of a store of format 2: it answers, refuses pushes, and takes them as soon as the store is migrated."""

import threading

import pytest
from commands import run_well
from format_2 import format_of, make_format_2, tables_of_format_2
from pushing import PUSHED, row, tiers
from serving import PREDICT, PREDICTED, make_store


@pytest.fixture
def old(tmp_path):
    with tables_of_format_2():
        store = make_store(tmp_path)
    make_format_2(store)
    return store


def test_a_server_answers_before_while_and_after_its_store_is_migrated(start, old):
    server = start("--workers", "2", of=old)
    refusal = f"store '{old}' has format 2, which this shorttail only reads; run `shorttail migrate --store {old}`"
    done, answers = threading.Event(), []

    def predict():
        with server.connect() as peer:
            while not done.is_set():
                answers.append(peer.ask(*PREDICT))

    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
        for method, params in (("push", ["stats", row(1)]), ("delete", ["stats", {"user_id": [1]}])):
            _, _, error, result = peer.ask(0, 1, method, params)
            assert (error["code"], error["message"], result) == ("INVALID_ARGUMENT", refusal, None)
        assert tiers(peer, 1) == ["gold"]
        threads = [threading.Thread(target=predict) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            migrated = run_well("migrate", "--store", str(old), "--json").json
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert migrated["rows"] == 3
        assert format_of(old) == 3
        assert answers
        assert all(answer == PREDICTED for answer in answers)
        assert peer.ask(*PREDICT) == PREDICTED
        assert peer.ask(0, 1, "push", ["stats", row(1)]) == [1, 1, None, PUSHED]
        assert tiers(peer, 1) == ["new"]
    assert server.stop() == 0
    assert server.log.read_text() == ""
    assert run_well("verify", "--store", str(old), "--json").json["ok"]
