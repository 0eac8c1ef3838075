"""The last layer of the policy, seen through its sampled tokens (paper §4.1, "Last-layer model").

A token's gradient with respect to the LM head W (Eq. 7) is the outer product `A · v ⊗ x`, kept as its
factors: features x = h/τ, score v = e_a - π on the token's support, advantage A. A K×D gradient per token
is never formed; only the sum over tokens of each vocabulary row is (`RowGradient`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from open_r1_capo.capo.segments import segment_sums

GRANULARITIES = ("token", "sequence", "group", "batch")
NO_ID = 2**31 - 1  # sorts behind every vocabulary id


@dataclass(frozen=True)
class TokenBatch:
    """N sampled tokens of the policy, each with a support of K vocabulary ids.

    Raises:
        ValueError: a shape does not fit; the message names the tensor, the expected and the actual shape.
    """

    features: Tensor  # x_ND = h/τ, the hidden state that predicts the token over the temperature; floating point
    token_ids: Tensor  # (N, K) int64, vocabulary ids of the support
    probs: Tensor  # pi_NK, the policy renormalised over the support; 0 on padding slots
    action_index: Tensor  # (N,) int64, column of the sampled token
    advantages: Tensor  # A_N
    groups: Tensor | None = None  # (N,) int64, the subset of each token for the granularities `sequence` and `group`

    def __post_init__(self):
        """Check the shapes; free of synchronisation, so it costs nothing on an accelerator (ValueError)."""
        if self.features.dim() != 2 or not self.features.is_floating_point():
            raise ValueError(f"features: expected a floating (N, D), got {_describe(self.features)}")
        if self.token_ids.dim() != 2 or self.token_ids.dtype != torch.int64:
            raise ValueError(f"token_ids: expected an int64 (N, K), got {_describe(self.token_ids)}")
        n, k = len(self.features), self.token_ids.shape[1]
        expected = {"token_ids": (n, k), "probs": (n, k), "action_index": (n,), "advantages": (n,), "groups": (n,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        """N, the number of tokens."""
        return len(self.features)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32, or float64 if the features are."""
        return torch.promote_types(self.features.dtype, torch.float32)

    @property
    def score(self) -> Tensor:
        """v_NK = e_a - π (the paper's u_t, App. D)."""
        score = -self.probs.to(self.dtype)
        return score.scatter_add(1, self.action_index[:, None], torch.ones_like(score[:, :1]))

    @property
    def coefficient(self) -> Tensor:
        """(N, K), A v: the token gradient of row j is this times x (Eq. 7)."""
        return self.advantages.to(self.dtype)[:, None] * self.score

    def action_log_prob(self, log_mass: Tensor) -> Tensor:
        """(N,), log π(a) ≤ 0 under the full policy, in nats; `log_mass` (N,) is the log-probability of the support."""
        on_support = self.probs.to(self.dtype).gather(1, self.action_index[:, None])[:, 0]
        return (on_support.log() + log_mass.to(self.dtype)).clamp(max=0)

    def gradient_norm(self) -> Tensor:
        """(N,), the norm ‖g‖ = |A| ‖v‖ ‖x‖ of each token's gradient of the last layer (Eq. 7), on its support."""
        return self.advantages.to(self.dtype).abs() * self.score.norm(dim=1) * self.features.to(self.dtype).norm(dim=1)

    @property
    def occupied(self) -> Tensor:
        """(N, K) bool, the slots that hold a support id; padding has probability 0 and is not the action."""
        return (self.probs > 0).scatter(1, self.action_index[:, None], True)

    def subsets(self, granularity: str) -> Tensor:
        """(N,) int64, the subset b of each token (§5: tokens, sentences, groups or the full batch).

        Raises:
            ValueError: an unknown granularity, or one that needs `groups` where there are none.
        """
        if granularity == "token":
            return torch.arange(len(self), device=self.features.device)
        if granularity == "batch":
            return self.action_index.new_zeros(len(self))
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if self.groups is None:
            raise ValueError(f"groups: granularity {granularity!r} needs the subset of each token, got None")
        return self.groups

    def select(self, index: Tensor | slice) -> TokenBatch:
        """The tokens at `index` ((M,) int64, (N,) bool or a slice), in its order."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part[index] for name, part in parts.items() if part is not None})

    def validate(self, vocab_size: int | None) -> None:
        """Check the values; reads them back once, so it synchronises an accelerator. `vocab_size` None allows any id.

        Raises:
            ValueError: ids outside the vocabulary, columns outside the support, probabilities of finite tokens that
                are negative or do not sum to 1.
        """
        _check_range("token_ids", self.token_ids, vocab_size)
        _check_range("action_index", self.action_index, self.token_ids.shape[1])
        total = self.probs.to(self.dtype).sum(1)
        wrong = (total.isfinite() & ((total - 1).abs() > 1e-2)) | (self.probs < 0).any(1)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"probs: expected rows that sum to 1 and are ≥ 0, got a sum of {total[i]:.4g} in row {i}")


@dataclass(frozen=True)
class RowGradient:
    """The last layer's gradient as the vocabulary rows it touches (sums, so that parts can be added)."""

    token_ids: Tensor  # (R,) int64, ascending
    total: Tensor  # (R, D), Σ_i w_i A_i v_ij x_i over the tokens i whose support holds row j (Eq. 7, not yet averaged)
    count: Tensor  # (R,), the number of those tokens
    tokens: Tensor  # (), the number of all tokens counted, with or without a gradient

    def mean(self, average: str, rows: slice = slice(None)) -> Tensor:
        """(rows, D), the averaged gradient: over the tokens that hold the row (`per_logit`) or all (`per_token`)."""
        return self.total[rows] / (self.count[rows, None] if average == "per_logit" else self.tokens)


