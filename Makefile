# One virtual environment in .venv, made once and made again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow check format cards clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
		|| { echo "hf-nullspace needs Python 3.11 to 3.13; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not there'). Name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, fine-tune and measure on real handwritten digits (about a minute on two cores)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/finetune.py

test: $(STAMP)  ## the default tests (under 5 minutes on two cores, no network)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## the long tests: killed runs, every family, the whole demo
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cards: $(STAMP)  ## every card of model_cards/ again, from benchmarks/results/ and recipes/configs/
	$(BIN)/python recipes/release.py --render

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
