"""Request columns: what callers send, checked and gathered."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as values
from hypothesis.extra import numpy as arrays

from shorttail import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
from shorttail._native.columns import Columns, CopyColumns
from shorttail.errors import InvalidArgument

ONE_OF_EACH = {"key": Int64, "amount": Float64, "name": String, "taste": Vector(2), "new": Bool, "at": Timestamp}
GOOD = {"key": 1, "amount": 2.5, "name": "é", "taste": [1, 2], "new": True, "at": 7}


def columns_of(dtypes=ONE_OF_EACH):
    return Columns(list(dtypes), list(dtypes.values()))


def test_requests_gather_row_after_row_and_scalars_are_repeated():
    columns = columns_of()
    assert columns.append(GOOD) == 1
    several = GOOD | {"key": [2, 3, 4], "name": ["a", None, "c"], "taste": np.arange(6.0).reshape(3, 2)}
    assert columns.append(several) == 3
    assert columns.n_rows == 4
    assert columns.column("key").tolist() == [1, 2, 3, 4]
    assert columns.column("amount").tolist() == [2.5] * 4
    assert columns.column("name").tolist() == ["é", "a", None, "c"]
    assert columns.column("taste").tolist() == [[1, 2], [0, 1], [2, 3], [4, 5]]
    columns.reset()
    assert columns.append(GOOD) == 1
    assert columns.column("name").tolist() == ["é"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key": "x"}, "column 'key' takes Int64; got 'x' (str)"),
        ({"key": 1.5}, "column 'key' takes Int64; got 1.5 (float)"),
        ({"key": True}, "column 'key' takes Int64; got True (bool)"),
        ({"key": 1 << 63}, "column 'key' takes Int64; got 9223372036854775808 (int)"),
        ({"key": np.array([1.0])}, "column 'key' takes Int64; got an array of float64"),
        ({"key": np.array([1 << 63], np.uint64)}, "column 'key' takes Int64; got 9223372036854775808"),
        ({"key": [1, "x"]}, "column 'key' takes Int64; got 'x' (str) at row 1"),
        ({"amount": "1"}, "column 'amount' takes Float64; got '1' (str)"),
        ({"name": 3}, "column 'name' takes String; got 3 (int)"),
        ({"name": "n" * 70_000}, "column 'name': a string of 70000 bytes; at most 65535 are taken"),
        ({"taste": [1, 2, 3]}, "column 'taste' takes Vector(2); got values of shape (3,)"),
        ({"taste": ["a", "b"]}, "column 'taste' takes Vector(2)"),
        ({"new": 2}, "column 'new' takes Bool; got 2 (int)"),
        ({"key": []}, "column 'key' is empty: send at least one value"),
        ({"key": np.zeros((2, 2), int)}, "column 'key' takes one value a row; got an array of shape (2, 2)"),
        ({"key": [1, 2], "amount": [1.0, 2.0, 3.0]}, "column 'key' has 2 values where others have 3"),
        ({"key": list(range(16_385))}, "16385 rows in one request; at most 16384 are taken"),
        ({"kay": 1}, "unknown column 'kay'; columns: key, amount, name, taste, new, at"),
    ],
)
def test_a_wrong_value_is_named_and_leaves_the_batch_as_it_was(wrong, message):
    columns = columns_of()
    columns.append(GOOD)
    with pytest.raises(InvalidArgument) as caught:
        columns.append(GOOD | wrong)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
    assert columns.n_rows == 1
    columns.append(GOOD | {"name": "after"})
    assert columns.column("name").tolist() == ["é", "after"]


def test_a_value_that_does_not_fit_int32_is_refused():
    columns = columns_of({"small": Int32})
    assert columns.append({"small": [-(1 << 31), (1 << 31) - 1]}) == 2
    for wrong in (1 << 31, np.array([0, -(1 << 31) - 1])):
        with pytest.raises(InvalidArgument, match="column 'small' takes Int32; got a value outside"):
            columns.append({"small": wrong})
    assert columns.column("small").tolist() == [-(1 << 31), (1 << 31) - 1]


def test_a_missing_column_is_named():
    columns = columns_of()
    with pytest.raises(InvalidArgument, match="missing column 'amount'; columns: key, amount"):
        columns.append({name: value for name, value in GOOD.items() if name != "amount"})


@given(
    values.lists(
        values.lists(values.tuples(values.integers(-(1 << 63), (1 << 63) - 1), values.text(max_size=40)), min_size=1),
        max_size=8,
    )
)
def test_any_requests_come_back_as_they_were_sent(requests):
    columns = columns_of({"number": Int64, "text": String})
    for rows in requests:
        columns.append({"number": [number for number, _ in rows], "text": [text for _, text in rows]})
    sent = [row for rows in requests for row in rows]
    received = zip(columns.column("number").tolist(), columns.column("text").tolist(), strict=True)
    assert list(received) == sent


@given(arrays.arrays(np.float32, values.integers(1, 50)))
def test_arrays_copy_into_a_matrix_beside_others(sent):
    columns = columns_of({"a": Float32, "b": Int64})
    columns.append({"a": sent, "b": np.arange(len(sent))})
    matrix = np.full((len(sent), 3), -1, np.float32)
    CopyColumns([(0, 0, 2), (1, 0, 0)]).run(columns, [matrix])
    np.testing.assert_array_equal(matrix[:, 2], sent)
    np.testing.assert_array_equal(matrix[:, 0], np.arange(len(sent), dtype=np.float32))
    assert (matrix[:, 1] == -1).all()


def test_nulls_are_nan_in_floats_and_zero_in_integers():
    columns = columns_of({"key": Int64, "amount": Float64, "name": String})
    columns.append({"key": [None, 2], "amount": [None, 2.0], "name": [None, "x"]})
    matrix = np.empty((2, 2), np.float32)
    integers = np.empty(2, np.int64)
    texts = np.empty(2, object)
    CopyColumns([(0, 0, 0), (1, 0, 1), (0, 1, 0), (2, 2, 0)]).run(columns, [matrix, integers, texts])
    np.testing.assert_array_equal(matrix, [[np.nan, np.nan], [2, 2]])
    assert integers.tolist() == [0, 2]
    assert texts.tolist() == ["", "x"]
