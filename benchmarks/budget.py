"""What a KL budget costs, and how well it knows what it bounds, for several shares of the sequences measured.

    .venv/bin/python benchmarks/budget.py                        # the lab
    .venv/bin/python benchmarks/budget.py --scale smollm2 --steps 12

Cost: the seconds of a step over those of the same step without its measurements, after a warm-up. Knowledge: in runs
of their own, the exact KL of every step that was taken, over the whole vocabulary and all of its tokens, beside the
sampled estimate that was kept within the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import RESULTS
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.training import build as building
from open_r1_capo.training.budget_trainer import BudgetTrainer
from open_r1_capo.training.run import quiet

SHARES = (1.0, 0.25, 0.1)
BUDGETS = (1e-4, 1e-3, 1e-2)  # nats
WARM_UP = 10  # steps in which the rate is found


class Judged(BudgetTrainer):
    """Compares what is measured with the exact KL of every step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.judged: list[tuple[float, float]] = []  # KL as measured, and exact
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []

    def _keep(self, arguments, log_probs, entropies):
        super()._keep(arguments, log_probs, entropies)
        self._whole.append(
            (arguments["input_ids"], arguments["attention_mask"], self._inputs["completion_mask"].bool())
        )

    def before_step(self) -> None:
        """Keep the whole distributions before the step."""
        self._old = self._log_probs()
        super().before_step()

    def settle(self) -> float:
        """Judge what was settled."""
        rate = super().settle()
        exact = (self._old.exp() * (self._old - self._log_probs())).sum(1)
        self.judged.append((self.taken.kl, float(exact.mean())))
        self._whole.clear()
        return rate

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        """(N, V) float64, at every token of the update."""
        rows = []
        for ids, attention, mask in self._whole:
            logits = self.model(input_ids=ids, attention_mask=attention, logits_to_keep=mask.shape[1] + 1).logits
            rows.append((logits[:, :-1][mask].double() / self.temperature).log_softmax(1))
        return torch.cat(rows)


def train(scale: str, steps: int, kind: type[BudgetTrainer], budget: dict[str, Any]) -> BudgetTrainer:
    """Train `grpo_budget` without curvature for some steps, and the warm-up before them.

    Args:
        scale: of the recipe.
        steps: after the warm-up.
        kind: the trainer.
        budget: the settings `budget.*` that differ from the recipe's.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"scale={scale}", "save_strategy='no'", "capo.mode=off", f"max_steps={WARM_UP + steps}"]
        overrides += [f"budget.{key}={'null' if value is None else value}" for key, value in budget.items()]
        settings = compose_recipe("grpo_budget", overrides)
        config, args = building.build({**settings, "output_root": folder})
        torch.set_num_threads(config.num_threads or 1)
        model = building.policy_folder(config)
        tokenizer = building.load_tokenizer(model)
        building.BudgetTrainer = kind
        dataset = building.load_dataset(config, tokenizer, 0)
        trainer = building.make_trainer(config, args, building.known_rewards(config), model, tokenizer, dataset)
        trainer.train()
    return trainer


def cost(trainer: BudgetTrainer) -> dict[str, float]:
    """The seconds of the steps after the warm-up, over those without what was measured."""
    rows = [row for row in trainer.state.log_history if "time/measure" in row][WARM_UP:]
    measured, total = (sum(row[f"time/{name}"] for row in rows) for name in ("measure", "total"))
    ratios = [row["time/total"] / (row["time/total"] - row["time/measure"]) for row in rows]
    passes = statistics.fmean(row["budget/passes"] for row in rows)
    return {"ratio": total / (total - measured), "median": statistics.median(ratios), "passes": passes}


def knowledge(trainer: Judged, nats: float) -> dict[str, float]:
    """How the exact KL of the steps that were taken lies to its estimate, and to the budget."""
    pairs = [pair for pair in trainer.judged[WARM_UP:] if min(pair) > 0]
    logs = [math.log(exact / measured) for measured, exact in pairs]
    exact = [exact for _, exact in pairs]
    return {
        "bias": math.exp(statistics.fmean(logs)),
        "spread": math.exp(statistics.stdev(logs)),
        "largest": max(exact) / nats,
        "over": sum(kl > 1.5 * nats for kl in exact) / len(exact),
        "steps": len(exact),
    }


def main() -> None:
    """Measure both, print two tables, and store the numbers with `--save`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="lab")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    quiet()
    costs = {share: cost(train(options.scale, options.steps, BudgetTrainer, {"share": share})) for share in SHARES}
    print("| share measured | a step over one without | median | passes a step |\n|---|---|---|---|")
    for share, row in costs.items():
        print(f"| {share:g} | {row['ratio']:.3f} | {row['median']:.3f} | {row['passes']:.2f} |", flush=True)
    print("\n| budget | share | exact / measured | spread | largest exact / budget | above 1.5 | steps |")
    print("|---|---|---|---|---|---|---|")
    known = []
    for nats in BUDGETS:
        for share in SHARES:
            budget = {"entropy_share": None, "nats": nats, "share": share}
            row = knowledge(train(options.scale, options.steps, Judged, budget), nats)
            known.append({"nats": nats, "share": share} | row)
            print(f"| {nats:g} | {share:g} | {row['bias']:.2f} | × {row['spread']:.2f} | {row['largest']:.2f} | "
                  f"{row['over']:.1%} | {row['steps']} |", flush=True)  # fmt: skip
    if options.save:
        numbers = {"scale": options.scale, "cost": {f"{share:g}": row for share, row in costs.items()}, "known": known}
        Path(RESULTS / f"budget_{options.scale}.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