@dataclass(frozen=True)
class RowEntries:
    """The terms of a batch's gradient rows, sorted by vocabulary id: row r sums its slice of E entries."""

    token_ids: Tensor  # (R,) int64, ascending
    offsets: Tensor  # (R + 1,) int64; the entries of row r are offsets[r] to offsets[r + 1]
    token: Tensor  # (E,) int64, the token of each entry, ascending within a row
    coefficient: Tensor  # (E,), w A v of each entry
    count: Tensor  # (R,), the number of tokens with a gradient whose support holds the row
    tokens: Tensor  # (), the number of all tokens counted

    def sums(self, rows: slice, features: Tensor, scratch_bytes: int) -> Tensor:
        """(rows, D), Σ of coefficient · x over the entries of each row of a slice of the R rows, in token order."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        return segment_sums(offsets - part.start, self.token[part], self.coefficient[part], features, scratch_bytes)

    def mean(self, average: str, rows: slice, features: Tensor, scratch_bytes: int) -> Tensor:
        """(rows, D), `RowGradient.mean` of these rows without the sums of the others."""
        total = self.sums(rows, features, scratch_bytes)
        return total.div_(self.count[rows, None] if average == "per_logit" else self.tokens)


def row_entries(batch: TokenBatch, weight: Tensor) -> RowEntries:
    """The sorted terms of `row_gradient`: those of the tokens of positive weight (N,) and non-zero advantage."""
    kept = weight > 0
    occupied = batch.occupied & kept[:, None]
    moving = (occupied & (batch.advantages != 0)[:, None]).flatten()
    ids = batch.token_ids.flatten()
    ids, order = torch.sort(torch.where(moving, ids, NO_ID).int(), stable=True)
    order = order[: int(moving.sum())]
    ids, length = torch.unique_consecutive(ids[: len(order)], return_counts=True)
    ids, offsets = ids.long(), torch.cat([length.new_zeros(1), length.cumsum(0)])
    coefficient = (weight.to(batch.dtype)[:, None] * batch.coefficient).flatten()[order]
    token = order // batch.token_ids.shape[1]
    return RowEntries(ids, offsets, token, coefficient, length.float(), kept.sum().to(batch.dtype))


def row_gradient(batch: TokenBatch, weight: Tensor, scratch_bytes: int) -> RowGradient:
    """The gradient rows of a batch with weights (N,) (Eq. 7): those that a token with a gradient touches.

    Tokens of weight 0 are left out altogether, so that a rejected non-finite token cannot spread. Tokens of advantage
    0 touch no row: they count in the mean over all tokens, not in a row's own.
    """
    entries = row_entries(batch, weight)
    rows = slice(0, len(entries.token_ids))
    total = entries.sums(rows, batch.features, scratch_bytes)
    return RowGradient(entries.token_ids, total, entries.count, entries.tokens)


def merge(parts: Sequence[RowGradient]) -> RowGradient:
    """The sum of gradients over micro-batches or ranks, on the union of their rows."""
    if len(parts) == 1:
        return parts[0]
    ids, row = torch.unique(torch.cat([part.token_ids for part in parts]), return_inverse=True)
    total = parts[0].total.new_zeros(len(ids), parts[0].total.shape[1])
    count = parts[0].count.new_zeros(len(ids))
    for part, part_row in zip(parts, row.split([len(part.token_ids) for part in parts]), strict=True):
        total.index_add_(0, part_row, part.total)
        count.index_add_(0, part_row, part.count)
    return RowGradient(ids, total, count, torch.stack([part.tokens for part in parts]).sum())


def _check_range(name: str, values: Tensor, size: int | None) -> None:
    if values.numel() == 0:
        return
    low, high = torch.stack(values.aminmax()).tolist()
    if low < 0 or (size is not None and high >= size):
        expected = "values ≥ 0" if size is None else f"values in 0..{size - 1}"
        raise ValueError(f"{name}: expected {expected}, got {low}..{high}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
