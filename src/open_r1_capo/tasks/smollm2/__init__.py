"""SmolLM2-135M-Instruct: a real language model that two CPU cores can train, from wherever it can be had."""
