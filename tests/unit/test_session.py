"""Models in ONNX Runtime: every type of tensor, any number of rows, results in their own memory, memory that does not
grow with batch sizes, warm-up and devices.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument
from shorttail.models import device as devices
from shorttail.models.buckets import BucketSession
from shorttail.models.device import Device, check_cuda
from shorttail.models.load import Runner, load_runner
from shorttail.models.session import FixedRows, Session, one_line
from shorttail.models.settings import DEFAULT, RunSettings

Shape = Sequence[int | str | None]
FLOAT, DOUBLE, INT32, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64
BOOL, STRING = TensorProto.BOOL, TensorProto.STRING
Take = dict[str, tuple[int, Shape]]


def save(path: Path, nodes: list[Any], takes: Take, gives: Take, **constants: Any) -> Path:
    tensors = [[helper.make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (takes, gives)]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", tensors[0], tensors[1], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def scaled(
    path: Path, rows: int | str | None = None, width: int | str | None = 4, declared: Shape | None = None
) -> Path:
    """Save a model y = 2 x, and s = the sum of each row of x."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"]),
        helper.make_node("ReduceSum", ["x", "axis"], ["s"], keepdims=0),
    ]
    gives: Take = {"y": (FLOAT, [rows, width]), "s": (FLOAT, [rows] if declared is None else declared)}
    return save(path, nodes, {"x": (FLOAT, [rows, width])}, gives, two=np.float32(2), axis=np.array([1]))


def check_scaled(run: Callable[[list[Any]], list[Any]], rows: int, width: int = 4) -> list[Any]:
    x = np.arange(rows * width, dtype=np.float32).reshape(rows, width) - rows
    y, s = run([x])
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(s, x.sum(axis=1))
    return [y, s]


def every_type(path: Path, rows: str | int = "N") -> Path:
    """Save a model with an input of every type, each of which is an output too, changed or unchanged."""
    kinds = {"f": FLOAT, "d": DOUBLE, "i": INT32, "l": INT64, "b": BOOL, "s": STRING}
    nodes = [
        helper.make_node("Add", [name, name], [f"{name}_out"])
        if name in "fdil"
        else helper.make_node("Not" if name == "b" else "Identity", [name], [f"{name}_out"])
        for name in kinds
    ]
    takes: Take = {name: (kind, [rows, 3] if name in "fds" else [rows]) for name, kind in kinds.items()}
    gives: Take = {f"{name}_out": (kind, takes[name][1]) for name, kind in kinds.items()}
    return save(path, nodes, takes, gives)


SESSIONS: dict[str, Callable[[Path], Any]] = {
    "exact": Session,
    "padded": lambda path: BucketSession(path, owned=False),
    "owned": lambda path: BucketSession(path, owned=True),
}


@pytest.fixture(params=SESSIONS)
def opened(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return SESSIONS[request.param]


@pytest.mark.parametrize("rows", [1, 5])
def test_every_type_of_tensor_goes_in_and_comes_out(tmp_path: Path, rows: int) -> None:
    runner = load_runner(every_type(tmp_path / "m.onnx"), [f"{name}_out" for name in "sbldif"])
    number = np.arange(rows * 3).reshape(rows, 3) - 1
    text = np.array([[f"é{i}", "", "a" * 300] for i in range(rows)], object)
    inputs = [number.astype("f4"), number.astype("f8"), number[:, 0].astype("i4"), number[:, 1], number[:, 2] > 0, text]
    s, b, n64, f64, n32, f32 = runner.run(inputs)
    assert s.tolist() == text.tolist()
    assert b.tolist() == (number[:, 2] <= 0).tolist()
    for got, given in ((n64, inputs[3]), (f64, inputs[1]), (n32, inputs[2]), (f32, inputs[0])):
        assert got.dtype == given.dtype
        np.testing.assert_array_equal(got, given * 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 64, 65, 1000])
def test_any_number_of_rows(tmp_path: Path, opened: Callable[[Path], Any], rows: int) -> None:
    check_scaled(opened(scaled(tmp_path / "m.onnx")).run, rows)


