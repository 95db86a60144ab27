"""Request columns: values of callers are checked, converted and collected."""

import datetime
import math
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as values
from hypothesis.extra import numpy as arrays

from shorttail import Bool, Float64, Int32, Int64, String, Timestamp, Vector
from shorttail._native.columns import Columns
from shorttail.define.values import Refused, as_column
from shorttail.errors import InvalidArgument

ONE_OF_EACH = {"key": Int64, "amount": Float64, "name": String, "taste": Vector(2), "new": Bool, "at": Timestamp}
GOOD = {"key": 1, "amount": 2.5, "name": "é", "taste": [1, 2], "new": True, "at": 7}


def columns_of(dtypes=ONE_OF_EACH, **missing):
    return Columns(list(dtypes), list(dtypes.values()), **missing)


def test_rows_of_requests_are_appended_and_scalars_are_repeated():
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
        ({"key": np.array([1.0, 1.5])}, "column 'key' takes Int64; got 1.5 (float64) at row 1"),
        (
            {"key": np.array([1 << 63], np.uint64)},
            "column 'key' takes Int64; got 9223372036854775808 (uint64) at row 0",
        ),
        ({"key": np.array([True])}, "column 'key' takes Int64; got True (bool) at row 0"),
        ({"key": np.timedelta64(1, "s")}, "column 'key' takes Int64; got 1 seconds (timedelta64)"),
        ({"key": np.array([1], "M8[s]")}, "column 'key' takes Int64; got 1970-01-01T00:00:01 (datetime64[s]) at row 0"),
        ({"key": [1, "x"]}, "column 'key' takes Int64; got 'x' (str) at row 1"),
        ({"amount": "1"}, "column 'amount' takes Float64; got '1' (str)"),
        ({"name": 3}, "column 'name' takes String; got 3 (int)"),
        ({"amount": datetime.datetime(2020, 1, 1)}, "column 'amount' takes Float64; got "),
        ({"name": "n" * 70_000}, "column 'name' takes String; got text of 70000 bytes, more than 65535"),
        ({"name": ["a", "\udcff"]}, "column 'name' takes String; got text that is not UTF-8, '\\udcff' (str) at row 1"),
        ({"taste": [1, 2, 3]}, "column 'taste' takes Vector(2); got 3 numbers"),
        ({"taste": [[1, 2], [3]]}, "column 'taste' takes Vector(2); got 1 number"),
        ({"taste": ["1", "2"]}, "column 'taste' takes Vector(2); got '1' (str)"),
        ({"new": 2}, "column 'new' takes Bool; got 2 (int)"),
        ({"key": []}, "column 'key' is empty: send at least one value"),
        ({"key": np.zeros((2, 2), int)}, "column 'key' takes Int64; got an array of shape (2, 2)"),
        ({"key": [1, 2], "amount": [1.0, 2.0, 3.0]}, "column 'key' has 2 values where others have 3"),
        ({"key": list(range(16_385))}, "16385 rows in one request; at most 16384 are taken"),
        ({"kay": 1}, "unknown column 'kay'; columns: key, amount, name, taste, new, at"),
    ],
)
def test_a_wrong_value_is_named_and_the_batch_stays_unchanged(wrong, message):
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
    for wrong, got in ((1 << 31, "2147483648 (int)"), (np.array([0, -(1 << 31) - 1]), "-2147483649 (int64) at row 1")):
        with pytest.raises(InvalidArgument) as caught:
            columns.append({"small": wrong})
        assert caught.value.message == f"column 'small' takes Int32; got {got}"
    assert columns.column("small").tolist() == [-(1 << 31), (1 << 31) - 1]


def test_a_missing_column_is_named():
    columns = columns_of()
    with pytest.raises(InvalidArgument, match="missing column 'amount'; columns: key, amount"):
        columns.append({name: value for name, value in GOOD.items() if name != "amount"})


@pytest.mark.parametrize("at_fault", [0, 7, 1000, 1001, 1999, 2000, 2999])
def test_with_thousands_of_columns_the_error_names_the_right_one(at_fault):
    names = [f"c{i}" for i in range(3000)]
    columns = Columns(names, [Int32] * 3000)
    good = {key: [1, 2, 3] for key in names}
    name = names[at_fault]
    wrong = {
        f"missing column '{name}'; columns: c0, c1": {key: value for key, value in good.items() if key != name},
        f"column '{name}' has 2 values where others have 3": good | {name: [1, 2]},
        f"column '{name}' takes Int32; got 2147483648 (int) at row 1": good | {name: [1, 1 << 31]},
    }
    for message, request in wrong.items():
        with pytest.raises(InvalidArgument) as caught:
            columns.append(request)
        assert caught.value.message.startswith(message)
    assert columns.append(good) == 3


