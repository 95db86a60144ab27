"""On-demand features: users' functions, compiled into loops over a batch that neither need the GIL nor can raise.

Numba turns a function into LLVM's language and LLVM turns that into machine code, which is kept (codecache.py): the
next process loads it through llvmlite alone, in milliseconds, and never imports Numba. What division by zero,
overflow and the like give is written in docs/on-demand.md; a row that fails all the same gets NaN or 0, and its batch
goes on.
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
from shorttail.define.ondemand import OnDemand, codecache, numerics
from shorttail.errors import InvalidArgument

FREE = "NRT_MemInfo_call_dtor"

_addresses: dict[tuple[OnDemand, str], int] = {}
_lock = threading.RLock()  # LLVM's and Numba's state is the process's


class NotLoadable(Exception):
    """Machine code that refers to something that this process does not have."""


def compile_on_demand(function: OnDemand, out_dtype: Any = None) -> int:
    """The address of a loop over rows for a TransformProgram. It stays valid as long as the process.

    out_dtype: numpy type of the output, by default that of the return annotation. Raises InvalidArgument when numba
    is missing or the function does not compile.
    """
    target = np.dtype(out_dtype if out_dtype is not None else function.returns.numpy)
    with _lock:
        known = _addresses.get((function, target.name))
        if known is None:
            known = _addresses[function, target.name] = _load_or_compile(function, target)
    return known


def copy_function(dtype: DType) -> OnDemand:
    """A function that gives its only argument: how a value that was computed once gets to a second place."""
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
            pass  # made by a Numba that has since been built otherwise
    try:
        import_module("numba")
    except ImportError:
        raise missing from None
    code = machine_code(function, target, symbol)
    address = load_object(code, symbol)
    check_length(function, target, address)
    codecache.store(key, code)
    return address


def cache_key(function: OnDemand, target: np.dtype[Any]) -> str:
    """Differs wherever the machine code may. Raises ImportError without numba or llvmlite."""
    parts: list[Any] = [function.to_json(), target.name, platform.python_version(), sorted(host_cpu())]
    try:
        parts += [(name, metadata.version(name)) for name in ("numba", "llvmlite")]
    except metadata.PackageNotFoundError as error:
        raise ImportError(str(error)) from None
    digest = hashlib.sha256(json.dumps(parts).encode())
    for name in (
        "compile.py",
        "numerics.py",
        "overloads.py",
        "intrinsics.py",
    ):  # what is generated changes with this package, too
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


# -- LLVM --------------------------------------------------------------------------------------------------------


@cache
def llvm() -> Any:
    binding: Any = import_module("llvmlite.binding")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    with suppress(RuntimeError):  # sin, exp and the like; where they are in no library of that name, Numba brings them
        binding.load_library_permanently("libm.so.6")
    return binding


@cache
def host_cpu() -> tuple[str, str]:
    """(name, features) in LLVM's words."""
    return llvm().get_host_cpu_name(), llvm().get_host_cpu_features().flatten()


@cache
def target_machine() -> Any:
    name, features = host_cpu()
    triple = llvm().Target.from_triple(llvm().get_process_triple())
    return triple.create_target_machine(cpu=name, features=features, opt=3, jit=True)


@cache
def engine() -> Any:
    """Owns all machine code that is loaded, for ever."""
    return llvm().create_mcjit_compiler(llvm().parse_assembly(""), target_machine())


def load_object(code: bytes, symbol: str) -> int:
    """The address of `symbol` in an object file, now loaded. Raises NotLoadable."""
    llvm()
    missing = [name for name in undefined_symbols(code) if not llvm().address_of_symbol(name)]
    if missing:
        try:  # Numba's runtime, for functions that make arrays
            _ = import_module("numba.core.registry").cpu_target.target_context
        except ImportError as error:
            raise NotLoadable(str(error)) from None
        missing = [name for name in missing if not llvm().address_of_symbol(name)]
    if missing:
        raise NotLoadable(f"it needs {', '.join(missing)}")  # LLVM would end the process
    engine().add_object_file(llvm().ObjectFileRef.from_data(code))
    engine().finalize_object()
    address = int(engine().get_function_address(symbol))
    if not address:
        raise NotLoadable(f"there is no {symbol}")
    return address


