"""Adam's moments of the vocabulary rows that were ever touched: one table, not one tensor per id."""

from __future__ import annotations

import torch
from torch import Tensor


class MomentTable:
    """First and second moments of the touched vocabulary rows, growing geometrically.

    Row 0 stays zero and stands for every id that was never touched, so that reading needs no mask. The table follows
    the device of what arrives; while no row is touched it takes its dtype as well (float32 at least).

    Attributes:
        row_of: (V,) int32, the table row of each id; 0 if it has none.
        rows: number of rows in use, the zero row included.
        first: (≥ rows, D), P.
        second: (≥ rows, D), Q.
        last_step: (≥ rows,) int64, the step that last wrote the row.
    """

    def __init__(self, vocab_size: int, dim: int):
        self.row_of = torch.zeros(vocab_size, dtype=torch.int32)
        self.rows = 1
        self.first = torch.zeros(1, dim)
        self.second = torch.zeros(1, dim)
        self.last_step = torch.zeros(1, dtype=torch.int64)

    def grow(self, ids: Tensor) -> Tensor:
        """The table rows (R,) int64 of distinct ids (R,), new ones for the ids that have none."""
        new = ids[self.row_of[ids] == 0]
        needed = self.rows + len(new)
        if needed > len(self.first):
            size = min(max(needed, 2 * len(self.first)), len(self.row_of) + 1)
            for name in ("first", "second", "last_step"):
                old = getattr(self, name)
                grown = old.new_zeros(size, *old.shape[1:])
                grown[: len(old)] = old
                setattr(self, name, grown)
        self.row_of[new] = torch.arange(self.rows, needed, dtype=torch.int32, device=new.device)
        self.rows = needed
        return self.row_of[ids].long()

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to `device`, and while no row is touched to `dtype`."""
        dtype = dtype if self.rows == 1 else self.first.dtype
        if self.first.device != device or self.first.dtype != dtype:
            self.first, self.second = self.first.to(device, dtype), self.second.to(device, dtype)
            self.row_of, self.last_step = self.row_of.to(device), self.last_step.to(device)

    def touched(self) -> dict[str, Tensor]:
        """Copies of the rows in use: token_ids (R,) ascending, first_ and second_moment (R, D), last_step (R,)."""
        ids = self.row_of.nonzero()[:, 0]
        row = self.row_of[ids].long()
        return {
            "token_ids": ids,
            "first_moment": self.first[row],
            "second_moment": self.second[row],
            "last_step": self.last_step[row],
        }

    def restore(self, token_ids: Tensor, first_moment: Tensor, second_moment: Tensor, last_step: Tensor) -> None:
        """Take the state that `touched()` gave.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary or twice, or moments that cannot be.
        """
        rows, dim, vocab = len(token_ids), self.first.shape[1], len(self.row_of)
        if token_ids.dim() != 1 or token_ids.is_floating_point():
            raise ValueError(f"token_ids: expected integers (R,), got {token_ids.dtype} {tuple(token_ids.shape)}")
        for name, moment in (("first_moment", first_moment), ("second_moment", second_moment)):
            if tuple(moment.shape) != (rows, dim):
                raise ValueError(f"{name}: expected shape {(rows, dim)}, got {tuple(moment.shape)}")
            if not bool(moment.isfinite().all()):
                raise ValueError(f"{name}: expected finite values, got {int((~moment.isfinite()).sum())} that are not")
        if bool((second_moment < 0).any()):
            raise ValueError(f"second_moment: expected values ≥ 0, got a minimum of {float(second_moment.min()):.4g}")
        if tuple(last_step.shape) != (rows,):
            raise ValueError(f"last_step: expected shape {(rows,)}, got {tuple(last_step.shape)}")
        if rows and (int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab):
            low, high = int(token_ids.min()), int(token_ids.max())
            raise ValueError(f"token_ids: expected values in 0..{vocab - 1}, got {low}..{high}")
        if len(token_ids.unique()) != rows:
            raise ValueError(f"token_ids: expected {rows} distinct ids, got {len(token_ids.unique())}")
        dtype = torch.promote_types(first_moment.dtype, torch.float32)
        first_moment, second_moment = first_moment.to(dtype), second_moment.to(dtype)
        self.rows = 1 + rows
        self.row_of = torch.zeros(vocab, dtype=torch.int32, device=first_moment.device)
        self.row_of[token_ids] = torch.arange(1, self.rows, dtype=torch.int32, device=first_moment.device)
        self.first, self.second = (torch.cat([m.new_zeros(1, dim), m]) for m in (first_moment, second_moment))
        self.last_step = torch.cat([last_step.new_zeros(1), last_step])
