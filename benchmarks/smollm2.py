"""What sharing prompts saves at SmolLM2-135M's shape: training, measuring and sampling with it and without, in turn.

    python benchmarks/smollm2.py [--groups 4 --prompt 45 --longest 48 --rounds 3]

Random weights do as well as real ones. Processor time on one thread, because other work on the machine disturbs it
less than wall time; each round takes every variant in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common import save
from open_r1_capo.tasks.smollm2.settings import SHAPE
from open_r1_capo.training.features import completion_hidden_states
from open_r1_capo.training.packing import pack
from open_r1_capo.training.shared_generation import SharedGeneration

GROUP = 8  # completions a prompt
PAD = 0


def batch(groups: int, prompt: int, longest: int) -> tuple[Tensor, Tensor]:
    """Random sequences (B, L) and their mask: equal prompts in a group, completions from a third of `longest` on."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, SHAPE["vocab_size"], (groups, prompt), generator=rng).repeat_interleave(GROUP, 0)
    completions = torch.randint(3, SHAPE["vocab_size"], (len(prompts), longest), generator=rng)
    lengths = torch.randint(longest // 3, longest + 1, (len(prompts), 1), generator=rng)
    mask = torch.arange(longest) < lengths
    ids = torch.cat([prompts, completions.masked_fill(~mask, PAD)], 1)
    return ids, torch.cat([torch.ones_like(prompts), mask.long()], 1)


def variants(ids: Tensor, attention: Tensor, longest: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Per part of a step, the function without sharing (`plain`) and with it (`shared`)."""
    config = AutoConfig.for_model(**SHAPE, pad_token_id=PAD)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    sampler = SharedGeneration(model, bf16=True)
    prompts = ids[:, :-longest]
    how = GenerationConfig(max_new_tokens=longest, do_sample=True, temperature=0.9, top_k=50, pad_token_id=PAD)

    def train(inputs: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs, fused_lm_head=True)
        output.log_probs.sum().backward()
        model.zero_grad()

    def train_plain() -> None:
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, :-longest] = -100
        train({"input_ids": ids, "attention_mask": attention, "labels": labels})

    def train_shared() -> None:
        packed = pack(ids, attention, longest)
        train(packed.rows(0, len(packed.input_ids)) | {"shift_labels": packed.labels})

    def measure(share: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            completion_hidden_states(model, ids, attention, attention[:, -longest:].bool(), share_prompts=share)

    def sample_plain() -> None:  # as accelerate's wrapper has it: weights are rounded in every forward pass
        forward = model.forward

        def rounded(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args, **kwargs)

        model.forward = rounded
        with torch.no_grad():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
        model.forward = forward

    return {
        "train": {"plain": train_plain, "shared": train_shared},
        "measure": {"plain": lambda: measure(False), "shared": lambda: measure(True)},
        "sample": {"plain": sample_plain, "shared": lambda: sampler.generate(prompts.tolist(), how)},
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"groups": 4, "prompt": 45, "longest": 48, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = variants(*batch(options.groups, options.prompt, options.longest), options.longest)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for part, functions in parts.items():
            for name, function in functions.items():
                start = time.process_time()
                function()
                seconds[part, name].append(time.process_time() - start)
    result: dict[str, dict[str, float]] = {}
    for part in parts:
        plain, shared = (statistics.median(seconds[part, name]) for name in ("plain", "shared"))
        result[part] = {"plain_s": round(plain, 2), "shared_s": round(shared, 2), "ratio": round(plain / shared, 2)}
    sums = [sum(one[name] for one in result.values()) for name in ("plain_s", "shared_s")]
    result["all three"] = {"plain_s": sums[0], "shared_s": sums[1], "ratio": round(sums[0] / sums[1], 2)}
    for part, one in result.items():
        print(f"{part:10} {one['plain_s']:8.2f} s {one['shared_s']:8.2f} s   × {one['ratio']:.2f}")
    save("smollm2", {"options": vars(options), "cpu_seconds": result})


if __name__ == "__main__":
    main()
