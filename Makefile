# open-r1-capo: every verb sets up what it needs. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

SCALE ?= lab
RECIPE ?= $(if $(filter own,$(SCALE)),grpo_budget,capo_aggressive)
SEED ?= 0
ARGS ?=
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
comma := ,
space := $(subst ,, )
YES := 1 true yes
NO := 0 false no
EXTRAS := $(if $(filter 0,$(CUDA)),dev,dev$(comma)gpu)
GYM := $(shell sed -n 's/.*"\(reasoning-gym==[^"]*\)".*/\1/p' setup.py)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: help install train sft experiment eval test test-slurm test-faults quality style figures plan report compare

# what each verb reads; whatever else stands on the command line is refused below, as make would drop it without a word
TAKES_train := RECIPE SCALE SEED ARGS OVERWRITE
TAKES_sft := NAME MODEL ARGS OVERWRITE
TAKES_experiment := NAME SCALE SEEDS ARGS
TAKES_test := ARGS
TAKES_test-slurm := ARGS
TAKES_test-faults := ARGS TIMES VLLM
TAKES_plan := RECIPE SCALE GPUS NODES GPU ACCELERATOR GENERATION SERVER_GPUS SEEDS ARGS
TAKES_report := RUN
TAKES_compare := RUNS OUT
TAKES_figures := NAME SCALE SEEDS SMOOTH OUT

help: ## this list
	@echo "open-r1-capo — make <verb> [NAME=value …]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 14
	@echo "recipes: $(sort $(filter-out base,$(basename $(notdir $(wildcard recipes/*.yaml)))))" | fold -s -w 170

install: $(STAMP) ## set up .venv (done by every other verb when it is missing or older than setup.py)

$(STAMP): setup.py src/open_r1_capo/capo/engines/native.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=<a newer one>"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes, once)"
# without a GPU, torch's CPU build: from its own index, if the default one would bring gigabytes of CUDA libraries
	@index=; if [ $(CUDA) = 0 ] && $(PIP) --dry-run --no-deps --report - $(TORCH) 2>/dev/null | grep -qE '"(nvidia|cuda)-'; \
	  then index="--index-url $(CPU_WHEELS)"; fi; $(PIP) $(TORCH) $$index 2> $(VENV)/install.log \
	  && $(PIP) -e '.[$(EXTRAS)]' 2>> $(VENV)/install.log \
	  || { grep -v '^WARNING' $(VENV)/install.log | tail -n 5; echo "error: the installation failed (all of it: $(VENV)/install.log)"; exit 2; }
# one of its packages is compiled: where that fails, the lab and data sets do without it
	@$(PIP) '$(GYM)' 2>> $(VENV)/install.log || echo "note: $(GYM) could not be installed ($(VENV)/install.log): data.name=reasoning_gym/… is not available"
	@touch $@

train: $(STAMP) ## train RECIPE=capo_aggressive SCALE=lab SEED=0 ARGS="learning_rate=1e-4 …" [OVERWRITE=1]
	@$(BIN)/python -m open_r1_capo.grpo --config-name $(RECIPE) scale=$(SCALE) seed=$(SEED) $(if $(filter $(YES),$(OVERWRITE)),overwrite=true) $(ARGS)

sft: $(STAMP) ## a cold start: worked solutions of NAME=gsm_symbolic taught to MODEL=<folder or hub id> [ARGS="data.path=my.jsonl …"]
	@$(BIN)/python -m open_r1_capo.sft --config-name $(or $(NAME),gsm_symbolic) $(if $(MODEL),model_name_or_path=$(MODEL)) $(if $(filter $(YES),$(OVERWRITE)),overwrite=true) $(ARGS)

experiment: $(STAMP) ## NAME=fig2 SCALE=lab [SEEDS=5 ARGS=--dry-run]: the missing runs of a figure, side by side or by Slurm
	@$(BIN)/python -m open_r1_capo.experiments.sweep $(NAME) --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

