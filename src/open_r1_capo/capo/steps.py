"""The optimizer model: the step that a gradient would become (paper §4.1, "Modeling the step").

`propose` turns each token's (or subset's) gradient g into the direction D = optimizer(g) and returns only the
logit change z = D x of every token; the step itself is α·D, of ascent. It reads the optimizer's state and never
changes it. `commit` takes one optimizer step with the accepted tokens; `planned` is the z of that very step.
This file is the only one that contracts over the width D, always in chunks of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.capo.last_layer import RowGradient, TokenBatch, add_outer, chunks, merge, row_gradient

SCRATCH_BYTES = 64 * 2**20  # bound of the temporary memory of one call


class _Step:
    """What both optimizer models share: collecting a global batch's gradient, and coarse subsets."""

    moment_average = "per_token"

    def __init__(self, scratch_bytes: int):
        self.scratch_bytes = scratch_bytes
        self.step_count = 0
        self._collected: list[RowGradient] = []

    def accumulate(self, batch: TokenBatch, weight: Tensor) -> None:
        """Add a micro-batch of the coming step: N tokens with their weights (N,) in [0, 1]."""
        part = row_gradient(batch, weight, self.scratch_bytes)
        self._collected = [merge([*self._collected, part])]

    def commit(
        self,
        batch: TokenBatch | None = None,
        weight: Tensor | None = None,
        reduce: Callable[[RowGradient], RowGradient] | None = None,
    ) -> None:
        """Take one optimizer step with everything accumulated, and `batch` if given.

        Args:
            batch: a last micro-batch.
            weight: its weights (N,).
            reduce: sums the gradient over the ranks; called once.

        Raises:
            ValueError: nothing was accumulated and no batch is given.
        """
        if batch is not None:
            self.accumulate(batch, weight)
        if not self._collected:
            raise ValueError("commit: nothing was accumulated; pass a batch and its weights")
        gradient = self._collected.pop()
        self.step_count += 1
        self._apply(reduce(gradient) if reduce else gradient)

    def propose(self, batch: TokenBatch, granularity: str = "token") -> Tensor:
        """z_NK = D x per unit learning rate, with D = optimizer(mean gradient of the token's subset).

        Args:
            batch: N tokens.
            granularity: `token`, `sequence` or `group` (by `batch.groups`), or `batch`.

        Returns:
            (N, K); 0 for tokens whose subset has no gradient (A = 0 throughout), which need no work.

        Raises:
            ValueError: the batch does not fit the model's vocabulary or width, or `groups` is missing.
        """
        moving = batch.advantages != 0
        if granularity != "token":
            _, subset = torch.unique(batch.subsets(granularity), return_inverse=True)
            moving = torch.zeros_like(subset, dtype=torch.bool).index_fill_(0, subset[moving], True)[subset]
        z = batch.features.new_zeros(batch.probs.shape, dtype=batch.dtype)
        if moving.any():
            part = batch if moving.all() else batch.select(moving)
            z[moving] = (
                self._propose_tokens(part) if granularity == "token" else self._propose_subsets(part, granularity)
            )
        return z

    def _propose_subsets(self, batch: TokenBatch, granularity: str) -> Tensor:
        """`propose` for subsets of several tokens, a chunk of (subset, id) rows at a time."""
        _, subset = torch.unique(batch.subsets(granularity), return_inverse=True)
        occupied = batch.occupied
        token = occupied.nonzero()[:, 0]
        stride = int(batch.token_ids.max()) + 1
        pair, entry_pair = torch.unique(subset[token] * stride + batch.token_ids[occupied], return_inverse=True)
        order = torch.argsort(entry_pair, stable=True)
        token, entry_pair = token[order], entry_pair[order]
        coefficient = (batch.advantages.to(batch.dtype)[:, None] * batch.score)[occupied][order]
        count = torch.bincount(entry_pair)
        end = count.cumsum(0)
        share = count if self.moment_average == "per_logit" else torch.bincount(subset)[pair // stride]
        x, dots = batch.features, torch.empty_like(coefficient)
        width = x.shape[1] * coefficient.element_size()
        for rows in chunks(len(pair), 6 * width, self.scratch_bytes):
            entries = slice(int(end[rows.start] - count[rows.start]), int(end[rows.stop - 1]))
            row = entry_pair[entries] - rows.start
            gradient = x.new_zeros(rows.stop - rows.start, x.shape[1], dtype=batch.dtype)
            add_outer(gradient, row, coefficient[entries], x, token[entries], self.scratch_bytes)
            direction = self._direction(pair[rows] % stride, gradient / share[rows, None])
            dots[entries] = _dots(direction, row, x, token[entries], self.scratch_bytes)
        z, inverse = torch.zeros_like(batch.score), torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        z[occupied] = dots[inverse]
        return z


class SGDStep(_Step):
    """D = g: the step is the gradient itself, so a token's z = A ‖x‖² v is a closed form.

    Args:
        scratch_bytes: bound of the temporary memory of one call.
    """

    def __init__(self, scratch_bytes: int = SCRATCH_BYTES):
        super().__init__(scratch_bytes)
        self._committed: RowGradient | None = None

    def planned(self, batch: TokenBatch) -> Tensor:
        """z (N, K) of the step that the last commit takes; 0 for ids that it does not touch."""
        z = torch.zeros_like(batch.score)
        if self._committed is None or len(self._committed.token_ids) == 0:
            return z
        ids, rows = self._committed.token_ids, self._committed.mean("per_token")
        place = torch.searchsorted(ids, batch.token_ids).clamp(max=len(ids) - 1)
        known = ids[place] == batch.token_ids
        z[known] = _dots(rows, place[known], batch.features, known.nonzero()[:, 0], self.scratch_bytes)
        return z

    def state_dict(self) -> dict[str, Any]:
        """The step count; SGD has no moments."""
        return {"settings": {"optimizer": "sgd"}, "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state belongs to another optimizer model.
        """
        _check_settings(self.state_dict()["settings"], state["settings"])
        self.step_count = int(state["step_count"])

    def _propose_tokens(self, batch: TokenBatch) -> Tensor:
        stretch = batch.advantages.to(batch.dtype) * batch.features.to(batch.dtype).square().sum(1)
        return stretch[:, None] * batch.score

    def _direction(self, ids: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    def _apply(self, gradient: RowGradient) -> None:
        self._committed = gradient


class AdamStep(_Step):
    """Adam on the rows of the last layer: D = P̂ / (√Q̂ + ε), with moments P and Q per vocabulary row.

    The moments are rows of one table that grows geometrically; `row_of` maps an id to its row, and row 0 stays
    zero for the ids that were never touched. The dtype and device are those of the first committed batch
    (float32 at least).

    Args:
        vocab_size: V.
        dim: D, the width of the last layer.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: ε, added to the root of the second moment.
        moment_average: a row's gradient is the mean over the tokens whose support holds the row (`per_logit`, the
            reference implementation's; Table 4 belongs to it) or over all tokens (`per_token`, Eq. 7).
        absent_rows: rows that no token of a step touches keep their moments and stay where they are (`hold`, as
            torch's SparseAdam) or decay and move (`decay`, as a dense Adam; done lazily, at no cost).
        scratch_bytes: bound of the temporary memory of one call.

    Raises:
        ValueError: an unknown `moment_average` or `absent_rows`.
    """

    def __init__(  # noqa: PLR0917
        self,
        vocab_size: int,
        dim: int,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        moment_average: str = "per_logit",
        absent_rows: str = "hold",
        scratch_bytes: int = SCRATCH_BYTES,
    ):
        super().__init__(scratch_bytes)
        if moment_average not in ("per_logit", "per_token"):
            raise ValueError(f"moment_average must be 'per_logit' or 'per_token', got {moment_average!r}")
        if absent_rows not in ("hold", "decay"):
            raise ValueError(f"absent_rows must be 'hold' or 'decay', got {absent_rows!r}")
        self.vocab_size, self.dim = vocab_size, dim
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.moment_average, self.absent_rows = moment_average, absent_rows
        self.row_of = torch.zeros(vocab_size, dtype=torch.int32)
        self.rows = 1  # row 0 is the zero row
        self.first = torch.zeros(1, dim)
        self.second = torch.zeros(1, dim)
        self.last_step = torch.zeros(1, dtype=torch.int64)

    def planned(self, batch: TokenBatch) -> Tensor:
        """z of the step that the committed moments take (before the first commit: 0).

        Under `hold`, the rows that the last commit did not touch stay where they are, as in SparseAdam.

        Args:
            batch: N tokens, of this step or others.

        Returns:
            (N, K), per unit learning rate.
        """
        z = torch.zeros_like(batch.score)
        if self.step_count == 0:
            return z
        self._fit(batch)
        row = self.row_of[batch.token_ids]
        first, second = self._decayed(torch.arange(self.rows, device=row.device), self.step_count)
        direction = self._ratio(first, second, self.step_count)
        if self.absent_rows == "hold":
            direction[self.last_step[: self.rows] != self.step_count] = 0
        entry_token = torch.arange(len(batch), device=row.device).repeat_interleave(row.shape[1])
        return _dots(direction, row.flatten(), batch.features, entry_token, self.scratch_bytes).view_as(z)

    def state_dict(self) -> dict[str, Any]:
        """The settings, the step count and the touched rows: ids (R,), moments (R, D), last step (R,)."""
        ids = self.row_of.nonzero()[:, 0]
        row = self.row_of[ids].long()
        names = ("vocab_size", "dim", "beta1", "beta2", "eps", "moment_average", "absent_rows")
        return {
            "settings": {"optimizer": "adam", **{name: getattr(self, name) for name in names}},
            "step_count": self.step_count,
            "token_ids": ids,
            "first_moment": self.first[row],
            "second_moment": self.second[row],
            "last_step": self.last_step[row],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state has other settings (each difference is named), or moments that are not finite.
        """
        _check_settings(self.state_dict()["settings"], state["settings"])
        ids, first, second = state["token_ids"], state["first_moment"], state["second_moment"]
        for name, moment in (("first_moment", first), ("second_moment", second)):
            if tuple(moment.shape) != (len(ids), self.dim):
                raise ValueError(f"{name}: expected shape {(len(ids), self.dim)}, got {tuple(moment.shape)}")
            if not bool(moment.isfinite().all()):
                raise ValueError(f"{name}: expected finite values, got {int((~moment.isfinite()).sum())} that are not")
        self.step_count, self.rows = int(state["step_count"]), 1 + len(ids)
        self.row_of = torch.zeros(self.vocab_size, dtype=torch.int32, device=first.device)
        self.row_of[ids] = torch.arange(1, self.rows, dtype=torch.int32, device=first.device)
        self.first, self.second = (torch.cat([m.new_zeros(1, self.dim), m]) for m in (first, second))
        self.last_step = torch.cat([state["last_step"].new_zeros(1), state["last_step"]])

    def _propose_tokens(self, batch: TokenBatch) -> Tensor:
        self._fit(batch)
        coefficient = batch.advantages.to(batch.dtype)[:, None] * batch.score
        z, k = torch.empty_like(coefficient), coefficient.shape[1]
        for part in chunks(len(batch), 8 * k * self.dim * coefficient.element_size(), self.scratch_bytes):
            x = batch.features[part].to(batch.dtype)
            gradient = coefficient[part].reshape(-1, 1) * x.repeat_interleave(k, dim=0)
            direction = self._direction(batch.token_ids[part].flatten(), gradient)
            z[part] = torch.bmm(direction.view(-1, k, self.dim), x[:, :, None])[:, :, 0]
        return z

    def _direction(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """(R, D), Adam's direction if the rows `ids` (R,) received `gradient` (R, D) now; reads the moments."""
        first, second = self._decayed(self.row_of[ids].long(), self.step_count)
        first = self.beta1 * first + (1 - self.beta1) * gradient
        second = self.beta2 * second + (1 - self.beta2) * gradient.square()
        return self._ratio(first, second, self.step_count + 1)

    def _ratio(self, first: Tensor, second: Tensor, step: int) -> Tensor:
        root = second.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        return first.div(1 - self.beta1**step).div_(root)

    def _decayed(self, row: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The moments of table rows (R,) as they stand after `step` steps: (R, D) each."""
        first, second = self.first[row], self.second[row]
        if self.absent_rows == "decay":
            missed = (step - self.last_step[row])[:, None].to(first.dtype)
            first, second = first * self.beta1**missed, second * self.beta2**missed
        return first, second

    def _apply(self, gradient: RowGradient) -> None:
        ids, mean = gradient.token_ids, gradient.mean(self.moment_average)
        self._grow(ids, mean)
        row = self.row_of[ids].long()
        for part in chunks(len(row), 6 * self.dim * mean.element_size(), self.scratch_bytes):
            r, g = row[part], mean[part]
            first, second = self._decayed(r, self.step_count - 1)
            self.first[r] = self.beta1 * first + (1 - self.beta1) * g
            self.second[r] = self.beta2 * second + (1 - self.beta2) * g.square()
            self.last_step[r] = self.step_count

    def _grow(self, ids: Tensor, like: Tensor) -> None:
        """Give the ids (ascending) that have no row one, doubling the table when it is full."""
        self._place(like)
        new = ids[self.row_of[ids] == 0]
        needed = self.rows + len(new)
        if needed > len(self.first):
            size = min(max(needed, 2 * len(self.first)), self.vocab_size + 1)
            for name in ("first", "second", "last_step"):
                old = getattr(self, name)
                grown = old.new_zeros(size, *old.shape[1:])
                grown[: len(old)] = old
                setattr(self, name, grown)
        self.row_of[new] = torch.arange(self.rows, needed, dtype=torch.int32, device=new.device)
        self.rows = needed

    def _fit(self, batch: TokenBatch) -> None:
        """Check the batch against the model and follow its device.

        Raises:
            ValueError: the batch has another width.
        """
        if batch.features.shape[1] != self.dim:
            raise ValueError(f"features: expected width {self.dim}, got {batch.features.shape[1]}")
        self._place(torch.empty(0, dtype=batch.dtype, device=batch.features.device))

    def _place(self, like: Tensor) -> None:
        """Move the state to the device, and while it is empty the dtype, of `like`."""
        if self.first.device != like.device or (self.rows == 1 and self.first.dtype != like.dtype):
            dtype = like.dtype if self.rows == 1 else self.first.dtype
            self.first, self.second = (m.to(like.device, dtype) for m in (self.first, self.second))
            self.row_of, self.last_step = self.row_of.to(like.device), self.last_step.to(like.device)


def _dots(rows: Tensor, row: Tensor, features: Tensor, token: Tensor, scratch_bytes: int) -> Tensor:
    """(E,), rows[row_e] · x_{token_e} in bounded chunks, for `rows` (R, D), `row` and `token` (E,)."""
    out = rows.new_empty(len(row))
    for part in chunks(len(row), 3 * rows.shape[1] * rows.element_size(), scratch_bytes):
        out[part] = (rows[row[part].long()] * features[token[part]].to(rows.dtype)).sum(1)
    return out


def _check_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [f"{k}={theirs.get(k)!r} (expected {v!r})" for k, v in ours.items() if theirs.get(k) != v]
    if differing:
        raise ValueError(f"the saved optimizer model has other settings: {', '.join(differing)}")
