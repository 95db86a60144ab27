"""On-demand functions give the results that docs/on-demand.md lists, for every value; they nest, and are cached."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from onnx import TensorProto, helper

import shorttail as st
from shorttail._native.transforms import TransformProgram
from shorttail.define.ondemand import OnDemand
from shorttail.errors import Internal, InvalidArgument
from shorttail.ondemand.compile import compile_on_demand

pytest.importorskip("numba")

RATE = 0.25
STEPS = (10, 20, 30)
WEIGHTS = np.array([0.5, 2.0, -1.0, math.inf])
LOWEST = -(1 << 63)
FLOAT64 = some.floats(width=64) | some.sampled_from(
    [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 2.0**63, -(2.0**63)]
)
INT64 = some.integers(LOWEST, -LOWEST - 1) | some.sampled_from([0, 1, -1, LOWEST, -LOWEST - 1, 63, 64])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use one cache for this module, so that no function is compiled twice."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home") / "cache"
        patch.setenv("SHORTTAIL_CACHE_DIR", str(folder))
        yield folder


def run(function: OnDemand, *columns: Any, out: Any = None) -> tuple[np.ndarray, TransformProgram]:
    """Run the function over columns. out: dtype of the output. Returns the output and the program."""
    dtype = np.dtype(out if out is not None else function.returns.numpy)
    arrays = [np.ascontiguousarray(c, kind.numpy) for c, (_, kind) in zip(columns, function.params, strict=True)]
    rows, width = len(arrays[0]), function.returns.width
    arguments = [(i, kind.numpy, kind.width) for i, (_, kind) in enumerate(function.params)]
    arrays.append(np.full((rows, width) if function.returns.is_vector else rows, 77, dtype))
    program = TransformProgram([(compile_on_demand(function, dtype), arguments, (len(arguments), dtype, width, 0))])
    program.run(arrays, rows)
    return arrays[-1], program


# -- arithmetic ----------------------------------------------------------------------------------------------------


@st.on_demand
def float_operation(op: st.Int64, a: st.Float64, b: st.Float64) -> st.Float64:  # type: ignore[valid-type]
    if op == 0:
        return a + b
    if op == 1:
        return a * b
    if op == 2:
        return a / b
    if op == 3:
        return math.sqrt(a)
    if op == 4:
        return math.log(a)
    if op == 5:
        return np.where(a > b, a, b)
    if op == 6:
        return np.clip(a, -1.0, 1.0)
    if op == 7:
        return np.maximum(a, b)
    if op == 8:
        return math.fmod(a, b)
    return math.exp(a)


FLOAT_ORACLES = [
    np.add, np.multiply, np.divide, np.sqrt, np.log, lambda a, b: a if a > b else b, lambda a, b: np.clip(a, -1, 1),
    np.maximum, np.fmod, np.exp,
]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(FLOAT64, FLOAT64)
def test_float_arithmetic_equals_numpy(a: float, b: float) -> None:
    n = len(FLOAT_ORACLES)
    found, program = run(float_operation, np.arange(n), [a] * n, [b] * n)
    x, y = np.float64(a), np.float64(b)
    with np.errstate(all="ignore"):
        wanted = [f(x) if f in (np.sqrt, np.log, np.exp) else f(x, y) for f in FLOAT_ORACLES]
    np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=0, equal_nan=True)
    assert program.failed_rows == 0


@st.on_demand
def int_operation(op: st.Int64, a: st.Int64, b: st.Int64) -> st.Int64:  # type: ignore[valid-type]
    if op == 0:
        return a + b
    if op == 1:
        return a * b
    if op == 2:
        return a // b
    if op == 3:
        return a % b
    if op == 4:
        return np.mod(a, b)
    if op == 5:
        return np.fmod(a, b)
    if op == 6:
        return a << b
    if op == 7:
        return a >> b
    if op == 8:
        return np.divmod(a, b)[1]
    return abs(a)


def wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def int_oracles(a: int, b: int) -> list[int]:
    trap = b == 0 or (a == LOWEST and b == -1)
    quotient, rest = (0, 0) if trap else divmod(a, b)
    shifted = wrapped(a << b) if 0 <= b < 64 else 0
    down = a >> b if 0 <= b < 64 else a >> 63
    truncated = 0 if trap else abs(a) % abs(b) * (1 if a >= 0 else -1)
    return [wrapped(a + b), wrapped(a * b), quotient, rest, rest, truncated, shifted, down, rest, wrapped(abs(a))]


@settings(deadline=None, max_examples=300)
@given(INT64, INT64)
def test_integers_wrap_and_traps_give_0(a: int, b: int) -> None:
    wanted = int_oracles(a, b)
    n = len(wanted)
    assert run(int_operation, np.arange(n), [a] * n, [b] * n)[0].tolist() == wanted


@st.on_demand
def to_int64(x: st.Float64) -> st.Int64:  # type: ignore[valid-type]
    return x


@st.on_demand
def to_int32(x: st.Float64) -> st.Int32:  # type: ignore[valid-type]
    return x


@st.on_demand
def to_bool(x: st.Float64) -> st.Bool:  # type: ignore[valid-type]
    return x


@st.on_demand
def types(b: st.Bool, i: st.Int32, t: st.Timestamp, f: st.Float32) -> st.Bool:  # type: ignore[valid-type]
    return (b and i > 2_000_000_000) or t + i == -1 or f == 0.5


def test_every_type_of_parameter_is_read_correctly() -> None:
    columns = [[1, 1, 0, 0], [2_100_000_000, 5, -2, -(1 << 31)], [0, 0, 1, 0], [0, 0.1, 0, 0.5]]
    assert run(types, *columns)[0].tolist() == [True, False, True, True]
    assert run(types, *columns, out=np.float32)[0].tolist() == [1, 0, 1, 1]


@st.on_demand
def whole_numbers(op: st.Int64, x: st.Float64) -> st.Int64:  # type: ignore[valid-type]
    if op == 0:
        return int(x)
    if op == 1:
        return math.floor(x)
    if op == 2:
        return math.ceil(x)
    if op == 3:
        return round(x)
    return np.int32(x)


def saturated(x: float, bits: int = 64) -> int:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0 if math.isnan(x) else low if x < low else high if x > high else int(x)


@settings(deadline=None, max_examples=200)
@given(FLOAT64 | some.floats(-100, 100))
def test_floats_become_integers_that_saturate(x: float) -> None:
    assert run(to_int64, [x])[0].tolist() == [saturated(x)]
    assert run(to_int32, [x])[0].tolist() == [saturated(x, 32)]
    assert run(to_bool, [x])[0].tolist() == [x != 0]
    assert run(to_int64, [x], out=np.float32)[0].tolist() == [np.float32(saturated(x))]
    nearby = [x] * 2 if not math.isfinite(x) else [math.floor(x), math.ceil(x)]
    rounded = x if not math.isfinite(x) else float(np.rint(x))
    wanted = [saturated(x), *(saturated(y) for y in nearby), saturated(rounded), saturated(x, 32)]
    assert run(whole_numbers, np.arange(5), [x] * 5)[0].tolist() == wanted


def test_a_builtin_that_is_a_parameter_stays_a_parameter() -> None:
    @st.on_demand
    def shadow(int: st.Float64) -> st.Float64:  # type: ignore[valid-type]
        round = int * 2
        return round

    assert run(shadow, [1.25])[0].tolist() == [2.5]


# -- vectors -------------------------------------------------------------------------------------------------------


@st.on_demand
def cosine(a: st.Vector(5), b: st.Vector(5)) -> st.Float32:  # type: ignore[valid-type]
    return np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))


@st.on_demand
def difference(a: st.Vector(5), b: st.Vector(5)) -> st.Vector(5):  # type: ignore[valid-type]
    return a - b


@st.on_demand
def element(v: st.Vector(5), i: st.Int64) -> st.Float32:  # type: ignore[valid-type]
    return v[i] * v.sum() / len(v)


def test_vectors_have_dot_norm_and_arithmetic() -> None:
    random = np.random.default_rng(5)
    a, b = random.normal(size=(2, 700, 5)).astype(np.float32)
    wanted = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(run(cosine, a, b)[0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run(difference, a, b)[0], a - b)


def test_an_index_outside_of_a_vector_gives_nan_for_its_row_alone() -> None:
    vectors = np.ones((8, 5), np.float32)
    found, program = run(element, vectors, [0, 4, 5, -5, -6, LOWEST, 1 << 40, 2])
    np.testing.assert_array_equal(found, [1, 1, np.nan, 1, np.nan, np.nan, np.nan, 1])
    assert program.failed_rows == 4


def test_a_vector_of_a_wrong_length_gives_nan_for_its_row() -> None:
    @st.on_demand
    def part(v: st.Vector(5), n: st.Int64) -> st.Vector(1):  # type: ignore[valid-type]
        return v[:n]

    found, program = run(part, np.ones((3, 5), np.float32), [1, 2, 0])
    np.testing.assert_array_equal(found, [[1], [np.nan], [np.nan]])
    assert program.wrong_lengths == 2
    assert program.failures == ([0, 2],)


@pytest.mark.parametrize("rows", [8, 600])  # of few values the GIL is kept
@pytest.mark.parametrize("steps", [1, 3, 90])  # the table of many steps is not on the stack
def test_failures_are_counted_for_each_step(steps: int, rows: int) -> None:
    """Step n fails in the rows whose index is at least 5 - n % 5. Every third step shares a list with the first."""
    address = compile_on_demand(element, np.dtype(np.float32))
    vectors, indices = np.ones((rows, 5), np.float32), np.arange(rows, dtype=np.int64) % 10
    lists = [[0, 0] for _ in range(steps)]
    shared = [lists[0 if n % 3 == 0 else n] for n in range(steps)]
    columns = [indices + n % 5 for n in range(steps)]
    outputs = [np.empty(rows, np.float32) for _ in range(steps)]
    program = TransformProgram(
        [
            (address, [(0, np.float32, 5), (1 + n, np.int64, 1)], (1 + steps + n, np.float32, 1, 0))
            for n in range(steps)
        ],
        shared,
    )
    for _ in range(2):
        program.run([vectors, *columns, *outputs], rows)
    failed = [2 * int((column > 4).sum()) for column in columns]
    assert [int(np.isnan(output).sum()) * 2 for output in outputs] == failed
    assert lists[0] == [sum(failed[::3]), 0]
    assert [lists[n][0] for n in range(steps) if n % 3] == [failed[n] for n in range(steps) if n % 3]
    assert (program.failed_rows, program.wrong_lengths) == (sum(failed), 0)
    with pytest.raises(ValueError, match="a step needs its list of failures"):
        TransformProgram(program.steps, [])


def test_the_runner_refuses_arrays_of_another_type_or_shape() -> None:
    address = compile_on_demand(to_int64)
    program = TransformProgram([(address, [(0, np.float64, 1)], (1, np.int64, 1, 0))])
    right = [np.zeros(3), np.zeros(3, np.int64)]
    program.run(right, 3)
    for number, wrong in (
        (0, np.zeros(3, np.float32)),
        (0, np.zeros((3, 2))),
        (0, np.zeros(6)[::2]),
        (1, right[1][:2]),
    ):
        with pytest.raises(Internal, match=f"array {number} of a plan"):
            program.run([wrong if i == number else array for i, array in enumerate(right)], 3)


# -- what a function may use ---------------------------------------------------------------------------------------


def scaled(x: Any, by: Any = 2.0) -> Any:
    """A plain function that has a default and uses a constant."""
    return x * by + RATE


def test_constants_and_plain_functions_of_the_file_are_captured_by_value() -> None:
    offset = 7

    @st.on_demand
    def uses(x: st.Float64) -> st.Float64:  # type: ignore[valid-type]
        total = scaled(x) + scaled(x, by=1.0) + STEPS[1] + offset
        for weight in WEIGHTS[:3]:
            total += weight
        return total

    again = OnDemand.from_json(uses.to_json())
    assert again == uses
    assert again.origin is None
    wanted = (1.0 * 2 + RATE) + (1.0 + RATE) + 20 + 7 + 1.5
    assert run(again, [1.0])[0].tolist() == [wanted]


def declare(text: str, tmp_path: Path, name: str = "wrong") -> OnDemand:
    """Return the function that a definitions file with this text declares."""
    path = tmp_path / "definitions.py"
    path.write_text(f"import math\nimport numpy as np\nimport json\nimport shorttail as st\n{text}")
    namespace: dict[str, Any] = {"__name__": "definitions"}
    exec(compile(path.read_bytes(), str(path), "exec"), namespace)
    found = namespace[name]
    assert isinstance(found, OnDemand)
    return found


def body(*lines: str, before: str = "", signature: str = "x: st.Float64") -> str:
    return f"{before}@st.on_demand\ndef wrong({signature}) -> st.Float64:\n" + "".join(
        f"    {line}\n" for line in lines
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (body("return json.dumps(x)"), "uses 'json', which is the module json"),
        (body("return x * factor"), "uses 'factor', which is not defined"),
        (body("return RATES[0]", before="RATES = {0: 1.0}\n"), "uses 'RATES', which is a dict"),
        (body("print(x)", "return x"), "uses print()"),
        (body("if x < 0:", "    raise ValueError", "return x"), "line 8, `raise ValueError`: it cannot raise"),
        (body("return {1: x}[1]"), "line 7, `{1: x}`: dicts cannot be compiled"),
        (body("return wrong(x)"), "uses 'wrong', which is not defined"),
        (body("return f(x)", before="def f(x): return f(x)\n"), "'f' calls itself"),
        (body("return np.random.normal() + x"), "cannot draw random numbers"),
        (body("return 1.0", signature="x: st.String"), "parameter 'x' is String"),
        (body("y = x + 1", "return y.real_part"), "line 8, `return y.real_part`: Float64 has no attribute 'real_part'"),
        (body("return x + 'a'"), "+ is not defined for Float64 and the string 'a'"),
        (body("return f(x)", before="def f(x, y): return x\n"), "f(): missing a required argument: 'y'"),
        (body("return f(x)", before="def f(x):\n    return x.up\n"), "line 6, `return x.up`: Float64 has no attribute"),
        (body("if x > 0:", "    return x"), "it returns None on one of its paths"),
        (body("y = x"), "it returns nothing"),
        (body("return 'high' if x > 1 else 'low'"), "it returns a string, but is declared to return Float64"),
        (body("return math.comb(3, 2) + x"), "math.comb cannot be compiled"),
        (body("return np.sqt(x)"), "numpy has nothing called 'sqt'"),
        (body("return x[0]"), "Float64 cannot be indexed"),
        (body("return v * 2", signature="v: st.Vector(3)"), "it returns a vector"),
        (body("v[0] = 2", "return v[0]", signature="v: st.Vector(3)"), "a vector cannot be changed"),
        (body("return x", "").replace("-> st.Float64", "-> st.Vector(3)"), "return a one-dimensional array"),
        (body("return x, 1").replace("-> st.Float64", "-> st.Vector(3)"), "it returns 2 numbers"),
        (body("return np.ones(2) * x").replace("-> st.Float64", "-> st.Vector(3)"), "but returns another length"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        compile_on_demand(declare(text, tmp_path))
    assert message in caught.value.message
    assert "'wrong'" in caught.value.message
    assert "\n" not in caught.value.message
    assert "numba" not in caught.value.message


# -- end to end ----------------------------------------------------------------------------------------------------

USER = st.Entity("user", keys={"user_id": st.Int64})
STATS = st.FeatureView(
    "stats",
    entity=USER,
    features=[
        st.Feature("spent", st.Float32),
        st.Feature("visits", st.Int64),
        st.Feature("known", st.Int64, default=5),
        st.Feature("taste", st.Vector(3)),
    ],
)


@st.on_demand
def ratio(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return a / b


@st.on_demand
def plus_one(n: st.Int64) -> st.Int64:  # type: ignore[valid-type]
    return n + 1


@st.on_demand
def doubled(v: st.Vector(3)) -> st.Vector(3):  # type: ignore[valid-type]
    return 2 * v[0], 2 * v[1], 2 * v[2]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as opened:
        yield opened


def echo_model(path: Path, width: int) -> str:
    """Save an ONNX file whose output is its input, a float matrix."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", values[:1], values[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def test_functions_of_every_kind_of_argument_reach_the_model(engine: st.Engine, tmp_path: Path) -> None:
    per_visit = ratio("request:amount", "stats:visits")
    columns = [
        per_visit,
        "stats:spent",
        ratio(per_visit, "stats:spent"),
        plus_one("stats:known"),
        ratio(plus_one("stats:known"), "request:amount"),
        doubled("stats:taste"),
        doubled(doubled("stats:taste")),
        per_visit,
    ]
    engine.apply([STATS, st.Model("echo", echo_model(tmp_path / "echo.onnx", 12), columns)])
    vectors = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    engine.push(
        "stats", {"user_id": [1, 2], "spent": [2.0, 0.0], "visits": [4, 0], "known": [9, None], "taste": vectors}
    )
    amounts = [8.0, 1.0, 6.0]
    found = engine.predict("echo", {"user_id": [1, 2, 3], "amount": amounts}).outputs["y"]
    nan, inf = math.nan, math.inf
    wanted = [
        [2, 2, 1, 10, 10 / 8, 2, 4, 6, 4, 8, 12, 2],
        [inf, 0, inf, 6, 6, 8, 10, 12, 16, 20, 24, inf],
        [nan, nan, nan, 6, 1, nan, nan, nan, nan, nan, nan, nan],
    ]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    with st.Engine.open(engine.store.path) as other:  # from the catalog alone
        again = other.predict("echo", {"user_id": [1, 2, 3], "amount": amounts}).outputs["y"]
        np.testing.assert_array_equal(again, found)
    program = engine.plan_for_model("echo").transforms
    assert program is not None
    addresses = [address for address, _, _ in program.steps]
    kinds = (ratio, plus_one, doubled)
    computed = [f for f in kinds for dtype in (f.returns.numpy, np.float32) if compile_on_demand(f, dtype) in addresses]
    assert {f.name for f in computed} == {"ratio", "plus_one", "doubled"}
    # Each is computed once: per_visit and its ratio, plus_one and its ratio, doubled, and doubled of that. Copies and
    # conversions are not counted here.
    assert (
        sum(addresses.count(a) for a in {compile_on_demand(f, d) for f in kinds for d in ("f4", f.returns.numpy)}) == 6
    )


def test_arguments_are_checked_against_parameter_types(engine: st.Engine, tmp_path: Path) -> None:
    path = echo_model(tmp_path / "echo.onnx", 1)
    for column, message in (
        (plus_one("stats:spent"), "parameter 'n' is Int64, but stats:spent is Float32"),
        (
            plus_one(ratio("stats:spent", "request:x")),
            r"parameter 'n' is Int64, but ratio\(stats:spent, request:x\) is Float32",
        ),
        (ratio("stats:taste", "request:x"), r"parameter 'a' is Float64, but stats:taste is Vector\(3\)"),
        (ratio("request:x", ratio("request:y", "stats:no")), "has no feature 'no'"),
    ):
        with pytest.raises(st.ShorttailError, match=message):
            engine.apply([STATS, st.Model("echo", path, [column])])
    with pytest.raises(InvalidArgument, match=r"argument of ratio\(...\): call ratio with its arguments"):
        ratio("request:x", ratio)  # type: ignore[arg-type]
    nested = ratio("request:x", "request:x")
    for _ in range(7):
        nested = ratio(nested, nested)
    with pytest.raises(InvalidArgument, match="nest at most 8 deep"):
        ratio(nested, nested)


def test_a_long_batch_leaves_the_gil_to_others() -> None:
    @st.on_demand
    def slow(x: st.Float64) -> st.Float64:  # type: ignore[valid-type]
        while x > 0:
            x -= 1.0
        return x

    arrays = [np.full(300, 1e6), np.zeros(300)]
    program = TransformProgram([(compile_on_demand(slow), [(0, np.float64, 1)], (1, np.float64, 1, 0))])
    begun, ended = threading.Event(), []

    def work() -> None:
        begun.set()
        program.run(arrays, 300)
        ended.append(True)

    worker = threading.Thread(target=work)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread that does not let go of the GIL keeps it
    try:
        worker.start()
        begun.wait()
        ended_before_others_ran = bool(ended)
    finally:
        sys.setswitchinterval(before)
        worker.join()
    assert ended
    assert not ended_before_others_ran
