# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS ?= 2

.PHONY: demo test test-all lint checkpoint results clean

demo: $(STAMP)
	$(BIN)/icsearch greedy demo --calibration demo --retention 1/4 --out runs/demo
	@echo
	@echo "vLLM:   " && $(BIN)/icsearch export runs/demo/pattern.json --engine vllm
	@echo
	@echo "Open runs/demo/report.html for the curve, the heatmap and the evidence."

test: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

checkpoint: $(STAMP)
	$(BIN)/python checkpoint/train.py --out icsearch/demo

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
