"""Compiles on-demand functions into loops over a batch, which do not need the GIL and cannot raise.

Numba compiles a function to LLVM's language, and LLVM compiles that to machine code, which is cached (codecache.py).
The next process loads it through llvmlite alone, in milliseconds, and does not import Numba. docs/on-demand.md says
what division by zero, overflow and the like give. A row that still fails gets NaN or 0, and its batch goes on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from shorttail._native.transforms import TransformProgram
from shorttail.define.dtypes import Bool, DType
from shorttail.define.ondemand import OnDemand
from shorttail.errors import InvalidArgument
from shorttail.ondemand import codecache, numerics

FREE = "NRT_MemInfo_call_dtor"

_addresses: dict[tuple[OnDemand, str], int] = {}
# Why functions of stores do not compile here, so that no further request tries it.
_refusals: dict[tuple[OnDemand, str], str] = {}
_lock = threading.RLock()  # LLVM and Numba have state that all threads of the process share


class NotLoadable(Exception):
    """Raised for machine code that refers to a symbol which this process does not have."""


def compile_on_demand(function: OnDemand, out_dtype: Any = None) -> int:
    """Return the address of the function's loop over rows, for a TransformProgram. It is valid until the process ends.

    out_dtype: NumPy dtype of the output, by default that of the return annotation.
    Raises InvalidArgument if Numba is missing or the function does not compile.
    """
    target = np.dtype(out_dtype if out_dtype is not None else function.returns.numpy)
    with _lock:
        known = _addresses.get((function, target.name))
        if known is None:
            known = _addresses[function, target.name] = _load_or_compile(function, target)
    return known


def copy_function(dtype: DType) -> OnDemand:
    """Return a function that returns its argument. It copies a value that was computed once to a second place."""
    return OnDemand("copy", (("x", dtype),), dtype, "def copy(x):\n    return x\n")


def _load_or_compile(function: OnDemand, target: np.dtype[Any]) -> int:
    missing = InvalidArgument(
        f"on-demand function '{function.name}' needs Numba; install it with `pip install shorttail[numba]`"
    )
    try:
        key = cache_key(function, target)
    except ImportError:
        raise missing from None
    symbol = f"shorttail_{key[:32]}"
    stored = codecache.load(key)
    if stored is not None:
        try:
            return load_object(stored, symbol)
        except NotLoadable:
            pass  # the Numba that compiled it was built in another way, so the function is compiled again
    try:
        import_module("numba")
    except ImportError:
        raise missing from None
    if (refusal := _refusals.get((function, target.name))) is not None:
        raise InvalidArgument(refusal)
    try:
        code = machine_code(function, target, symbol)
        address = load_object(code, symbol)
        check_length(function, target, address)
    except InvalidArgument as error:
        if function.origin is None:  # the text of others depends on where they were written
            _refusals[function, target.name] = error.message
        raise
    codecache.store(key, code)
    return address


def cache_key(function: OnDemand, target: np.dtype[Any]) -> str:
    """Return a hash of everything that the machine code depends on. Raises ImportError without numba or llvmlite."""
    parts: list[Any] = [function.to_json(), target.name, platform.python_version(), sorted(host_cpu())]
    try:
        parts += [(name, metadata.version(name)) for name in ("numba", "llvmlite")]
    except metadata.PackageNotFoundError as error:
        raise ImportError(str(error)) from None
    digest = hashlib.sha256(json.dumps(parts).encode())
    # The generated code also depends on these files of this package.
    for name in ("compile.py", "numerics.py", "overloads.py", "intrinsics.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


# -- LLVM --------------------------------------------------------------------------------------------------------


@cache
def llvm() -> Any:
    """Return llvmlite.binding, initialized for this processor."""
    binding: Any = import_module("llvmlite.binding")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    with suppress(RuntimeError):  # for sin, exp, ...; on a system without this library Numba provides them
        binding.load_library_permanently("libm.so.6")
    return binding


@cache
def host_cpu() -> tuple[str, str]:
    """Return the name and the features of this processor as LLVM spells them."""
    return llvm().get_host_cpu_name(), llvm().get_host_cpu_features().flatten()


@cache
def target_machine() -> Any:
    name, features = host_cpu()
    triple = llvm().Target.from_triple(llvm().get_process_triple())
    return triple.create_target_machine(cpu=name, features=features, opt=3, jit=True)


@cache
def engine() -> Any:
    """Return the LLVM engine that owns all loaded machine code until the process ends."""
    return llvm().create_mcjit_compiler(llvm().parse_assembly(""), target_machine())


def load_object(code: bytes, symbol: str) -> int:
    """Load an object file and return the address of `symbol` in it. Raises NotLoadable."""
    llvm()
    missing = [name for name in undefined_symbols(code) if not llvm().address_of_symbol(name)]
    if missing:
        try:  # importing Numba's runtime defines the symbols that functions with arrays need
            _ = import_module("numba.core.registry").cpu_target.target_context
        except ImportError as error:
            raise NotLoadable(str(error)) from None
        missing = [name for name in missing if not llvm().address_of_symbol(name)]
    if missing:
        raise NotLoadable(f"it needs {', '.join(missing)}")  # with a missing symbol LLVM would abort the process
    engine().add_object_file(llvm().ObjectFileRef.from_data(code))
    engine().finalize_object()
    address = int(engine().get_function_address(symbol))
    if not address:
        raise NotLoadable(f"there is no {symbol}")
    return address


def undefined_symbols(code: bytes) -> Iterator[str]:
    """Yield the names that an ELF object file uses and does not define."""
    sections = {section.name(): section.data() for section in llvm().ObjectFileRef.from_data(code).sections()}
    names = sections.get(b".strtab", b"")
    for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections.get(b".symtab", b"")):
        if name and section == 0:
            yield names[name : names.index(b"\0", name)].decode()


def object_file(text: str, entry: str, symbol: str) -> bytes:
    """Compile LLVM assembly to an object file that exports only the function `entry`, under the name `symbol`."""
    module = llvm().parse_assembly(without_runtime(text))
    for function in module.functions:
        if not function.is_declaration:
            function.linkage = "external" if function.name == entry else "internal"
    main = module.get_function(entry)
    if [str(argument.type) for argument in main.arguments] != ["ptr", "ptr", "ptr", "i64"]:
        raise NotLoadable("this version of Numba has another calling convention")
    main.name = symbol
    passes = llvm().create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm().create_pass_builder(target_machine(), llvm().create_pipeline_tuning_options()))
    return bytes(target_machine().emit_object(module))


def without_runtime(text: str) -> str:
    """Return LLVM assembly that does not need Numba's runtime, if its only use there is to free arrays.

    Such code makes no arrays itself, and the arrays that it would free belong to the runner.
    """
    if set(re.findall(r"^declare .*@(NRT_\w+)\(", text, re.MULTILINE)) != {FREE}:
        return text
    return re.sub(rf"^declare void @{FREE}\(.*$", f"define void @{FREE}(ptr %array) {{ ret void }}", text, flags=re.M)


# -- Numba -------------------------------------------------------------------------------------------------------

OPTIONS = {"nogil": True, "error_model": "numpy"}
MISSING = {"b": "0", "i": "0", "f": "np.nan"}


def machine_code(function: OnDemand, target: np.dtype[Any], symbol: str) -> bytes:
    """Return an object file of the loop over rows. Raises InvalidArgument that explains what does not compile."""
    numba: Any = import_module("numba")
    explain = import_module("shorttail.ondemand.explain")
    intrinsics: Any = import_module("shorttail.ondemand.intrinsics")
    import_module("shorttail.ondemand.overloads")
    namespace: dict[str, Any] = {"np": np, "math": import_module("math"), **numerics.NAMES}
    types = [argument_type(numba, dtype) for _, dtype in function.params]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Numba warns about speed
            exec(compile(numerics.rewrite(function.source), explain.FILE, "exec"), namespace)
            for name, value in namespace.items():
                if isinstance(value, FunctionType) and name not in numerics.NAMES:
                    # Indices are checked, because they may come from a request.
                    namespace[name] = numba.njit(boundscheck=True, **OPTIONS)(value)
            scalar = namespace[function.name]
            scalar.compile(tuple(types))
            result = numba.types.unliteral(scalar.nopython_signatures[0].return_type)
            reason = explain.wrong_result(function, result)
            if reason is None:
                exec(loop_source(function, target, result), namespace | vars(intrinsics), namespace)
                return loop_code(namespace["loop"], symbol)
    except Exception as error:
        reason = explain.explain(function, error)
    raise InvalidArgument(explain.paragraph(function, reason))


def loop_code(loop: FunctionType, symbol: str) -> bytes:
    """Compile the loop with Numba and return its object file."""
    numba: Any = import_module("numba")
    signature = numba.intp(numba.types.CPointer(numba.intp), numba.intp)
    options = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = numba.njit([signature], **options)(loop)
    overload = compiled.overloads[compiled.signatures[0]]
    return object_file(compiled.inspect_llvm(compiled.signatures[0]), overload.fndesc.llvm_func_name, symbol)


def argument_type(numba: Any, dtype: DType) -> Any:
    """Return Numba's type of a parameter; a vector is a read-only array."""
    kind = numba.from_dtype(np.dtype(dtype.numpy))
    return numba.types.Array(kind, 1, "C", readonly=True) if dtype.is_vector else kind


