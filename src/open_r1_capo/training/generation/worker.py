"""A vLLM engine that answers JSON lines; run by `VLLMChild` with the interpreter of the environment that has vLLM.

This file is started by its path in an environment without this package: it imports the standard library, safetensors
and vLLM alone. Each line on standard input is `{"do": name, ...}`; each line on standard output `{"result": ...}` or
`{"error": text}`. Whatever vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any


class Worker:
    """The engine and what it can be asked to do, one method each."""

    def start(self, engine: dict[str, Any]) -> bool:
        """Load the model; `engine` has the arguments of `vllm.LLM`."""
        from vllm import LLM

        self.llm = LLM(**engine)
        return True

    def sync(self, weights: str) -> bool:
        """Take new weights, a safetensors file, and forget what was computed with the old ones."""
        from safetensors.torch import load_file

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(load_file(weights).items())})
        self.llm.reset_prefix_cache()
        return True

    def generate(self, prompts: list[list[int]], sampling: dict[str, Any], seed: int) -> list[list[list]]:
        """Draw completions: token ids and log-probabilities (None where unknown); the i-th has seed + i."""
        from vllm import SamplingParams

        params = [SamplingParams(n=1, seed=seed + i, detokenize=False, **sampling) for i in range(len(prompts))]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        answers = self.llm.generate(asked, sampling_params=params, use_tqdm=False)
        return [_pairs(answer.outputs[0]) for answer in answers]


def _pairs(output: Any) -> list[list]:
    logps = [one[token].logprob for token, one in zip(output.token_ids, output.logprobs, strict=True)]
    return [list(output.token_ids), [None if math.isnan(value) else value for value in logps]]


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to standard output
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
