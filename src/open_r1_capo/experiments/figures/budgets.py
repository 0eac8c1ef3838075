"""KL budgets: whether every step kept its budget, where the runs ended, and how well the first guess fits."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np

from open_r1_capo.experiments.figures import stats, tables
from open_r1_capo.experiments.figures.curves import Data, RunData
from open_r1_capo.experiments.figures.drawing import CYCLE, RC, Panel, Result, caption, finish, heading
from open_r1_capo.experiments.figures.paper import ACCURACY, Layout

KEYS = ("budget/kl", "budget/nats", "budget/passes", "budget/taken_back")
GUARANTEE_KEYS = ("budget/kl", "budget/nats", "capo/measured_kl", "capo/skipped_step")
GUESS_KEYS = ("budget/kl", "budget/alpha", "budget/passes", "capo/batch_policy_shift")
TOLERANCE = 1.5  # budget.tolerance of all recipes
TARGET = 0.888  # last accuracy of conservative GRPO on the lab (fig2)
SETTLED = 10  # steps after which a first guess is judged: the rate has been found


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
            "completions": [stats.cost_to(TARGET, r.columns["reward"], r.columns["completions"]) for r in line.runs],
        }
        label = ", ".join((line.arm.label, *line.arm.overrides))
        numbers[label] = one
        ends = [tables.spread(halves), tables.spread(one["last"]), f"{one['collapsed']}/{one['n']}"]
        ends.append(tables.number(float(np.quantile(one["completions"], 0.5, method="inverted_cdf")), ",.0f"))
        kept = [f"{one['largest']:.2f}", str(one["over"]), str(one["taken_back"]), f"{one['passes']:.2f}"]
        rows.append([line.arm.label, ", ".join(line.arm.overrides), *ends, str(one["steps"]), *kept])
    header = ["arm", "settings", "reward, second half", "last accuracy", "collapsed"]
    header += [f"completions to {TARGET}", "steps"]
    header += ["largest KL / budget", f"above {TOLERANCE}", "taken back", "passes a step"]
    notes = "Mean ± standard error over seeds, the median of completions; the steps of all runs. "
    notes += f"{tables.RULES} The base accuracy is {base:.3f}. "
    table = tables.markdown(data.experiment.title, header, rows, notes + f"{data.seeds}.")
    return Result(heading(data) | {"base": base, "arms": numbers}, table=table)


def long_runs(data: Data) -> Layout:
    """Accuracy and the KL of every step, over a long run."""
    return [ACCURACY, Panel("capo/measured_kl", "measured KL of a step (nats)", scale="log", smooth=False)], 2


# --- the guarantee ---------------------------------------------------------------------------------------------------


def of_budget(run: RunData) -> np.ndarray:
    """(T,) each step's measured KL as a multiple of its budget: a KL budget's own, or a step rule's δ_step."""
    if not np.isnan(run.columns["budget/nats"]).all():
        return run.columns["budget/kl"] / run.columns["budget/nats"]
    taken = np.nan_to_num(run.columns["capo/skipped_step"]) == 0
    return run.columns["capo/measured_kl"][taken] / float(run.settings["capo"]["step_policy_shift"])


def guarantee(data: Data) -> Result:
    """Draw which share of the steps is above a multiple of its budget, and table the largest, for every step rule."""
    rows, numbers = [], {}
    with plt.rc_context(RC):
        figure, axis = plt.subplots(figsize=(6.4, 3.6))
        for line, (colour, dashes) in zip(data.lines, CYCLE, strict=False):
            multiples = np.sort(np.concatenate([of_budget(run) for run in line.runs]))
            above = 1 - np.arange(len(multiples)) / len(multiples)
            axis.step(np.maximum(multiples, 1e-2), above, label=line.arm.label, color=colour, ls=(0, dashes or ()))
            over = int((multiples > TOLERANCE * (1 + 1e-9)).sum())
            numbers[line.arm.label] = {"steps": len(multiples), "largest": float(multiples[-1]), "over": over}
            last = tables.spread([float(np.mean(run.rewards[-10:])) for run in line.runs])
            rows.append([line.arm.label, str(len(multiples)), f"{multiples[-1]:.3g}", str(over), last])
        axis.axvline(TOLERANCE, color="#444444", lw=1, ls=":", label=f"tolerance, {TOLERANCE:g}")
        axis.set(xscale="log", yscale="log", xlabel="KL of a step / its budget", ylabel="share of steps above")
        axis.set_xlim(left=1e-2)
        finish(figure, data, "")
        caption(figure, f"{data.experiment.scale}; every step of every run; {data.seeds}")
    header = ["rule", "steps", "largest KL / budget", f"steps above {TOLERANCE}", "last accuracy"]
    table = tables.markdown(data.experiment.title, header, rows, f"{data.seeds}; mean ± standard error.")
    return Result(heading(data) | {"rules": numbers}, figure, table)


# --- the first guess of α --------------------------------------------------------------------------------------------


def first_guesses(data: Data) -> Result:
    """Table how often a guess of the coming step's curvature c = KL / α² would have needed one measurement.

    The guesses: c of the step before (what `target` does), the running average of log c, the secant through the last
    two, and c of the step before times the change that the last layer predicts: m_F(batch) at the rate of one.
    """
    rows, numbers = [], {}
    for line in data.lines:
        found = [guesses_of(run) for run in line.runs]
        hits = {name: float(np.mean(np.concatenate([one[name] for one in found]))) for name in found[0]}
        passes = float(np.mean(np.concatenate([run.columns["budget/passes"][SETTLED:] for run in line.runs])))
        numbers[line.arm.label] = hits | {"passes": passes}
        rows.append([line.arm.label, f"{passes:.2f}", *(f"{100 * hit:.0f} %" for hit in hits.values())])
    header = ["arm", "passes a step", *hits]
    notes = f"Share of the steps after {SETTLED} whose KL the guess would have put within {TOLERANCE} of the budget. "
    table = tables.markdown(data.experiment.title, header, rows, notes + f"{data.seeds}.")
    return Result(heading(data) | {"arms": numbers}, table=table)


def guesses_of(run: RunData) -> dict[str, np.ndarray]:
    """Guess → whether it would have fitted, (T',) bool, for the steps whose two predecessors moved the policy."""
    kl, alpha, _, shift = (run.columns[key] for key in GUESS_KEYS)
    with np.errstate(divide="ignore", invalid="ignore"):
        c = np.log(kl / alpha**2)
        predicted = np.log(shift[1:] / alpha[:-1] ** 2)  # the shift is logged at the rate of the step before
    average = np.full(len(c), np.nan)
    for t in range(1, len(c)):
        before = average[t - 1] if math.isfinite(average[t - 1]) else c[t - 1]
        average[t] = 0.5 * before + 0.5 * c[t - 1] if math.isfinite(c[t - 1]) else before
    known = np.isfinite(c[2:] + c[1:-1] + c[:-2] + predicted[1:] + predicted[:-1])
    known[: SETTLED - 2] = False
    guesses = {
        "the step before": c[1:-1],
        "running average": average[2:],
        "secant": 2 * c[1:-1] - c[:-2],
        "predicted change": c[1:-1] + predicted[1:] - predicted[:-1],
    }
    return {name: (np.abs(c[2:] - guess) < math.log(TOLERANCE))[known] for name, guess in guesses.items()}
