# `make help` lists what there is. Everything runs in .venv, which the first command makes.

RECIPE ?= recipes/demo.yaml
ARGS ?=

export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# The first interpreter that the project supports; PYTHON=... chooses another.
CANDIDATES := python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
first_supported = $(shell for name in $(CANDIDATES); do \
    $$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
PYTHON ?= $(or $(first_supported),python3)

BIN := .venv/bin
READY := .venv/.tristage-setup
RUN_DIRECTORY := import sys; from pipeline import load, stages; \
    print(stages.run_directory(load.load_recipe(sys.argv[1], sys.argv[2:])))

.DEFAULT_GOAL := help
# Stages follow one another and share the machine: `make -j` never runs two of them at once.
.NOTPARALLEL:
.PHONY: help setup lock upgrade sft rm ppo dpo ipo kto simpo orpo ift contrast run doctor demo-data demo-base \
        compare serve estimate bench bench-ppo bench-direct bench-stage learn-ppo learn-direct frozen-lake \
        format lint type test test-all test-cluster kill-soak check mutants clean-run

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  RECIPE=$(RECIPE)  ARGS='--ppo.updates 50' changes a recipe key  TRISTAGE_DEVICE=cpu|cuda"

setup: ## make or update .venv (CPU or CUDA, found out by itself)
	@$(PYTHON) -m scripts.setup_env

$(READY): pyproject.toml constraints.txt constraints-cuda.txt overrides.txt
	@$(PYTHON) -m scripts.setup_env

sft: $(READY) ## stage 1: supervised fine-tuning
	$(BIN)/tristage sft $(RECIPE) $(ARGS)

rm: sft ## stage 2: reward model on ranked answers
	$(BIN)/tristage rm $(RECIPE) $(ARGS)

ppo: rm ## stage 3: PPO against the reward model
	$(BIN)/tristage ppo $(RECIPE) $(ARGS)

dpo: sft ## in place of rm and ppo: direct preference optimisation
ipo: sft ## ... identity preference optimisation
kto: sft ## ... Kahneman-Tversky optimisation
simpo: sft ## ... SimPO
orpo: sft ## ... ORPO
ift: sft ## ... intuitive fine-tuning
contrast: sft ## ... SFT on a worse answer before the better one
dpo ipo kto simpo orpo ift contrast:
	$(BIN)/tristage $@ $(RECIPE) $(ARGS)

run: $(READY) ## the whole pipeline in one command
	$(BIN)/tristage run $(RECIPE) $(ARGS)

compare: $(READY) ## several methods and seeds on the same split, prompts and judges: one report
	$(BIN)/tristage compare $(RECIPE) $(ARGS)

doctor: $(READY) ## versions, devices, engines; what is wrong and how to mend it
	$(BIN)/tristage doctor

serve: $(READY) ## a vLLM server that rolls out for rollout.mode: server
	$(BIN)/tristage serve $(RECIPE) $(ARGS)

estimate: $(READY) ## memory per GPU and time per update of a plan: ARGS='8b 8 --machines 2'
	$(BIN)/python -m scripts.estimate $(ARGS)

demo-data: $(READY) ## build the demo's data set in data/demo
	$(BIN)/python -m scripts.demo_data data/demo

demo-base: $(READY) ## pretrain the demo's small base model again
	$(BIN)/python -m scripts.demo_base $(ARGS)

bench: $(READY) ## rollout speed: vLLM beside transformers
	$(BIN)/python -m scripts.bench_rollout $(ARGS)

bench-ppo: $(READY) ## PPO's cost per update beside TRL's
	$(BIN)/python -m scripts.bench_ppo $(ARGS)

bench-direct: $(READY) ## the direct methods' CPU time and memory per step beside TRL's
	$(BIN)/python -m scripts.bench_direct $(ARGS)

bench-stage: $(READY) ## the ppo stage as it is run: phases, memory, a resume, beside the estimate
	$(BIN)/python -m scripts.bench_stage $(ARGS)

learn-ppo: $(READY) ## does PPO learn: 3 seeds against SFT and best of 16, the frontier, a broken reward
	$(BIN)/python -m scripts.learn_ppo $(RECIPE) $(ARGS)

learn-direct: $(READY) ## what the direct methods do: 3 seeds, gold judges, lengths, likelihoods
	$(BIN)/python -m scripts.learn_direct $(RECIPE) $(ARGS)

frozen-lake: $(READY) ## the IFT paper's toy world: SFT, ORPO, IFT and DPO beside the optimal policy
	$(BIN)/python -m scripts.frozen_lake $(ARGS)

format: $(READY) ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(READY) ## ruff and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY) ## pyright
	$(BIN)/pyright

test: lint type ## lint, types and the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

check: test ## what the continuous integration runs

test-all: lint type ## lint, types and every test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-cluster: $(READY) ## launched stages on a real Slurm and on two hosts, all on this machine (root, Slurm's packages)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

kill-soak: $(READY) ## kill -9 at random moments of a whole pipeline, each followed by the same command
	$(BIN)/python -m scripts.kill_soak $(ARGS)

mutants: $(READY) ## break the maths on purpose: every mutant must turn a test red
	$(BIN)/python -m scripts.mutants $(ARGS)

clean-run: $(READY) ## delete the recipe's run directory
	rm -rf -- "$$($(BIN)/python -c '$(RUN_DIRECTORY)' $(RECIPE) $(ARGS))"

lock: $(READY) ## write what .venv holds to constraints*.txt
	@$(PYTHON) -m scripts.setup_env --lock

upgrade: ## install the newest versions that fit, then write constraints*.txt
	@$(PYTHON) -m scripts.setup_env --upgrade
