"""The theorem's constants at real steps: r, M and ω of the steps that a run takes from its checkpoints.

python -m open_r1_capo.experiments.theorem.constants outputs/grpo_aggressive/lab/seed0    # trained with save_steps=5

Each step is taken again, exactly; the surrogate objective of its own tokens, mean A π'(a)/π(a), is differentiated over
all parameters in float64. Writes theorem_steps.json and theorem_steps.md into OUT. Exit codes: 0 done; 2 the run
cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from open_r1_capo.experiments.counterfactual import Counterfactual
from open_r1_capo.experiments.figures.drawing import Result, save
from open_r1_capo.experiments.mechanism import table
from open_r1_capo.experiments.theorem.selection import largest_share, penalty
from open_r1_capo.runs.checkpoints import step_of
from open_r1_capo.runs.exit import UserError, positive, run_cli
from open_r1_capo.training.run import quiet
from open_r1_capo.training.update import MicroBatch

ALONG = (0.0, 0.5, 1.0)  # shares of a step at which the curvature is measured
NAMES = {
    "radius": "r = ‖Δθ‖",
    "slope": "gᵀΔθ",
    "curved": "½ ΔθᵀHΔθ",
    "change": "measured change of L",
    "norm": "M at θ ≥",
    "norm_along": "M along the step ≥",
    "margin": "½ M r², with M at θ",
    "kl": "KL (nats)",
    "share": "gᵀΔθ / (C √KL)",
    "bound": "its largest value at this T",
}


def surrogate_and_kl(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch], old: Sequence[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """mean A π'(a)/π(a), and mean KL(π ‖ π') in nats, over an update's tokens; `old` are `log_probs` of π."""
    objective = kl = torch.zeros((), dtype=torch.float64)
    for one, before in zip(micro_batches, old, strict=True):
        now = log_probs(model, one, temperature)
        actions = one.input_ids[:, -one.mask.shape[1] :][one.mask][:, None]
        ratio = (now - before).gather(1, actions)[:, 0].exp()
        objective = objective + (one.tokens.advantages.double() * ratio).sum()
        kl = kl + (before.exp() * (torch.expm1(now - before) - (now - before))).sum()
    count = sum(len(one.tokens) for one in micro_batches)
    return objective / count, kl / count


def log_probs(model: PreTrainedModel, one: MicroBatch, temperature: float) -> Tensor:
    """(N, V), log π of a micro-batch's tokens over the whole vocabulary."""
    with sdpa_kernel(SDPBackend.MATH):  # the only one that can be differentiated twice
        logits = model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False).logits
    length = one.mask.shape[1]
    return torch.log_softmax(logits[:, -length - 1 : -1][one.mask] / temperature, -1)


def curvature_product(value: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v (P,) ↦ H v of a scalar function of `parameters`, by differentiating twice; the graph is kept."""
    gradient = flat(torch.autograd.grad(value(), parameters, create_graph=True))
    return lambda vector: flat(torch.autograd.grad(gradient @ vector, parameters, retain_graph=True))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """(P,), tensors one after the other."""
    return torch.cat([part.reshape(-1) for part in parts])


def operator_norm(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> float:
    """‖H‖ of a symmetric matrix from below, by power iteration from `start` (P,)."""
    vector, size = start / start.norm(), 0.0
    for _ in range(iterations):
        vector = product(vector)
        size = float(vector.norm())
        if size == 0:
            return 0.0
        vector = vector / size
    return size


class Steps:
    """A run and the constants of its steps."""

    def __init__(self, folder: Path, iterations: int):
        self.source, self.iterations = Counterfactual(folder, problems=1, samples=1), iterations

    def at(self, checkpoint: Path) -> dict[str, float]:
        """The numbers NAMES of the step that follows a checkpoint, and `step`, `length` (T), `advantage` (ε)."""
        model = self.source.policy(checkpoint).double().eval()
        trainer = self.source.take_step(checkpoint)
        after = flat([p.detach().double() for p in trainer.policy.parameters()])
        parameters = [p.requires_grad_() for p in model.parameters()]
        before = flat([p.detach() for p in parameters])
        step, batches, temperature = after - before, trainer.micro_batches, trainer.temperature
        with torch.no_grad():
            old = [log_probs(model, one, temperature) for one in batches]
        start = torch.randn(len(step), generator=torch.Generator().manual_seed(0), dtype=step.dtype)

        def objective() -> Tensor:
            return surrogate_and_kl(model, batches, old, temperature)[0]

        norms, values = [], []
        for share in ALONG:
            move_to(parameters, before + share * step)
            product = curvature_product(objective, parameters)
            norms.append(operator_norm(product, start, self.iterations))
            if share == 0:
                slope = float(flat(torch.autograd.grad(objective(), parameters)) @ step)
                curved = float(step @ product(step)) / 2
            with torch.no_grad():
                values.append([float(value) for value in surrogate_and_kl(model, batches, old, temperature)])
        length = max(int(one.mask.sum(1).max()) for one in batches)
        mean_length = sum(len(one.tokens) for one in batches) / sum(len(one.mask) for one in batches)
        epsilon = max(float(one.tokens.advantages.abs().max()) for one in batches)
        kl, radius = values[-1][1], float(step.norm())
        # over T steps a text that has ended still counts, with a KL of 0; J is the sum of a text's tokens
        needed = penalty(1.0, length) * epsilon * (kl * mean_length / length) ** 0.5
        return {
            "step": step_of(checkpoint) + 1,
            "length": length,
            "advantage": epsilon,
            "radius": radius,
            "slope": slope,
            "curved": curved,
            "change": values[-1][0] - values[0][0],
            "norm": norms[0],
            "norm_along": max(norms),
            "margin": norms[0] * radius**2 / 2,
            "kl": kl,
            "share": mean_length * slope / needed if needed else float("nan"),
            "bound": largest_share(1.0, length),
        }


def move_to(parameters: Sequence[Tensor], place: Tensor) -> None:
    """Set parameters to the flat vector `place` (P,)."""
    with torch.no_grad():
        for parameter, part in zip(parameters, place.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def work(options: argparse.Namespace) -> None:
    """Measure every checkpoint's step, print and write."""
    steps, rows = Steps(options.run, options.iterations), []
    for checkpoint in steps.source.checkpoints()[: options.checkpoints]:
        rows.append(steps.at(checkpoint))
        print(f"step {rows[-1]['step']}", file=sys.stderr)
    text = table(["step", *NAMES.values()], [[str(row["step"]), *(row[name] for name in NAMES)] for row in rows])
    print(text)
    try:
        save(
            Result({"recipe": steps.source.settings["recipe"], "steps": rows}, table=text),
            "theorem_steps",
            options.out,
        )
    except OSError as error:
        raise UserError(f"{error.filename or options.out} cannot be written ({error.strerror})") from None


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    name = "python -m open_r1_capo.experiments.theorem.constants"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder with checkpoints")
    parser.add_argument("--iterations", type=positive, default=10, help="of the power iteration")
    parser.add_argument("--checkpoints", type=positive, help="only the first so many; each takes half a minute")
    parser.add_argument("--out", type=Path, default=Path("outputs/figures"))
    options = parser.parse_args(argv)
    quiet()
    return run_cli(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
