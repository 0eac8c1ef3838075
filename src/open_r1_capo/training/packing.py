"""One forward pass in which a prompt is computed once for all its completions, and no completion is padded.

A row of the pass is a tree: a prompt without its last token, then for each completion of it that last token and the
completion without its own last one, which predicts nothing. A completion attends to its prompt and to itself, and its
positions go on where the prompt's end, so that every log-probability is that of the sequence alone, but for rounding.
Attention is quadratic in the row: worth it where completions are short beside the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

IGNORE = -100  # the label of a position that predicts nothing
PROMPT, PADDING = -1, -2  # where a position is in no completion


@dataclass(frozen=True)
class Packed:
    """B sequences of at most T completion tokens in G rows of S positions.

    Attributes:
        input_ids: (G, S) int64.
        attention_mask: (G, 1, S, S) bool, true where the row's position attends to the column's.
        position_ids: (G, S) int64.
        labels: (G, S) int64, the token that a position predicts, `IGNORE` where there is none.
        place: (B, T) int64, which of the G·S positions predicts each completion token.
        mask: (B, T) bool, where there is such a token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    place: Tensor
    mask: Tensor

    def unpack(self, values: Tensor) -> Tensor:
        """(B, T) of per-position values (G, S), 0 where there is no completion token."""
        return values.flatten()[self.place].masked_fill(~self.mask, 0)

    def predicting(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(N, D), of hidden states (G, S, D) those that predict the completion tokens in `mask` (B, T)."""
        return hidden.flatten(0, 1)[self.place[mask]]

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """The model's inputs of some rows."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: getattr(self, name)[start:end] for name in names}


def pack(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Packed:
    """Share the prompts of B sequences (B, L), prompts padded on the left, completions (the last T) on the right."""
    device, t = input_ids.device, completion_length
    ids, attention = input_ids.cpu(), attention_mask.bool().cpu()
    prompts = [row[keep].tolist() for row, keep in zip(ids[:, :-t], attention[:, :-t], strict=True)]
    completions = [row[keep].tolist() for row, keep in zip(ids[:, -t:], attention[:, -t:], strict=True)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(index)
    width = max(len(p) - 1 + sum(len(completions[i]) for i in members) for p, members in groups.items())
    shape = (len(groups), max(1, width))
    tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, branch = torch.full(shape, IGNORE), torch.full(shape, PADDING)
    place = torch.zeros(len(ids), t, dtype=torch.int64)
    for row, (prompt, members) in enumerate(groups.items()):
        end = len(prompt) - 1
        tokens[row, :end], positions[row, :end] = torch.tensor(prompt[:-1], dtype=torch.int64), torch.arange(end)
        branch[row, :end] = PROMPT
        for index in members:
            completion = completions[index]
            part = slice(end, end + len(completion))
            tokens[row, part] = torch.tensor([prompt[-1], *completion][: len(completion)], dtype=torch.int64)
            labels[row, part] = torch.tensor(completion, dtype=torch.int64)
            positions[row, part] = len(prompt) - 1 + torch.arange(len(completion))
            branch[row, part] = index
            place[index, : len(completion)] = row * shape[1] + torch.arange(part.start, part.stop)
            end = part.stop
    return Packed(*(x.to(device) for x in (tokens, _attends(branch), positions, labels, place, attention[:, -t:])))


def _attends(branch: Tensor) -> Tensor:
    """(G, 1, S, S) bool: each position attends to the earlier ones of its prompt and of its own branch (G, S)."""
    prompt = (branch == PROMPT)[:, None, :] & (branch != PADDING)[:, :, None]
    own = branch[:, :, None] == branch[:, None, :]  # padding attends to padding: an empty row would be NaN
    return ((prompt | own) & torch.ones(own.shape[1:], dtype=torch.bool).tril())[:, None]


def check_packing(model: PreTrainedModel) -> None:
    """Refuse models whose attention does not take a mask of our own (ValueError)."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or getattr(config, "num_experts", None):
        raise ValueError(
            f"share_prompts needs full attention by sdpa in every layer, but {type(model).__name__} has "
            f"{config._attn_implementation} and {', '.join(sorted(kinds))}: set share_prompts=false"
        )