def test_a_batch_of_no_rows(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    y, s = opened(scaled(tmp_path / "m.onnx")).run([np.empty((0, 4), np.float32)])
    assert (y.shape, s.shape) == ((0, 4), (0,))


def test_padded_batches_above_the_largest_bucket_run_in_pieces(tmp_path: Path) -> None:
    check_scaled(BucketSession(scaled(tmp_path / "m.onnx")).run, 2 * LIMITS.bucket_rows + 3)


def test_the_width_may_be_open_and_change(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    session = opened(scaled(tmp_path / "m.onnx", "N", "W"))
    for width in (2, 5, 2):
        check_scaled(session.run, 3, width)


@pytest.mark.parametrize("declared", [[1], [7]])
def test_an_output_whose_shape_is_declared_wrongly(
    tmp_path: Path, opened: Callable[[Path], Any], declared: list[int]
) -> None:
    """The LightGBM converter declares labels this way."""
    session = opened(scaled(tmp_path / "m.onnx", declared=declared))
    for rows in (1, 3, 8, 3):
        check_scaled(session.run, rows)


@pytest.mark.parametrize("fixed", [1, 4])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 9])
def test_files_exported_for_a_fixed_number_of_rows(tmp_path: Path, fixed: int, rows: int) -> None:
    path = scaled(tmp_path / "m.onnx", fixed)
    for settings in (DEFAULT, RunSettings(padded=True)):
        if rows:
            check_scaled(load_runner(path, ["y", "s"], settings).run, rows)
    texts = load_runner(every_type(tmp_path / "t.onnx", fixed), ["s_out", "b_out"])
    inputs = [np.zeros((rows, 3), t) for t in ("f4", "f8")] + [np.zeros(rows, t) for t in ("i4", "i8", "?")]
    words = np.full((rows, 3), "word", object)
    s, b = texts.run([*inputs, words])
    assert (s.tolist(), b.tolist()) == (words.tolist(), [True] * rows)


def test_results_are_not_overwritten_by_the_next_batch(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    session = opened(scaled(tmp_path / "m.onnx"))
    for rows in (1, 4, 5):
        answers = [session.run([np.full((rows, 4), n, np.float32)]) for n in range(6)]
        given = np.full((rows, 4), 9, np.float32)
        last = session.run([given])
        given[:] = -1
        assert (last[0] == 18).all()
        for n, (y, s) in enumerate(answers):
            assert (y == 2 * n).all()
            assert (s == 4 * n).all()
            assert not any(np.shares_memory(y, other[0]) for other in answers if other[0] is not y)


def test_an_output_that_is_an_input_has_its_own_memory(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    session = opened(save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["N"])}, {"y": (FLOAT, ["N"])}))
    x = np.arange(4, dtype=np.float32)
    (y,) = session.run([x])
    x[:] = 7
    session.run([x])
    assert y.tolist() == [0, 1, 2, 3]


def test_padding_does_not_influence_results(tmp_path: Path) -> None:
    """Rows of an earlier, larger batch do not influence a smaller one, and rows do not influence each other."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["N", 1])}, {"y": (FLOAT, ["N", 1])})
    session = BucketSession(path, owned=False)
    session.run([np.full((4, 1), 1000, np.float32)])
    (y,) = session.run([np.full((3, 1), 5, np.float32)])
    assert y.ravel().tolist() == [0, 0, 0]  # 1000 of the batch before is not in the fourth row any more


def test_threads_share_a_session(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    session = opened(scaled(tmp_path / "m.onnx"))

    def work(seed: int) -> None:
        sizes = random.Random(seed)
        for _ in range(40):
            check_scaled(session.run, sizes.randint(1, 40))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_one_thread_makes_all_runs_also_its_own(tmp_path: Path) -> None:
    session = BucketSession(scaled(tmp_path / "m.onnx"), owned=True)
    seen = set()
    inner = session._run_padded

    def noted(inputs: Sequence[Any]) -> Any:
        seen.add(threading.get_ident())
        return inner(inputs)

    with mock.patch.object(session, "_run_padded", noted):
        check_scaled(session.run, 3)
        assert session.executor is not None
        session.executor.submit(check_scaled, session.run, 5).result(timeout=10)
    assert len(seen) == 1
    assert threading.get_ident() not in seen


class SeparateMemory:
    """Does what CudaMemory does, between two places in this host's memory."""

    def __init__(self) -> None:
        self.copied_bytes: list[int] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        return np.full(shape, 77, dtype)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        assert target != source
        self.copied_bytes.append(size_bytes)
        ctypes.memmove(target, source, size_bytes)