def loop_source(function: OnDemand, target: np.dtype[Any], result: Any) -> str:
    """Return the source of a loop that calls the function for each row.

    The loop's argument is a table of addresses, which TransformProgram fills. The loop returns the number of rows that
    failed, plus 2**32 times the number of rows whose vector has a wrong length. target: dtype of the output.
    """
    columns, values, width = [], [], function.returns.width
    for i, (_, dtype) in enumerate(function.params):
        if dtype.is_vector:
            columns.append(f"address_{i} = table[{i}]")
            values.append(f"vector(address_{i} + row * {4 * dtype.width}, {dtype.width})")
        else:
            columns.append(f"column_{i} = pointer(table[{i}], np.{stored_type(dtype.numpy)})")
            values.append(f"column_{i}[row]{' != 0' if dtype == Bool else ''}")
    n = len(function.params)
    columns += [f"out = pointer(table[{n}], np.{stored_type(target)})", f"stride = table[{n + 1}]"]
    missing = MISSING[target.kind]
    if not function.returns.is_vector:
        store = [f"out[row * stride] = {converted('value', function.returns, target)}"]
    elif hasattr(result, "types"):  # a tuple, whose items may have different types
        store = [
            f"out[row * stride + {k}] = {converted(f'value[{k}]', function.returns, target)}" for k in range(width)
        ]
    else:
        store = [
            f"if len(value) == {width}:",
            f"    for k in range({width}):",
            f"        out[row * stride + k] = {converted('value[k]', function.returns, target)}",
            "else:",
            f"    for k in range({width}):",
            f"        out[row * stride + k] = {missing}",
            "    failed += 1 << 32",
        ]
    lines = [
        "def loop(table, rows):",
        *(f"    {line}" for line in columns),
        "    failed = np.int64(0)",
        "    for row in range(rows):",
        f"        ok, value = attempt({function.name}, ({', '.join(values)},))",
        "        if ok:",
        *(f"            {line}" for line in store),
        "        else:",
        f"            for k in range({width}):",
        f"                out[row * stride + k] = {missing}",
        "            failed += 1",
        "    return failed",
    ]
    return "\n".join(lines) + "\n"


