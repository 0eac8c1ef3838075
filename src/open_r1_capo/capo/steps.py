"""The optimizer model: the step that a gradient would become (paper §4.1, "Modeling the step").

`propose` turns each token's (or subset's) gradient g into the direction D = optimizer(g) and returns only the
logit change z = D x of every token; the step itself is α·D, of ascent. It reads the optimizer's state and never
changes it. `commit` takes one optimizer step with the accepted tokens; `planned` is the z of that very step.
Whatever has the width D of the layer is worked on in chunks of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.capo import adam, engines
from open_r1_capo.capo.last_layer import RowGradient, TokenBatch, merge, row_gradient
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import chunks, entry_dots, segment_sums, support_dots

SCRATCH_BYTES = 64 * 2**20  # bound of the temporary memory of one call


class _Step:
    """What both optimizer models share: collecting a global batch's gradient, and coarse subsets."""

    moment_average = "per_token"

    def __init__(self, scratch_bytes: int):
        self.scratch_bytes = scratch_bytes
        self.step_count = 0
        self._first: tuple[TokenBatch, Tensor] | None = None  # alone, it is committed without holding its gradient
        self._sum: RowGradient | None = None

    @torch.no_grad()
    def accumulate(self, batch: TokenBatch, weight: Tensor) -> None:
        """Add a micro-batch of the coming step: N tokens with their weights (N,) in [0, 1], which it keeps."""
        self._check(batch, weight)
        if self._first is None and self._sum is None:
            self._first = batch, weight
        else:
            self._sum = merge([self._collected(), row_gradient(batch, weight, self.scratch_bytes)])

    def _collected(self) -> RowGradient:
        """The sum over the micro-batches so far, which are forgotten."""
        found = self._sum if self._first is None else row_gradient(*self._first, self.scratch_bytes)
        self._first = self._sum = None
        return found

    @torch.no_grad()
    def commit(
        self,
        batch: TokenBatch | None = None,
        weight: Tensor | None = None,
        reduce: Callable[[RowGradient], RowGradient] | None = None,
    ) -> None:
        """Take one optimizer step with everything accumulated, and `batch` with its weights (N,) if given.

        `reduce` sums the gradient over the ranks and is called once. Without it, a single micro-batch needs no sum of
        its gradient rows (R, D): the engine folds each row into its moments.

        Raises:
            ValueError: nothing was accumulated and no batch is given, or a batch without weights.
        """
        if batch is not None and weight is None:
            raise ValueError(f"weight: expected shape {(len(batch),)}, got None")
        if batch is not None:
            self.accumulate(batch, weight)
        if self._first is None and self._sum is None:
            raise ValueError("commit: nothing was accumulated; pass a batch and its weights")
        self.step_count += 1
        if self._first is not None and reduce is None:
            only, self._first = self._first, None
            self._apply_batch(*only)
        else:
            gradient = self._collected()
            self._apply(reduce(gradient) if reduce else gradient)

    @torch.no_grad()
    def propose(self, batch: TokenBatch, granularity: str = "token") -> Tensor:
        """(N, K), z = D x per unit learning rate, with D = optimizer(mean gradient of the token's subset).

        The subset is the token itself, its `sequence` or `group` (by `batch.groups`), or the `batch`. z is 0 for the
        tokens whose subset has no gradient (A = 0 throughout), which need no work.

        Raises:
            ValueError: the batch does not fit the model's vocabulary or width, or `groups` is missing.
        """
        self._check(batch)
        moving = batch.advantages != 0
        if granularity != "token":
            _, subset = torch.unique(batch.subsets(granularity), return_inverse=True)
            moving = torch.zeros_like(subset, dtype=torch.bool).index_fill_(0, subset[moving], True)[subset]
        if not moving.any():
            return batch.features.new_zeros(batch.probs.shape, dtype=batch.dtype)
        part = batch if moving.all() else batch.select(moving)
        z = self._propose_tokens(part) if granularity == "token" else self._propose_subsets(part, granularity)
        if part is batch:
            return z
        return z.new_zeros(batch.probs.shape).masked_scatter_(moving[:, None], z)

    def _propose_subsets(self, batch: TokenBatch, granularity: str) -> Tensor:
        """`propose` for subsets of several tokens, a chunk of (subset, id) rows at a time."""
        _, subset = torch.unique(batch.subsets(granularity), return_inverse=True)
        occupied = batch.occupied
        token = occupied.nonzero()[:, 0]
        stride = int(batch.token_ids.max()) + 1
        pair, entry_pair = torch.unique(subset[token] * stride + batch.token_ids[occupied], return_inverse=True)
        order = torch.argsort(entry_pair, stable=True)
        token, entry_pair = token[order], entry_pair[order]
        coefficient = batch.coefficient[occupied][order]
        count = torch.bincount(entry_pair)
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        if self.moment_average == "per_logit":
            share = torch.bincount(entry_pair, (batch.advantages != 0)[token].float()).clamp(min=1)
        else:
            share = torch.bincount(subset)[pair // stride]
        x, dots = batch.features, torch.empty_like(coefficient)
        for rows in chunks(len(pair), 6 * x.shape[1] * coefficient.element_size(), self.scratch_bytes):
            bounds = offsets[rows.start : rows.stop + 1]
            part = slice(int(bounds[0]), int(bounds[-1]))
            total = segment_sums(bounds - part.start, token[part], coefficient[part], x, self.scratch_bytes)
            direction = self._direction(pair[rows] % stride, total.div_(share[rows, None]))
            dots[part] = entry_dots(direction, entry_pair[part] - rows.start, x, token[part], self.scratch_bytes)
        z, inverse = torch.zeros_like(batch.score), torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        z[occupied] = dots[inverse]
        return z

    def _check(self, batch: TokenBatch, weight: Tensor | None = None) -> None:
        """Raise ValueError for a batch that does not fit the model, or weights that do not fit the batch."""
        batch.validate(None)
        _check_weight(batch, weight)

    def _apply_batch(self, batch: TokenBatch, weight: Tensor) -> None:
        """Step with one batch and nothing else."""
        self._apply(row_gradient(batch, weight, self.scratch_bytes))


class SGDStep(_Step):
    """D = g: the step is the gradient itself, so a token's z = A ‖x‖² v is a closed form.

    Args:
        scratch_bytes: bound of the temporary memory of one call.
    """

    def __init__(self, scratch_bytes: int = SCRATCH_BYTES):
        super().__init__(scratch_bytes)
        self._committed: RowGradient | None = None

    @torch.no_grad()
    def planned(self, batch: TokenBatch) -> Tensor:
        """z (N, K) of the step that the last commit takes; 0 for ids that it does not touch."""
        z = torch.zeros_like(batch.score)
        if self._committed is None or len(self._committed.token_ids) == 0:
            return z
        ids = self._committed.token_ids
        place = torch.searchsorted(ids, batch.token_ids).clamp_(max=len(ids) - 1)
        z = support_dots(self._committed.total, place, batch.features, self.scratch_bytes) / self._committed.tokens
        return z.masked_fill_(ids[place] != batch.token_ids, 0).to(batch.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The step count; SGD has no moments."""
        return {"settings": {"optimizer": "sgd"}, "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if the state belongs to another optimizer model."""
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
        self.rule = adam.AdamRule(beta1, beta2, eps, moment_average, absent_rows)
        self.table = MomentTable(vocab_size, dim)

    @torch.no_grad()
    def planned(self, batch: TokenBatch) -> Tensor:
        """(N, K), z per unit learning rate of the step that the committed moments take (before the first commit: 0).

        Under `hold`, the rows that the last commit did not touch stay where they are, as in SparseAdam.
        """
        self._check(batch)
        if self.step_count == 0:
            return torch.zeros_like(batch.score)
        z = self._engine(batch).planned(self.rule, self.table, batch, self.step_count, self.scratch_bytes)
        return z.to(batch.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The settings, the step count and the touched rows: ids (R,), moments (R, D), last step (R,)."""
        names = ("vocab_size", "dim", "beta1", "beta2", "eps", "moment_average", "absent_rows")
        return {
            "settings": {"optimizer": "adam", **{name: getattr(self, name) for name in names}},
            "step_count": self.step_count,
            **self.table.touched(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state has other settings (each difference is named), or moments that cannot be.
        """
        names = ("token_ids", "first_moment", "second_moment", "last_step")
        missing = [name for name in ("settings", "step_count", *names) if name not in state]
        if missing:
            raise ValueError(f"the saved optimizer model lacks {', '.join(missing)}")
        _check_settings(self.state_dict()["settings"], state["settings"])
        self.table.restore(*(state[name] for name in names))
        self.step_count = int(state["step_count"])

    def _check(self, batch: TokenBatch, weight: Tensor | None = None) -> None:
        """Check the batch against the model and the weights against the batch, and follow its device."""
        _check_weight(batch, weight)
        if batch.features.shape[1] != self.dim:
            raise ValueError(f"features: expected width {self.dim}, got {batch.features.shape[1]}")
        batch.validate(self.vocab_size)
        self.table.place(batch.features.device, batch.dtype)

    def _propose_tokens(self, batch: TokenBatch) -> Tensor:
        return self._engine(batch).propose(self.rule, self.table, batch, self.step_count + 1, self.scratch_bytes)

    def _direction(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """(R, D), Adam's direction if the rows `ids` (R,) received `gradient` (R, D) now; reads the moments."""
        moments = self.rule.current(self.table, self.table.row_of[ids].long(), self.step_count)
        return self.rule.direction(*self.rule.blend(*moments, gradient), self.step_count + 1)

    def _apply_batch(self, batch: TokenBatch, weight: Tensor) -> None:
        self._engine(batch).commit(self.rule, self.table, batch, weight, self.step_count, self.scratch_bytes)

    def _engine(self, batch: TokenBatch) -> ModuleType:
        return engines.choose(self.table, batch.features, self.scratch_bytes)

    def _apply(self, gradient: RowGradient) -> None:
        self.table.place(gradient.total.device, gradient.total.dtype)
        row = self.table.grow(gradient.token_ids)
        adam.update(
            self.rule,
            self.table,
            row,
            lambda rows: gradient.mean(self.moment_average, rows),
            self.step_count,
            self.scratch_bytes,
        )


class NoStep:
    """D = 0: a last layer that is not trained. It has no state, and every z is 0."""

    step_count = 0

    def accumulate(self, batch: TokenBatch, weight: Tensor) -> None:
        """Nothing to add to."""

    def commit(self, **kwargs: Any) -> None:
        """No step to take."""

    def propose(self, batch: TokenBatch, granularity: str = "token") -> Tensor:
        """(N, K) zeros."""
        return torch.zeros_like(batch.score)

    def planned(self, batch: TokenBatch) -> Tensor:
        """(N, K) zeros."""
        return torch.zeros_like(batch.score)

    def state_dict(self) -> dict[str, Any]:
        """The kind of model alone."""
        return {"settings": {"optimizer": "none"}, "step_count": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over; ValueError if the state belongs to another optimizer model."""
        _check_settings(self.state_dict()["settings"], state["settings"])


def _check_weight(batch: TokenBatch, weight: Tensor | None) -> None:
    if weight is not None and tuple(weight.shape) != (len(batch),):
        raise ValueError(f"weight: expected shape {(len(batch),)}, got {tuple(weight.shape)}")


def _check_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [f"{k}={theirs.get(k)!r} (expected {v!r})" for k, v in ours.items() if theirs.get(k) != v]
    if differing:
        raise ValueError(f"the saved optimizer model has other settings: {', '.join(differing)}")