@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_of_a_device_are_filled_and_read_by_copies(tmp_path: Path, graphs: bool) -> None:
    session = BucketSession(scaled(tmp_path / "m.onnx"))
    memory = SeparateMemory()
    session._memory, session.graphs = memory, graphs  # type: ignore[assignment]
    for rows, first in ((3, True), (1, True), (4, False), (3, False)):
        memory.copied_bytes.clear()
        check_scaled(session.run, rows)
        size = {3: 4, 1: 1, 4: 4}[rows]
        made = [size * 16] if first else []  # the rows on which new buffers are tried
        assert memory.copied_bytes == [
            *made,
            size * 16,
            rows * 16,
            rows * 4,
        ]  # all that is run, but only answers asked for


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running OneHotEncoder node."
            " Name:'tier' Status Message: Unknown Category and zeros = 0.",
            "OneHotEncoder node 'tier': Unknown Category and zeros = 0.",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'' Status"
            " Message: /src/onnxruntime/core/reshape_helper.h:91 onnxruntime::ReshapeHelper::ReshapeHelper(const"
            " onnxruntime::TensorShape&, bool) size == requested was false. The tensor cannot be reshaped.\n",
            "Reshape node: The tensor cannot be reshaped.",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type. Actual: (tensor(float))",
            "Unexpected input data type. Actual: (tensor(float))",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: /src/normalizer.cc:235"
            " onnxruntime::StringNormalizer::Locale::Locale(const std::string&)::<lambda()> Failed to construct locale",
            "Exception during initialization: Failed to construct locale",
        ),
        ("x" * 400 + " because of y", "... " + "x" * 287 + " because of y"),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gather node. Name:'"
            + "layer/" * 90
            + "' Status Message: idx=5 must be within the inclusive range [-1,0]",
            f"Gather node '{'layer/' * 90}': idx=5 must be within the inclusive range [-1,0]",
        ),
    ],
)
def test_an_error_of_onnx_runtime_keeps_its_reason(text: str, reason: str) -> None:
    assert one_line(RuntimeError(text)) == reason


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        (
            [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0), helper.make_node("Neg", ["x"], ["z"])],
            {"y": (FLOAT, []), "z": (FLOAT, ["N", 2])},
            r"output 'y' has the shape \[\] for a batch of \d; .*; name the others: outputs=\['z'\]",
        ),
        (
            [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
            {"y": (FLOAT, [])},
            r"output 'y' has the shape \[\] for a batch of \d; the first axis of an output must be the rows$",
        ),
    ],
)
@pytest.mark.parametrize("rows", [2, "N"])
def test_outputs_that_are_not_rows_are_refused_in_one_line(
    tmp_path: Path, nodes: Any, outputs: Any, message: str, rows: Any
) -> None:
    path = save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, [rows, 2])}, outputs)
    for settings in (RunSettings(), RunSettings(padded=True)):
        runner = load_runner(path, list(outputs), settings)
        with pytest.raises(InvalidArgument, match=message):
            runner.warm(lambda count: [np.ones((count, 2), np.float32)])


def test_a_width_that_depends_on_the_values_is_an_error_of_one_line(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["at"]),
        helper.make_node("Shape", ["at"], ["size"], start=1),
        helper.make_node("Concat", ["one", "size"], ["shape"], axis=0),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, {"x": (FLOAT, [1, 1])}, {"y": (FLOAT, [1, "W"])}, one=np.array([1], np.int64)
    )
    session = FixedRows(Session(path), 1)
    assert session.run([np.ones((3, 1), np.float32)])[0].tolist() == [[1], [1], [1]]
    with pytest.raises(Internal, match="the width of an output depends on the values of the rows"):
        session.run([np.array([[1], [0]], np.float32)])


def test_a_model_that_cannot_be_captured_runs_without_graphs(tmp_path: Path) -> None:
    session = BucketSession(scaled(tmp_path / "m.onnx", declared=[1]))
    session.graphs = True
    check_scaled(session.run, 3)
    assert session.graphs is False