def undefined_symbols(code: bytes) -> Iterator[str]:
    """Names that an ELF object file takes from elsewhere."""
    sections = {section.name(): section.data() for section in llvm().ObjectFileRef.from_data(code).sections()}
    names = sections.get(b".strtab", b"")
    for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections.get(b".symtab", b"")):
        if name and section == 0:
            yield names[name : names.index(b"\0", name)].decode()


def object_file(text: str, entry: str, symbol: str) -> bytes:
    """Machine code of LLVM's text; only its function `entry` can be seen from outside, as `symbol`."""
    module = llvm().parse_assembly(without_runtime(text))
    for function in module.functions:
        if not function.is_declaration:
            function.linkage = "external" if function.name == entry else "internal"
    main = module.get_function(entry)
    if [str(argument.type) for argument in main.arguments] != ["ptr", "ptr", "ptr", "i64"]:
        raise NotLoadable("this version of Numba calls functions otherwise")
    main.name = symbol
    passes = llvm().create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm().create_pass_builder(target_machine(), llvm().create_pipeline_tuning_options()))
    return bytes(target_machine().emit_object(module))


def without_runtime(text: str) -> str:
    """A text that frees arrays but makes none (they are the runner's) need not be bound to Numba's runtime."""
    if set(re.findall(r"^declare .*@(NRT_\w+)\(", text, re.MULTILINE)) != {FREE}:
        return text
    return re.sub(rf"^declare void @{FREE}\(.*$", f"define void @{FREE}(ptr %array) {{ ret void }}", text, flags=re.M)


# -- Numba -------------------------------------------------------------------------------------------------------

OPTIONS = {"nogil": True, "error_model": "numpy"}
MISSING = {"b": "0", "i": "0", "f": "np.nan"}


def machine_code(function: OnDemand, target: np.dtype[Any], symbol: str) -> bytes:
    """An object file of the loop over rows. Raises InvalidArgument with what is wrong with the function."""
    numba: Any = import_module("numba")
    explain = import_module("shorttail.ondemand.explain")
    intrinsics: Any = import_module("shorttail.ondemand.intrinsics")
    import_module("shorttail.ondemand.overloads")
    namespace: dict[str, Any] = {"np": np, "math": import_module("math"), **numerics.NAMES}
    types = [argument_type(numba, dtype) for _, dtype in function.params]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Numba, about speed
            exec(compile(numerics.rewrite(function.source), explain.FILE, "exec"), namespace)
            for name, value in namespace.items():
                if isinstance(value, FunctionType) and name not in numerics.NAMES:
                    # Indices are checked: a request must not choose which memory is read.
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
    numba: Any = import_module("numba")
    signature = numba.intp(numba.types.CPointer(numba.intp), numba.intp)
    options = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = numba.njit([signature], **options)(loop)
    overload = compiled.overloads[compiled.signatures[0]]
    return object_file(compiled.inspect_llvm(compiled.signatures[0]), overload.fndesc.llvm_func_name, symbol)


def argument_type(numba: Any, dtype: DType) -> Any:
    kind = numba.from_dtype(np.dtype(dtype.numpy))
    return numba.types.Array(kind, 1, "C", readonly=True) if dtype.is_vector else kind


def loop_source(function: OnDemand, target: np.dtype[Any], result: Any) -> str:
    """A loop that calls the function for each row; its argument is a table as TransformProgram fills it.

    Returns the rows that failed, and those whose vector was of another length times 2**32.
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
    elif hasattr(result, "types"):  # a tuple: its items may be of different types
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
    """The type that a pointer to such values has: Numba's pointers to bits do not work."""
    return "uint8" if np.dtype(dtype) == np.bool_ else np.dtype(dtype).name


CONVERSIONS = {
    "bool": "_shorttail_truth({})",
    "int32": "_shorttail_whole32({})",
    "int64": "_shorttail_whole({})",
    "float32": "np.float32({})",
    "float64": "np.float64({})",
}


def converted(value: str, returns: DType, target: np.dtype[Any]) -> str:
    """First to the type that the function declares, then to that of the output."""
    declared = np.dtype(returns.numpy)
    value = CONVERSIONS[declared.name].format(value)
    value = value if declared == target else CONVERSIONS[target.name].format(value)
    return f"np.uint8({value})" if target == np.bool_ else value


def check_length(function: OnDemand, target: np.dtype[Any], address: int) -> None:
    """Run a function that gives a vector on a row of ones. Raises InvalidArgument if its length is another one."""
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
            explain.paragraph(function, f"it gives a vector of another length than {function.returns}, as declared")
        )
