# Hybrid-LoRA for verl. `make demo` and `make test` install what they need into .venv on the first call.
#
#   PYTHON=python3.11    interpreter; the locked set in requirements/cpu.txt is for CPython 3.11
#   PIP_FIND_LINKS=DIR   a folder of wheels, honoured as pip does; without one the CPU build of torch comes
#                        from the index that uv's --torch-backend=cpu knows
#   DEMO_LESSON=carry    what the demo's model learns: carry, or last_digits, which LoRA alone learnt slower in plain torch
#   DEMO_BESIDE_LORA=1   the demo trains LoRA alone of the same size as well, and shows both
#   DEMO_STEPS=N         reinforcement learning steps of the demo; 24 of carry and 90 of last_digits by default
#   DEMO_RANKS=1         trainer ranks of the demo, 1 or 2, each with a vLLM of its own
#   DEMO_ON_THE_FLY=sft  the demo's run probes for itself, with this objective (sft or policy)
#   DEMO_OVERRIDES=...   more settings of the demo's verl run, e.g. hybrid_lora.sync=adapter
#   DEMO_DIR=outputs/demo
#   GPU_PYTHON=python3   interpreter of `make gpu-check`, where the extra gpu is installed: see docs/gpu-check.md
#   GPU_CHECK=...        options of the check, e.g. "--runs merge,adapter"

PYTHON ?= python3.11
VENV ?= .venv
DEMO_LESSON ?= carry
DEMO_RANKS ?= 1
DEMO_DIR ?= outputs/demo
SMOLLM2_DIR ?= outputs/smollm2-135m
GPU_PYTHON ?= python3

# What is installed: the exact set, and what it may bend of the packages' own requirements.
LOCK ?= requirements/cpu.txt
OVERRIDES ?= requirements/overrides.txt

BIN := $(VENV)/bin
UV := $(BIN)/uv
# An environment variable or a pip configuration file: both count.
FIND_LINKS = $(or $(PIP_FIND_LINKS),$(shell $(BIN)/pip config get global.find-links 2>/dev/null))
TORCH_SOURCE = $(if $(strip $(FIND_LINKS)),$(addprefix --find-links ,$(FIND_LINKS)),--torch-backend cpu)

.DEFAULT_GOAL := help
.PHONY: help install test test-fast test-next demo gpu-check probe-smollm2 bench bench-probe bench-sync bench-training docs contracts-gpu lint lock clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed ## install the locked CPU set and the plugin into .venv

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install CPython 3.11 or give PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'uv>=0.5,<1'

# Compiled while installing: every test of verl or vLLM imports thousands of files, in many processes, and where Python
# may not write bytecode (PYTHONDONTWRITEBYTECODE) each process would compile them again.
$(VENV)/.installed: $(LOCK) $(OVERRIDES) pyproject.toml | $(BIN)/uv
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(TORCH_SOURCE) $(addprefix --override ,$(OVERRIDES)) -r $(LOCK)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

test: install ## all tests, with the real verl, Ray and vLLM
	$(BIN)/python -m pytest

# On two cores, each about half of the time.
FAST := $(BIN)/python -m pytest -m "not verl and not ranks"

test-fast: install ## the tests that start neither verl nor several ranks: a few minutes
	@log=$$(mktemp); $(FAST) -p no:cacheprovider tests/test_[r-z]*.py >$$log 2>&1 & half=$$!; \
	$(FAST) tests/test_[a-q]*.py; failed=$$?; \
	wait $$half || failed=1; cat $$log; rm -f $$log; exit $$failed

# In an environment of its own: what touches vLLM or transformers, then a run of verl in every mode.
NEXT_VENV ?= .venv-next
NEXT_TESTS ?= tests/test_contracts.py tests/test_sync_verl.py tests/test_plain_run.py tests/test_model_families.py
NEXT_RUNS ?= merge,sparse_merge,adapter,receiver_merge

test-next: ## runs, syncs and model families with the vLLM and transformers of verl's main, in .venv-next
	$(MAKE) install VENV=$(NEXT_VENV) LOCK=requirements/cpu-next.txt OVERRIDES="requirements/overrides.txt requirements/overrides-next.txt"
	$(NEXT_VENV)/bin/python -m pytest $(NEXT_TESTS)
	$(NEXT_VENV)/bin/python -m recipes.gpu_check --output outputs/next --device cpu --layers 2 --hidden 64 --vocabulary 2048 \
	  --steps 2 --minutes 60 --runs $(NEXT_RUNS)

demo: install ## the whole line on two CPU cores: probe, verl GSPO run, proof, export, report
	$(BIN)/python -m recipes.demo --lesson $(DEMO_LESSON) $(addprefix --steps ,$(DEMO_STEPS)) $(if $(DEMO_BESIDE_LORA),--beside-lora) --ranks $(DEMO_RANKS) --output $(DEMO_DIR) $(addprefix --on-the-fly ,$(DEMO_ON_THE_FLY)) $(DEMO_OVERRIDES)

# Without `install`, which puts the CPU set into .venv.
gpu-check: ## one CUDA GPU in twenty minutes: every sync mode, fidelity, costs, one page (needs the extra gpu)
	@$(GPU_PYTHON) -m recipes.gpu_check $(GPU_CHECK)

probe-smollm2: install ## the allocation of a real pretrained model (SmolLM2-135M, 210 modules)
	$(BIN)/python -m recipes.probe_smollm2 --output $(SMOLLM2_DIR)

bench: bench-probe bench-sync bench-training ## all benchmarks, one after the other

bench-probe: install ## what the probe costs, against its floor: about ten minutes
	$(BIN)/python -m benchmarks.probe_cost

bench-sync: install ## what a weight sync costs in each mode, beside verl's own: about twenty minutes and 20 GB
	$(BIN)/python -m benchmarks.sync_sizes
	$(BIN)/python -m benchmarks.sync_cost

bench-training: install ## memory, time and start of training, beside verl's own and PEFT: about half an hour
	$(BIN)/python -m benchmarks.training_cost
	$(BIN)/python -m benchmarks.zeroth_order_cost
	$(BIN)/python -m benchmarks.lora_layer_cost
	$(BIN)/python -m benchmarks.start_cost

docs: install ## write docs/configuration.md, contracts.md and compatibility.md from the code and its verdicts: a minute
	$(BIN)/python -m hybrid_lora_plugin.cli.reference docs/configuration.md docs/contracts.md
	$(BIN)/python -m tests.support.launch_commands docs/compatibility.md

contracts-gpu: install ## read the contracts in the wheels that the extra gpu pins: downloads about 820 MB
	$(BIN)/python -m tests.support.source_contracts --wheels .cache/wheels

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

COMPILE = $(UV) pip compile --quiet pyproject.toml --extra cpu --extra dev $(TORCH_SOURCE) --python-version 3.11 --no-annotate \
  --custom-compile-command "make lock" $(foreach file,$(2),--override $(file)) --output-file $(1)

# The second set keeps all that its overrides do not move: what differs in a test is then theirs.
lock: | $(BIN)/uv ## resolve requirements/cpu.txt and cpu-next.txt again
	$(call COMPILE,requirements/cpu.txt,requirements/overrides.txt)
	cp requirements/cpu.txt requirements/cpu-next.txt
	$(call COMPILE,requirements/cpu-next.txt,requirements/overrides.txt requirements/overrides-next.txt)

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) .cache outputs
