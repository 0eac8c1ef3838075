"""Whether steps kept their KL budget, and where the runs ended."""

from __future__ import annotations

import numpy as np

from open_r1_capo.experiments.figures import tables
from open_r1_capo.experiments.figures.curves import Data
from open_r1_capo.experiments.figures.drawing import Result, heading

KEYS = ("budget/kl", "budget/nats", "budget/passes", "budget/taken_back")
TOLERANCE = 1.5  # budget.tolerance of all recipes


def budgets(data: Data) -> Result:
    """Table each arm's reward, and the largest KL of all steps of its runs as a multiple of the step's budget."""
    base = tables.base_of(data)
    rows, numbers = [], {}
    for line in data.lines:
        shares = np.concatenate([run.columns["budget/kl"] / run.columns["budget/nats"] for run in line.runs])
        passes, back = (np.concatenate([run.columns[key] for run in line.runs]) for key in KEYS[2:])
        halves = [float(np.mean(run.rewards[len(run.rewards) // 2 :])) for run in line.runs]
        one = tables.outcome(line, base) | {
            "second_half": halves,
            "steps": len(shares),
            "largest": float(shares.max()),
            "over": int((shares > TOLERANCE * (1 + 1e-9)).sum()),
            "taken_back": int(back.sum()),
            "passes": float(passes.mean()),
        }
        label = ", ".join((line.arm.label, *line.arm.overrides))
        numbers[label] = one
        ends = [tables.spread(halves), tables.spread(one["last"]), f"{one['collapsed']}/{one['n']}"]
        kept = [f"{one['largest']:.2f}", str(one["over"]), str(one["taken_back"]), f"{one['passes']:.2f}"]
        rows.append([line.arm.label, ", ".join(line.arm.overrides), *ends, str(one["steps"]), *kept])
    header = ["arm", "settings", "reward, second half", "last accuracy", "collapsed", "steps"]
    header += ["largest KL / budget", f"above {TOLERANCE}", "taken back", "passes a step"]
    notes = (
        f"Mean ± standard error over seeds; the steps of all runs. {tables.RULES} The base accuracy is {base:.3f}. "
    )
    table = tables.markdown(data.experiment.title, header, rows, notes + f"{data.seeds}.")
    return Result(heading(data) | {"base": base, "arms": numbers}, table=table)