def test_a_model_that_fails_raises_internal(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": (INT64, ["N"])}, {"y": (FLOAT, ["N"])}, table=np.ones(3, np.float32))
    session = opened(path)
    with pytest.raises(Internal, match=r"^the model failed: .*[Ii]ndices"):
        session.run([np.array([1, 99])])
    assert session.run([np.array([1, 2])])[0].tolist() == [1, 1]
    with pytest.raises(Internal, match="the model failed"):
        session.run([np.array([1.5, 2])])


GROWTH = """
import sys, numpy as np
from pathlib import Path
from shorttail.models.session import FixedRows, Session, one_line
session = Session(Path(sys.argv[1]))
random = np.random.default_rng(int(sys.argv[2]))
def rss_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
def runs(count):
    for _ in range(count):
        session.run([np.zeros((int(2 ** random.uniform(0, 11)), 64), np.float32)])
session.run([np.zeros((2048, 64), np.float32)])
runs(60)
before = rss_mb()
runs(700)
print(rss_mb() - before)
"""


def test_memory_does_not_grow_with_the_sizes_of_batches(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    width, nodes, weights = 64, [], {}
    for layer in range(6):
        weights[f"w{layer}"] = np.full((width, width), 0.01, np.float32)
        nodes += [
            helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"h{layer}"]),
            helper.make_node("Tanh", [f"h{layer}"], [f"x{layer + 1}"]),
        ]
    shape = ["N", width]
    path = save(tmp_path / "m.onnx", nodes, {"x0": (FLOAT, shape)}, {"x6": (FLOAT, shape)}, **weights)
    command = [sys.executable, "-c", GROWTH, str(path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 8, f"MB more after 700 batches, seed {seed}"


# -- warm-up and the choice of a runner ------------------------------------------------------------------------


def examples(rows: int) -> list[Any]:
    return [np.ones((rows, 4), np.float32)]


def test_warm_runs_every_power_of_two_and_records_its_time(tmp_path: Path) -> None:
    runner = load_runner(scaled(tmp_path / "m.onnx"), ["y", "s"])
    sizes = []

    def counted(rows: int) -> list[Any]:
        sizes.append(rows)
        return examples(rows)

    runner.warm(counted)
    assert sizes == [2**n for n in range(15)]
    assert sizes[-1] == LIMITS.batch_rows
    assert list(runner.measured_us) == sizes
    assert all(us > 0 for us in runner.measured_us.values())


class Slow:
    """A model that takes 100 us and 10 us per row, or other times, by a clock that it sets itself."""

    description = "a slow model"

    def __init__(self, run_ns: int = 100_000, row_ns: int = 10_000) -> None:
        self.inputs: list[Any] = []
        self.output_names = ["y"]
        self.now_ns = 0
        self.run_ns, self.row_ns = run_ns, row_ns

    def clock(self) -> int:
        return self.now_ns

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        self.now_ns += self.run_ns + self.row_ns * len(inputs[0])
        return [inputs[0]]


def warmed(slow: Slow) -> Runner:
    runner = Runner(slow, "onnxruntime", "because")
    with mock.patch("shorttail.models.load.time.perf_counter_ns", slow.clock):
        runner.warm(examples)
    return runner


def test_the_largest_batch_for_the_loop_follows_from_measured_times() -> None:
    runner = warmed(Slow())
    assert runner.description == "a slow model: because"
    assert runner.cost_us(1) == 110
    assert runner.cost_us(3) == 130  # between two that were measured
    assert runner.loop_rows_max == (LIMITS.loop_stall_us - 100) / 10
    assert runner.cost_us(runner.loop_rows_max) <= LIMITS.loop_stall_us < runner.cost_us(runner.loop_rows_max + 1)
    last = max(runner.measured_us)
    assert last == 2048  # the first that took more than LIMITS.warm_run_us
    assert runner.cost_us(8 * last) == pytest.approx(100 + 10 * 8 * last)


def test_the_fixed_cost_of_a_slow_model_is_known_after_two_sizes() -> None:
    """A model that takes 75 ms for a batch of any size: a thousand rows are not a thousand times as slow."""
    slow = Slow(75_000_000, 1_000)
    runner = warmed(slow)
    assert list(runner.measured_us) == [1, 4]
    assert runner.cost_us(1000) == pytest.approx(75_000 + 1000)


def test_a_model_with_a_thread_of_its_own_never_runs_on_the_loop(tmp_path: Path) -> None:
    buckets = BucketSession(scaled(tmp_path / "m.onnx"), owned=True)
    runner = Runner(buckets, "cuda", executor=buckets.executor)
    runner.warm(examples)
    assert runner.loop_rows_max == 0
    assert runner.measured_us


def test_an_output_without_a_row_for_each_input_row_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    runner = load_runner(save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, [])}), ["y"])
    with pytest.raises(InvalidArgument, match=r"output 'y' has the shape \[\] for a batch of 1; the first axis"):
        runner.warm(examples)


