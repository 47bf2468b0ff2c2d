# make demo: quantize the bundled model and compare. make test: all checks, with the newest of every package.
# make test-oldest: the tests with the lowest version of every package that pyproject.toml allows.
# make clean: drop what these made.
# TORCH says which torch to install: `make demo TORCH=torch` for the newest, `TORCH=torch==2.14.1` for another one.
PYTHON ?= python3
TORCH ?= $(shell grep '^torch' constraints.txt)
BIN := .venv/bin
OLDEST := .venv-oldest
PIP_INSTALL := pip install --disable-pip-version-check -q
PYTEST := pytest -n logical --maxprocesses 8 --dist loadfile
TEXT := --text examples/tiny-llama/eval.txt --tokens 32768
CALIBRATION := --calibration examples/tiny-llama/calibration.txt --samples 128 --seq-len 256
RESULT := out/tiny-llama-awq

.PHONY: demo test test-oldest clean FORCE
.DELETE_ON_ERROR:

demo: .venv/.installed
	rm -rf $(RESULT) $(RESULT).*
	mkdir -p out
	$(BIN)/quantkit quantize examples/tiny-llama --recipe awq $(CALIBRATION) --output $(RESULT)
	$(BIN)/quantkit eval examples/tiny-llama $(TEXT) --json > out/original.json
	$(BIN)/quantkit eval $(RESULT) --ref examples/tiny-llama $(TEXT) --json > out/quantized.json
	$(BIN)/python examples/demo.py out/original.json out/quantized.json $(RESULT)

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(PYTEST)

clean:
	rm -rf .venv $(OLDEST) out

# written only when TORCH is not what it was, so that another torch is installed exactly then
.venv/constraints.txt: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch goes first and is pinned from then on, so that no other package can pull a different one
.venv/.torch: .venv/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) -c .venv/constraints.txt '$(TORCH)'
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(BIN)/$(PIP_INSTALL) -c .venv/constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/$(PIP_INSTALL) -c .venv/constraints.txt -e '.[dev]'
	touch $@

# an environment of its own, made from nothing whenever a lower bound may have changed
$(OLDEST)/.installed: pyproject.toml tests/tools/oldest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) tests/tools/oldest.py pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/$(PIP_INSTALL) -c $(OLDEST)/constraints.txt -e '.[data,kernels,dev]'
	touch $@