def stored_type(dtype: Any) -> str:
    """Return the element type of a pointer to such values. Numba's pointers to bool do not work, so it is uint8."""
    return "uint8" if np.dtype(dtype) == np.bool_ else np.dtype(dtype).name


CONVERSIONS = {
    "bool": "_shorttail_truth({})",
    "int32": "_shorttail_whole32({})",
    "int64": "_shorttail_whole({})",
    "float32": "np.float32({})",
    "float64": "np.float64({})",
}


def converted(value: str, returns: DType, target: np.dtype[Any]) -> str:
    """Return an expression that converts a value to the declared type and then to the output's type."""
    declared = np.dtype(returns.numpy)
    value = CONVERSIONS[declared.name].format(value)
    value = value if declared == target else CONVERSIONS[target.name].format(value)
    return f"np.uint8({value})" if target == np.bool_ else value


def check_length(function: OnDemand, target: np.dtype[Any], address: int) -> None:
    """Run a function with a vector result on a row of ones. Raises InvalidArgument if the length is not as declared."""
    if not function.returns.is_vector:
        return
    arrays = [np.ones((1, dtype.width), dtype.numpy) for _, dtype in function.params]
    arrays.append(np.empty((1, function.returns.width), target))
    arguments = [(i, dtype.numpy, dtype.width) for i, (_, dtype) in enumerate(function.params)]
    program = TransformProgram([(address, arguments, (len(arguments), target, function.returns.width, 0))])
    program.run(arrays, 1)
    if program.wrong_lengths:
        explain = import_module("shorttail.ondemand.explain")
        raise InvalidArgument(
            explain.paragraph(function, f"it is declared to return {function.returns}, but returns another length")
        )