def test_the_description_names_the_runner_and_the_reason(tmp_path: Path) -> None:
    path = scaled(tmp_path / "m.onnx")
    assert load_runner(path, ["y", "s"]).description == "ONNX Runtime, 1 thread: it has a node of type ReduceSum"
    padded = load_runner(path, ["y"], RunSettings(threads=2, padded=True))
    assert padded.description == "ONNX Runtime, 2 threads, padded batches: it has no tree ensemble"
    assert padded.kind == "onnxruntime"
    text = load_runner(every_type(tmp_path / "t.onnx"), ["s_out"], RunSettings(padded=True))
    assert text.description.startswith("ONNX Runtime, 1 thread: ")
    assert text.why.endswith("; strings cannot be bound to buffers")
    assert load_runner(scaled(tmp_path / "f.onnx", 2), ["y"]).description.startswith(
        "ONNX Runtime, 1 thread, 2 rows at a time: "
    )


def test_an_engine_serves_a_file_made_for_one_row(tmp_path: Path) -> None:
    user = st.Entity("user", keys={"id": st.Int64})
    view = st.FeatureView("v", entity=user, features=[st.Feature("taste", st.Vector(3))])
    model = st.Model("m", path=str(scaled(tmp_path / "m.onnx", 1)), inputs=["v:taste", "request:amount"])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([user, view, model])
        engine.push("v", {"id": [1, 2], "taste": [[1, 2, 3], [4, 5, 6]]})
        assert engine.models()[0]["runs"] is None
        answer = engine.predict("m", {"id": [2, 1, 2], "amount": [1, 1, 2]})
        assert answer.outputs["s"].tolist() == [16, 7, 17]
        assert engine.models()[0]["runs"].startswith("ONNX Runtime, 1 thread, 1 row at a time: ")


def test_an_engine_names_the_model_that_cannot_be_warmed_up(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)]
    path = save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["N", 1])}, {"y": (FLOAT, [1, 1])})
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        with pytest.raises(
            InvalidArgument, match=r"^model 'm' version 1: output 'y' has the shape \[1, 1\] for a batch of 2"
        ):
            engine.apply([st.Model("m", path=str(path), inputs=["request:a"])])
        assert engine.models() == []


# -- devices ---------------------------------------------------------------------------------------------------


def test_names_of_devices() -> None:
    assert Device.parse("cpu") == devices.CPU
    assert Device.parse("cuda") == Device.parse("cuda:0") == Device("cuda", 0)
    assert str(Device.parse("cuda:3")) == "cuda:3"
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""):
        with pytest.raises(InvalidArgument, match=f"device '{wrong}': it must be cpu, cuda or cuda:N"):
            Device.parse(wrong)


def test_two_installed_runtimes_are_refused() -> None:
    both = {"onnxruntime", "onnxruntime-gpu"}
    with mock.patch.object(devices, "installed_runtimes", return_value=both), pytest.raises(InvalidArgument) as caught:
        check_cuda(Device("cuda"))
    assert "both installed" in caught.value.message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu" in caught.value.message


def test_a_runtime_for_cpus_only_is_refused_for_cuda(tmp_path: Path) -> None:
    providers = ["CPUExecutionProvider"]
    with (
        mock.patch.object(devices, "installed_runtimes", return_value={"onnxruntime"}),
        mock.patch("onnxruntime.get_available_providers", return_value=providers),
        pytest.raises(InvalidArgument, match="device 'cuda:1': the installed onnxruntime is for CPUs only; run: pip"),
    ):
        st.Engine.open(tmp_path / "store", create=True, device="cuda:1")
    assert not (tmp_path / "store").exists()


def test_a_host_without_a_driver_is_refused_for_cuda() -> None:
    with (
        mock.patch.object(devices, "installed_runtimes", return_value={"onnxruntime-gpu"}),
        mock.patch("onnxruntime.get_available_providers", return_value=["CUDAExecutionProvider"]),
        mock.patch.object(devices.ctypes, "CDLL", mock.Mock(side_effect=OSError("no such file"))),
        pytest.raises(InvalidArgument, match=r"there is no NVIDIA driver on this host \(no libcuda.so.1\)"),
    ):
        check_cuda(Device("cuda"))
