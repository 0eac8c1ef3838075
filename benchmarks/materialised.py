"""CAPO's optimizer model as the paper counts it (Appendix H): what `open_r1_capo.capo` is measured against.

Token gradients are (N, T, K, D) tensors, the moments are one tensor per vocabulary id in a dict. Nothing is
handicapped: the tensors are formed once, work is done in place where that is natural, and rows are summed by one
`index_add_`. Only the two choices above are what they are in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_r1_capo.capo import TokenBatch


class MaterialisedAdam:
    """Adam on the last layer's rows, with a tensor per id and gradients per token.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: ε.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first: dict[int, Tensor] = {}
        self.second: dict[int, Tensor] = {}
        self.step_count = 0

    def token_gradients(self, batch: TokenBatch, length: int) -> Tensor:
        """Eq. 7 of every token: (N, T, K, D) with T = `length`."""
        coefficient = batch.advantages[:, None] * batch.score
        x = batch.features.to(batch.dtype)
        return (coefficient[:, :, None] * x[:, None, :]).view(-1, length, *coefficient.shape[1:], x.shape[1])

    def propose(self, batch: TokenBatch, gradients: Tensor) -> Tensor:
        """z (N·T, K) of each token's own Adam step; reads the moments."""
        step = self.step_count + 1
        first, second = (self._by_token(moments, batch.token_ids, gradients) for moments in (self.first, self.second))
        first.mul_(self.beta1).add_(gradients, alpha=1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradients, gradients, value=1 - self.beta2)
        first.div_(1 - self.beta1**step)
        second.div_(1 - self.beta2**step).sqrt_().add_(self.eps)
        direction = first.div_(second)
        x = batch.features.to(direction.dtype)
        return torch.einsum("nkd,nd->nk", direction.view(-1, *direction.shape[2:]), x)

    def commit(self, batch: TokenBatch, weight: Tensor, gradients: Tensor) -> None:
        """One step of the moments with the tokens of positive weight (N·T,); a row takes the mean of its tokens."""
        self.step_count += 1
        ids, mean = self.row_means(batch, weight, gradients)
        for key, gradient in zip(ids.tolist(), mean, strict=True):
            if key not in self.first:
                self.first[key], self.second[key] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            self.first[key].mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
            self.second[key].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)

    def row_means(self, batch: TokenBatch, weight: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The ids (R,) that tokens of positive weight (N·T,) hold, and the mean of their weighted rows (R, D)."""
        kept = (batch.occupied & (weight > 0)[:, None]).flatten()
        flat = gradients.reshape(-1, gradients.shape[-1]) * weight.repeat_interleave(batch.token_ids.shape[1])[:, None]
        ids, row, count = torch.unique(batch.token_ids.flatten()[kept], return_inverse=True, return_counts=True)
        mean = flat.new_zeros(len(ids), flat.shape[1]).index_add_(0, row, flat[kept]).div_(count[:, None])
        return ids, mean

    def _by_token(self, moments: dict[int, Tensor], token_ids: Tensor, gradients: Tensor) -> Tensor:
        """The moments of every support id of every token: (N, T, K, D)."""
        zero = gradients.new_zeros(gradients.shape[-1])
        return torch.stack([moments.get(key, zero) for key in token_ids.flatten().tolist()]).view_as(gradients)
