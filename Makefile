# One virtual environment in .venv, made once and made again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-processors oldest mutants faults check format cards clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
		|| { echo "hf-nullspace needs Python 3.11 to 3.13; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not there'). Name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, fine-tune and measure on real handwritten digits (about 80 seconds on two cores)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/finetune.py

test: $(STAMP)  ## the default tests (under 3 minutes on two cores, no network)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## the long tests: killed runs, every family, the whole demo
	$(BIN)/python -m pytest -m slow

# The numeric tests with other kernels than this processor's own, of PyTorch, MKL, oneDNN and OpenBLAS (NumPy, SciPy), each
# with one thread and with four. The most different one: make test-processors KERNELS=oldest THREADS=4
KERNELS := default avx2 sse4 oldest
THREADS := 1 4
default := ATEN_CPU_CAPABILITY=default
avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
sse4 := MKL_ENABLE_INSTRUCTIONS=SSE4_2
oldest := $(default) $(sse4) ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem
NUMERIC := tests/linear tests/noise tests/models tests/explain tests/recipes/study \
	$(addprefix tests/robustness/test_, auto_attack.py carlini_wagner.py checks.py corruption_functions.py \
		every_attack.py gradient_attacks.py patch_fool.py pixel_model.py scores.py)

define numeric_tests
	$($(1)) OMP_NUM_THREADS=$(2) MKL_NUM_THREADS=$(2) OPENBLAS_NUM_THREADS=$(2) OMP_WAIT_POLICY=passive \
		$(BIN)/python -m pytest -n 2 --dist loadfile $(NUMERIC)

endef

test-processors: $(STAMP)  ## the numeric tests as other processors compute them
	$(foreach kernels,$(KERNELS),$(foreach threads,$(THREADS),$(call numeric_tests,$(kernels),$(threads))))

# The oldest versions that pyproject.toml allows: every lower bound becomes a pin.
OLDEST := .venv-oldest
LOWEST := import re, tomllib; \
	lines = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	print(*(re.sub(">=([^,]+).*", r"==\1", line) for line in lines), sep="\n")

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) -c '$(LOWEST)' > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint $(OLDEST)/constraints.txt --editable '.[demo]' pytest
	@touch $@

oldest: $(STAMP) $(OLDEST)/.installed  ## the oldest versions allowed: they load what today's write, and pass a part of the tests
	$(BIN)/python -m pytest -m slow tests/test_plain_transformers.py
	$(OLDEST)/bin/python -m pytest tests/test_plain_transformers.py tests/hub/test_convert.py \
		tests/hub/test_checkpoint_files.py tests/recipes/test_convert_recipe.py tests/models tests/noise/test_artifact.py \
		tests/training/test_checkpoints.py tests/training/test_data.py tests/training/test_trainer.py

mutants: $(STAMP)  ## which small changes of meaning do the tests notice? 420 of them; goes on where it was stopped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python benchmarks/mutants.py

faults: $(STAMP)  ## kills, full disks, damaged files: does a run that is started again end as an undisturbed one? an hour
	rm -f outputs/faults.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/faults
	$(BIN)/python tests/faults/table.py

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
	rm -rf .venv $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
