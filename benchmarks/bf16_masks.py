"""How many masks change when the features are bfloat16 instead of float32, on a training run of the lab.

Two copies of the optimizer model see the same tokens with the same weights, one with features rounded to bfloat16;
each keeps its own moments, as two runs would. Counted are the tokens with a gradient whose acceptance differs, at the
thresholds of the paper (Table 4) and of the run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoTokenizer

from common import save
from open_r1_capo.capo import AdamStep, Mask, TokenBatch, objective_shift, policy_shift
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.tasks.lab.policy import base_policy
from open_r1_capo.training.build import build, known_rewards, load_dataset, make_trainer
from open_r1_capo.training.run import quiet

PAPER = {"CAPO": (1e-4, 1e-2), "Dr.CAPO": (1e-3, 5e-4), "ReinCAPO": (1e-5, 1e-1)}  # (δ_F, δ_H), Table 4


class Twins(AdamStep):
    """An `AdamStep` with a twin that sees bfloat16 features, comparing their masks as it goes.

    Args:
        like: the optimizer model that it replaces, before its first step.
        regions: the thresholds to compare at, by name.
        rate: gives the learning rate.
    """

    def __init__(self, like: AdamStep, regions: dict[str, Mask], rate):
        settings = (like.vocab_size, like.dim, like.beta1, like.beta2, like.eps, like.moment_average, like.absent_rows)
        super().__init__(*settings)
        self.twin, self.regions, self.rate = AdamStep(*settings), regions, rate
        self.tokens = 0
        self.rejected, self.changed = dict.fromkeys(regions, 0), dict.fromkeys(regions, 0)

    def propose(self, batch: TokenBatch, granularity: str = "token") -> Tensor:
        """z of the float32 features; counts the masks that those of bfloat16 change."""
        z, rounded = super().propose(batch, granularity), _rounded(batch)
        exact = self._shifts(batch, z)
        narrow = self._shifts(rounded, self.twin.propose(rounded, granularity))
        moving = batch.advantages != 0
        self.tokens += int(moving.sum())
        for name, region in self.regions.items():
            weight, other = region.judge(*exact).weight, region.judge(*narrow).weight
            self.rejected[name] += int(((weight == 0) & moving).sum())
            self.changed[name] += int(((weight != other) & moving).sum())
        return z

    def accumulate(self, batch: TokenBatch, weight: Tensor) -> None:
        """Both take the tokens, with the weights of the run."""
        super().accumulate(batch, weight)
        self.twin.accumulate(_rounded(batch), weight)

    def commit(self, *args, **kwargs) -> None:
        """Both step."""
        super().commit(*args, **kwargs)
        self.twin.commit(*args, **kwargs)

    def _shifts(self, batch: TokenBatch, z: Tensor) -> tuple[Tensor, Tensor]:
        return policy_shift(batch, z, self.rate()), objective_shift(batch, z, self.rate())


def _rounded(batch: TokenBatch) -> TokenBatch:
    return replace(batch, features=batch.features.to(torch.bfloat16))


def main() -> None:
    """Train, count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="capo_aggressive")
    parser.add_argument("overrides", nargs="*", help="of the recipe, for example seed=1 max_steps=30")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["scale=lab", "save_strategy=no", f"output_root={folder}", *options.overrides]
        settings = compose_recipe(options.recipe, overrides)
        config, args = build(settings)
        torch.set_num_threads(1)
        model = str(base_policy())
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        dataset = load_dataset(config, tokenizer, args.seed)
        trainer = make_trainer(config, args, known_rewards(config), model, tokenizer, dataset)
        regions = {name: Mask(*bounds) for name, bounds in PAPER.items()} | {"run": config.capo.rule}
        twins = trainer.step_model = Twins(trainer.step_model, regions, trainer._coming_lr)
        trainer.train()
    steps = {"recipe": options.recipe, "seed": args.seed, "steps": args.max_steps, "learning_rate": args.learning_rate}
    print(f"{steps}, {twins.tokens} tokens with a gradient\n\n| thresholds | δ_F | δ_H | rejected | masks changed |")
    print("|---|--:|--:|--:|--:|")
    rows = {}
    for name, region in regions.items():
        rejected, changed = (count[name] / max(1, twins.tokens) for count in (twins.rejected, twins.changed))
        bounds = [region.max_policy_shift, region.max_objective_shift]
        rows[name] = {
            "rejected": rejected,
            "changed": changed,
            "bounds": [b if math.isfinite(b) else None for b in bounds],
        }
        print(f"| {name} | {bounds[0]:g} | {bounds[1]:g} | {rejected:.2%} | {changed:.3%} |")
    save("bf16_masks", {**steps, "tokens": twins.tokens, "thresholds": rows})


if __name__ == "__main__":
    main()
