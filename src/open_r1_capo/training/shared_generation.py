"""transformers' `generate` with each prompt computed once for all its completions, in the run's own precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel


class SharedGeneration:
    """Samples from a policy; in bfloat16 it keeps a rounded copy, because autocast would round weights every token.

    Args:
        policy: the model, without wrappers.
        bf16: sample in bfloat16.
    """

    def __init__(self, policy: PreTrainedModel, bf16: bool):
        self.policy, self.model = policy, policy
        if bf16 and policy.dtype != torch.bfloat16:
            copy = AutoModelForCausalLM.from_config(
                policy.config, dtype=torch.bfloat16, attn_implementation=policy.config._attn_implementation
            )
            self.model = copy.to(policy.device).requires_grad_(False).eval()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        """A completion of every prompt, up to the token that ends it; equal prompts are computed once."""
        if self.model is not self.policy:
            for ours, theirs in zip(self.model.parameters(), self.policy.parameters(), strict=True):
                ours.copy_(theirs)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        order = torch.tensor([unique.index(tuple(prompt)) for prompt in prompts], device=self.model.device)
        ids, mask = _padded(unique, config.pad_token_id, self.model.device)
        cache = DynamicCache(config=self.model.config)
        if ids.shape[1] > 1:  # generate computes the last token of the prompt
            known: dict[str, Any] = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]  # as generate counts them
            self.model(**known, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_select_indices(order)
        inputs = {"input_ids": ids[order], "attention_mask": mask[order], "past_key_values": cache}
        output = self.model.generate(**inputs, generation_config=config)
        return _until_end(output[:, ids.shape[1] :].tolist(), config.eos_token_id)


def _padded(prompts: list[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, P), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    return ids, mask


def _until_end(rows: list[list[int]], ends: int | list[int] | None) -> list[list[int]]:
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
