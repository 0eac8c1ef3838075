# Benchmarks; included by the Makefile.
.PHONY: bench bench-gpu

bench: $(STAMP) ## time and memory side by side, on this machine [OFFICIAL=<checkout of the authors' code>]
	@OFFICIAL=$(OFFICIAL) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu: $(STAMP) ## the paper's shape on a GPU: milliseconds, bytes, fraction of the measured ceiling
	@$(BIN)/python benchmarks/gpu.py $(ARGS)
