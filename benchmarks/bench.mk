# Benchmarks; included by the Makefile.
.PHONY: bench bench-budget bench-gpu ranks
TAKES_bench := ARGS OFFICIAL
TAKES_bench-budget := ARGS
TAKES_bench-gpu := ARGS
TAKES_ranks := ARGS

bench: $(STAMP) ## time and memory side by side, on this machine [OFFICIAL=<checkout of the authors' code>]
	@OFFICIAL=$(OFFICIAL) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(ARGS)

# what a KL budget costs, and how well it knows what it bounds; ARGS="--scale lab --steps 40"
bench-budget: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/budget.py $(ARGS)

bench-gpu: $(STAMP) ## the paper's shape on a GPU: milliseconds, bytes, fraction of the measured ceiling
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

# two ranks beside one under DDP, ZeRO-2, ZeRO-3 and FSDP, on CPUs
ranks: $(STAMP) $(if $(filter 0,$(CUDA)),.venv-deepspeed/.ready)
	@$(BIN)/python benchmarks/ranks.py $(ARGS)

# DeepSpeed over .venv's packages and not among them: accelerate would import it, three seconds, in every process.
.venv-deepspeed/.ready: setup.py | $(STAMP)
	@echo "ranks: installing DeepSpeed into .venv-deepspeed (a minute, once)" >&2
	@rm -rf .venv-deepspeed && $(BIN)/python -m venv .venv-deepspeed && \
	  packages='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c "$$packages")')" > "$$(.venv-deepspeed/bin/python -c "$$packages")/trainer.pth" && \
	  DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python eval/pins.py deepspeed) \
	  2> .venv-deepspeed/install.log || { tail -n 5 .venv-deepspeed/install.log; echo "error: DeepSpeed cannot be installed (.venv-deepspeed/install.log)"; exit 2; }
	@touch $@