# -- missing values ----------------------------------------------------------------------------------------------

SCALARS = {"flag": Bool, "small": Int32, "key": Int64, "amount": Float64, "name": String, "at": Timestamp}
PRESENT = {"flag": True, "small": 1, "key": 2, "amount": 0.5, "name": "x", "at": 3}


@pytest.mark.parametrize("name", ["flag", "small", "key", "name", "at"])
@pytest.mark.parametrize("nothing", [None, math.nan, np.datetime64("NaT"), np.ma.masked, np.float32("nan")])
def test_a_required_column_refuses_a_missing_value_by_name(name, nothing):
    columns = columns_of(SCALARS, required=list(SCALARS))
    hint = f"send a value, or let the model say what it takes instead: Model(..., missing={{'{name}': ...}})"
    for value, where in ((nothing, ""), ([PRESENT[name], nothing], " at row 1")):
        with pytest.raises(InvalidArgument) as caught:
            columns.append(PRESENT | {name: value})
        assert caught.value.message == f"column '{name}' takes {SCALARS[name]}; got a missing value{where}: {hint}"
    assert columns.n_rows == 0
    assert columns.append(PRESENT) == 1


def test_masked_values_of_an_array_are_missing():
    required = columns_of({"key": Int64}, required=["key"])
    with pytest.raises(InvalidArgument, match="got a missing value at row 1"):
        required.append({"key": np.ma.array([1, 2], mask=[False, True])})
    columns = columns_of({"key": Int64, "amount": Float64})
    columns.append(
        {"key": np.ma.array([1, 2], mask=[True, False]), "amount": np.ma.array([1.0, 2], mask=[False, True])}
    )
    assert columns.column("key").tolist() == [0, 2]
    np.testing.assert_array_equal(columns.column("amount"), [1, math.nan])


