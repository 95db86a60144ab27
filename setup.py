"""Builds native/*.pyx into shorttail._native.*; everything else is in pyproject.toml.

Switches (environment): DEBUG=1 no optimisation, assertions on; ANNOTATE=1 Cython's HTML; SANITIZE=1 ASan and UBSan,
SANITIZE=fuzzer these and clang's coverage for a fuzzer (with CC=clang).
"""

import os
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG, ANNOTATE = (os.environ.get(name, "0") == "1" for name in ("DEBUG", "ANNOTATE"))
SANITIZE = os.environ.get("SANITIZE", "0")
# Objects are built again when their sources change, not when flags change: so each set of flags has its own folder.
base = f"build/sanitize-{SANITIZE}" if SANITIZE != "0" else "build/debug" if DEBUG else "build"

flags = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g1"]
link_flags = []
if SANITIZE != "0":
    link_flags = ["-fsanitize=address,undefined" + (",fuzzer-no-link" if SANITIZE == "fuzzer" else "")]
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *link_flags]

# The wheel takes all that lies in this folder. A module that was moved or deleted since the last build would still be
# there, so delete all copies; compiled objects stay.
for copied in Path(base).glob("lib*/shorttail/**/*.*"):
    if copied.suffix != ".so":
        copied.unlink()

# A module here cimports another by the name it has once installed (shorttail._native.columns), so give
# Cython a folder in which native/ bears that name.
alias = Path(f"{base}/cimport/shorttail/_native")
alias.parent.mkdir(parents=True, exist_ok=True)
if alias.is_symlink():
    alias.unlink()
alias.symlink_to(Path("native").resolve())

# kernel -> plain C files compiled beside it
sources = {
    "columns": [],
    "route": [],
    "pages": [
        *(f"native/{part}.c" for part in ("crc32c", "page", "lookup", "tree", "structure", "merge", "overlay", "load")),
        *(f"native/{part}.c" for part in ("secret_hash", "scan", "writeback")),
    ],
    "forest": [f"native/forest_{part}.c" for part in ("run", "build", "pack", "plain", "avx2", "avx512")],
    "wire": [],
    "runs": [],
    "metrics": [],
    "transforms": [],
    "loadtest": [f"native/loadtest_{part}.c" for part in ("run", "open", "connection", "answer", "http", "encode")],
}

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"shorttail._native.{name}",
                [f"native/{name}.pyx", *c_files],
                include_dirs=["native", numpy.get_include()],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
                depends=[str(path) for path in Path("native").glob("*.[hp]*")],
                extra_compile_args=flags,
                extra_link_args=link_flags,
            )
            for name, c_files in sources.items()
        ],
        include_path=[f"{base}/cimport"],
        build_dir=f"{base}/cython",
        annotate=ANNOTATE,
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": False,
        },
    ),
    options={"build": {"build_base": base}, "build_ext": {"parallel": len(os.sched_getaffinity(0))}},
)