test: $(STAMP) ## unit and integration tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(ARGS)

test-slurm: $(STAMP) ## the job scripts under a real Slurm of two stand-in nodes, if its daemons are installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider tests/slurm/real_slurm.py $(ARGS)

test-faults: $(STAMP) ## runs killed, robbed of their server, their disk, their files; each must end as if nothing had happened [TIMES=10 VLLM=1]
	@OMP_NUM_THREADS=1 TIMES=$(TIMES) VLLM=$(VLLM) $(BIN)/python -m pytest -q -p no:cacheprovider tests/faults/process_drills.py tests/faults/file_drills.py $(ARGS)

quality: $(STAMP) ## formatting, lint, documentation rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

style: $(STAMP) ## reformat and repair what can be
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

plan: $(STAMP) ## what fits: memory and disk of RECIPE= at SCALE= on GPUS=4 GPU=h100 [NODES= ACCELERATOR=zero2 GENERATION= ARGS=]
	@$(BIN)/python -m open_r1_capo.capacity --recipe $(RECIPE) --scale $(SCALE) $(if $(GPUS),--gpus $(GPUS)) $(if $(NODES),--nodes $(NODES)) \
	  $(if $(GPU),--gpu $(GPU)) $(if $(ACCELERATOR),--accelerator $(ACCELERATOR)) $(if $(GENERATION),--generation $(GENERATION)) \
	  $(if $(SERVER_GPUS),--server-gpus $(SERVER_GPUS)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

report: $(STAMP) ## write the report of RUN=<run folder>, ended or not
	@$(BIN)/python -m open_r1_capo.report '$(RUN)'

compare: $(STAMP) ## RUNS="<run folder> …" on one page, OUT=outputs/compare.html
	@$(BIN)/python -m open_r1_capo.report.compare --out $(or $(OUT),outputs/compare.html) $(RUNS)

figures: $(STAMP) ## draw NAME=fig2 (without it all that have runs) SCALE=lab [SEEDS=5 SMOOTH=0.9|off OUT=]
	@$(BIN)/python -m open_r1_capo.experiments.figures --scale $(SCALE) $(if $(NAME),--name $(NAME)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(SMOOTH),--smooth $(SMOOTH)) $(if $(OUT),--out $(OUT))

include $(wildcard eval/eval.mk benchmarks/bench.mk)

# --- the command line: every word of it is read by somebody ---
GOALS := $(or $(MAKECMDGOALS),help)
VERBS := $(shell sed -nE 's/^([a-z-]+):.*/\1/p' $(MAKEFILE_LIST))
TAKES := $(foreach verb,$(GOALS),$(TAKES_$(verb)))
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNREAD := $(sort $(filter-out $(TAKES) PYTHON VENV CUDA -%,$(GIVEN)))
upper = $(shell echo '$(1)' | tr a-z- A-Z_)

# $(1): a variable that no rule reads. A verb's variable in small letters; a setting; or nothing.
define advice
$(if $(filter $(TAKES),$(call upper,$(1))),write $(call upper,$(1))=$($(1)),$(if $(filter $(call upper,$(1)),$(1)),$(strip \
  it takes $(or $(subst $(space),$(comma)$(space),$(strip $(TAKES))),no variable)),$(strip \
  $(if $(filter ARGS,$(TAKES)),a setting is written ARGS="$(foreach name,$(UNREAD),$(name)=$($(name)))",make train takes settings$(comma) in ARGS))))
endef

$(foreach goal,$(filter-out $(VERBS) .%,$(GOALS)),$(error there is no verb $(goal): make help lists them))
$(foreach name,$(UNREAD),$(error $(GOALS) does not read $(name): $(call advice,$(name))))
$(if $(filter-out $(YES) $(NO),$(OVERWRITE)),$(error OVERWRITE=$(OVERWRITE) is neither 1 (yes) nor 0 (no)))
