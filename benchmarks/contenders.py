"""The implementations that the benchmarks compare, behind two calls: `propose(batch)` and `commit(batch)`.

Run as a script it prints the extra peak memory of one contender as JSON, alone in its process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from common import Shape, everyone, extra_peak
from materialised import MaterialisedAdam
from open_r1_capo.capo import AdamStep, TokenBatch
from open_r1_capo.capo.segments import ENGINE_VARIABLE


@contextmanager
def engine_named(name: str) -> Iterator[None]:
    """Have `AdamStep` use this engine; the empty name leaves the choice to it."""
    before = os.environ.get(ENGINE_VARIABLE, "")
    os.environ[ENGINE_VARIABLE] = name
    try:
        yield
    finally:
        os.environ[ENGINE_VARIABLE] = before


class Ours:
    """`AdamStep`, on the engine that it chooses or on torch alone."""

    def __init__(self, shape: Shape, engine: str):
        self.step, self.engine = AdamStep(shape.vocab, shape.dim), engine

    def propose(self, batch: TokenBatch) -> Tensor:
        """z (N, K)."""
        with engine_named(self.engine):
            return self.step.propose(batch)

    def commit(self, batch: TokenBatch) -> None:
        """One step with all tokens."""
        with engine_named(self.engine):
            self.step.commit(batch, everyone(batch))


class Materialised:
    """The paper's tensors; the token gradients are formed by the proposal and used again by the commit."""

    def __init__(self, shape: Shape):
        self.step, self.length = MaterialisedAdam(), shape.length
        self.gradients: Tensor | None = None

    def propose(self, batch: TokenBatch) -> Tensor:
        """z (N·T, K)."""
        self.gradients = self.step.token_gradients(batch, self.length)
        return self.step.propose(batch, self.gradients)

    def commit(self, batch: TokenBatch) -> None:
        """One step with all tokens."""
        if self.gradients is None:
            self.gradients = self.step.token_gradients(batch, self.length)
        self.step.commit(batch, everyone(batch), self.gradients)
        self.gradients = None


class Official(Materialised):
    """The authors' `SparseAdamModel` from a checkout of theirs; the trainer around it is replaced by `Materialised`.

    Their row means are inside a trainer class, so ours stand for them: one `index_add_`, split into a dict.
    """

    def __init__(self, shape: Shape, checkout: str):
        super().__init__(shape)
        sys.path.insert(0, str(Path(checkout) / "src"))
        from open_r1.sparse_optim_models.sparse_adam_model import SparseAdamModel

        self.model = SparseAdamModel()

    def propose(self, batch: TokenBatch) -> Tensor:
        """z (N·T, K)."""
        self.gradients = self.step.token_gradients(batch, self.length)
        ids = batch.token_ids.view(self.gradients.shape[:3])
        effective = self.model.compute_effective_token_gradients(self.gradients, ids, batch.features.device)
        return torch.einsum("nkd,nd->nk", effective.view(len(batch), -1, effective.shape[-1]), batch.features)

    def commit(self, batch: TokenBatch) -> None:
        """One step with all tokens."""
        if self.gradients is None:
            self.gradients = self.step.token_gradients(batch, self.length)
        ids, mean = self.step.row_means(batch, everyone(batch), self.gradients)
        self.model.update_effective_gradient_moments(dict(zip(ids.tolist(), mean, strict=True)))
        self.gradients = None


def build(name: str, shape: Shape) -> Ours | Materialised:
    """`ours`, `ours (torch)`, `materialised`, or `official` with a checkout in the environment's OFFICIAL."""
    if name.startswith("ours"):
        return Ours(shape, "torch" if "torch" in name else "")
    return Official(shape, os.environ["OFFICIAL"]) if name == "official" else Materialised(shape)


def main() -> None:
    """Print the MB that a proposal and a commit need beyond what was there, moments with all rows included."""
    torch.set_num_threads(1)
    shape = Shape(**json.loads(sys.argv[2]))
    contender = build(sys.argv[1], shape)
    small = build(sys.argv[1], Shape(tokens=8, length=4, dim=64))  # libraries load before the measurement
    tiny = Shape(tokens=8, length=4, dim=64).batch(0)
    small.commit(tiny)
    small.propose(tiny)
    for seed in range(2):
        contender.commit(shape.batch(seed))
    batch = shape.batch(9)
    print(json.dumps({"extra_mb": extra_peak(lambda: (contender.propose(batch), contender.commit(batch)))}))


if __name__ == "__main__":
    main()