def test_values_that_are_not_masked_import_no_numpy_ma():
    """A server would import it while requests wait, at the first default of a feature or the first odd value."""
    script = """
import sys
import numpy as np
import shorttail as st
from shorttail.client.columns import encode_columns
from shorttail.define.values import as_column
st.Feature("f", st.Float32, default=0.5)
for given in ([1, None, 2.5], np.arange(3), np.ones((2, 2), np.float32), "x"):
    encode_columns({"a": given})
    as_column(st.Vector(2) if np.ndim(given) == 2 else st.String if isinstance(given, str) else st.Float64, given)
print("numpy.ma" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_missing_values_are_replaced_by_the_values_of_instead():
    instead = {"flag": True, "small": -1, "key": 1 << 40, "amount": 0.25, "name": "é", "at": 7, "taste": [1.0, 2.0]}
    columns = columns_of(SCALARS | {"taste": Vector(2)}, instead=instead)
    nothing = dict.fromkeys(instead)
    assert columns.append(nothing) == 1
    assert columns.append(nothing | {"key": [1, None, 3], "amount": np.array([math.nan, 1, math.nan])}) == 3
    assert columns.append(PRESENT | {"taste": [3.0, math.nan]}) == 1
    assert columns.column("flag").tolist() == [1] * 5
    assert columns.column("small").tolist() == [-1] * 4 + [1]
    assert columns.column("key").tolist() == [1 << 40, 1, 1 << 40, 3, 2]
    assert columns.column("amount").tolist() == [0.25, 0.25, 1, 0.25, 0.5]
    assert columns.column("name").tolist() == ["é"] * 4 + ["x"]
    assert columns.column("at").tolist() == [7] * 4 + [3]
    np.testing.assert_array_equal(columns.column("taste"), [[1, 2]] * 4 + [[3, math.nan]])


# -- the fast paths against define/values.py ---------------------------------------------------------------------

numbers = (
    values.integers(-(1 << 70), 1 << 70)
    | values.sampled_from([0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1])
    | values.floats()
    | values.sampled_from([3.0, 2.0**53, 2.0**53 + 2, 2.0**63, 1e300])
    | values.booleans()
)
nothing = values.sampled_from([None, math.nan, np.datetime64("NaT"), np.ma.masked])
odd = (
    values.sampled_from([b"x", 1j, datetime.timedelta(1), Decimal("2.5"), Decimal(7), [1], {}, object])
    | values.sampled_from([datetime.datetime(2020, 1, 1), datetime.date(1969, 1, 1), "2020-01-01T00:00:00Z"])
    | values.sampled_from(
        [np.timedelta64(1, "s"), np.datetime64(-1, "ns"), np.str_("s"), np.bool_(True), np.bytes_(b"a")]
    )
    | values.sampled_from([np.int8(-3), np.uint64(2**63), np.float16(2), np.float32(0.1), np.longdouble(4)])
)
texts = values.text(max_size=20) | values.just("\udcff")
value = numbers | texts | nothing | odd
usual = {
    "flag": values.booleans(),
    "small": values.integers(-(2**31), 2**31 - 1),
    "key": values.integers(-(2**63), 2**63 - 1),
    "amount": values.floats(),
    "name": values.text(max_size=20),
    "at": values.integers(-(2**63), 2**63 - 1),
}


def check_against_define_values(dtype, given):
    """Check that Columns takes or refuses a column as `as_column` does, with the same error."""
    columns, required = Columns(["x"], [dtype]), Columns(["x"], [dtype], required=["x"])
    try:
        found, nulls, is_scalar = as_column(dtype, given)
        message = "" if len(found) else "column 'x' is empty: send at least one value"
    except Refused as error:
        message = error.error("column 'x'", dtype).message
    if message:
        with pytest.raises(InvalidArgument) as caught:
            columns.append({"x": given})
        assert caught.value.message == message
        assert columns.n_rows == 0
        return
    assert columns.append({"x": given}) == len(found)
    if nulls is not None and not dtype.is_float:
        found[nulls] = math.nan if dtype.is_vector else None if dtype == String else 0
        with pytest.raises(InvalidArgument) as caught:
            required.append({"x": given})
        where = "" if is_scalar else f" at row {int(np.argmax(nulls))}"
        assert caught.value.message.startswith(f"column 'x' takes {dtype}; got a missing value{where}: send")
    np.testing.assert_array_equal(columns.column("x"), found)


@pytest.mark.parametrize("text", ["n" * 65_535, "n" * 65_536, "é" * 32_767, "é" * 32_768])
def test_long_texts_give_the_result_of_define_values(text):
    for form in (text, ["a", text], np.array([text, "a"]), np.array([text], object)):
        check_against_define_values(String, form)


@given(values.sampled_from(list(SCALARS)), values.data())
def test_scalars_and_lists_give_the_result_of_define_values(name, data):
    row = usual[name] if data.draw(values.booleans()) else value | usual[name]
    given = data.draw(row | values.lists(row, max_size=5) | values.lists(usual[name] | nothing, max_size=5))
    check_against_define_values(SCALARS[name], given)


KINDS = ["?", "i1", ">i2", "<i4", ">i8", "u1", "u2", "u4", "u8", "f2", ">f4", "f8", "g", "M8[ns]", "M8[h]", "m8[s]"]


@given(
    values.sampled_from(list(SCALARS.values())),
    values.sampled_from(KINDS).flatmap(lambda kind: arrays.arrays(kind, values.integers(0, 5)))
    | arrays.arrays(object, 3, elements=value.filter(lambda item: not isinstance(item, list)))
    | arrays.arrays("U3", 2),
    values.booleans(),
)
@example(Int64, np.array([1, 2**63], "u8"), False)
@example(Float64, np.array([1, 2**63], "u8"), False)
@example(Bool, np.array([0.0, 1.0]), False)
def test_arrays_give_the_result_of_define_values(dtype, given, masked):
    if masked and given.dtype != object and len(given):
        given = np.ma.array(given, mask=[True] + [False] * (len(given) - 1))
    check_against_define_values(dtype, given)


SHAPES = values.sampled_from([2, (2, 2), (1, 3), (0, 2)])


@given(
    values.lists(values.floats(width=32) | values.integers(-9, 9) | nothing, max_size=3)
    | values.lists(values.lists(value, min_size=1, max_size=3) | nothing, max_size=3)
    | arrays.arrays(values.sampled_from(["f2", "f4", ">f8", "i4", "i8", "?"]), SHAPES)
)
def test_vectors_give_the_result_of_define_values(given):
    check_against_define_values(Vector(2), given)
