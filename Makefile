# Every target makes .venv first when it is missing. CI calls nothing but these.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: example test test-slow rehearse style quality clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'  # bytecode of all 16,600 modules takes 48 s
	touch $@

example: $(INSTALLED)  # media, features, training, generation, report; SHORT=1 for a trial of a few minutes
	$(BIN)/python -m mmaudio_hf.cli example $(if $(SHORT),--short)

test: $(INSTALLED)  # two workers of one thread; the tests of a file share its worker. See "Tests" in docs/design.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0 --reruns 1 --rerun-show-tracebacks -raR

test-slow: $(INSTALLED)  # full-size encoders: about 10 GB of memory
	$(BIN)/python -m pytest -m slow

rehearse: $(INSTALLED)  # the CUDA paths on fake tensors: kernels, bytes, memory, syncs against ceilings; needs g++
	$(BIN)/python tests/rehearsal/rehearse.py

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
