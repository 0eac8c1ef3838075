"""The tables of the paper and ours, as Markdown and numbers, and the helpers that all tables share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from open_r1_capo.experiments.figures import published, stats
from open_r1_capo.experiments.figures.curves import TEST, Data, FigureError, Line, RunData
from open_r1_capo.experiments.figures.drawing import Result, heading
from open_r1_capo.runs import outcomes

SECONDS = {  # the rows of Table 1 that TRL's step can be split into
    "time/generate": "generation",
    "time/reward": "reward",
    "time/curvature": "CAPO: shifts, selection, moments",
    "time/measure": "measuring the true KL",
    "time/train": "forward and backward passes, optimizer",
    "time/total": "total",
}
TABLE5_KEYS = ("capo/kl_spearman", "capo/policy_shift/mean", "capo/batch_policy_shift", "capo/measured_kl")
TAKEN_KEYS = ("capo/step_scale", "capo/skipped_step")  # what `pairs` needs to know of the step that was taken
ACTS = ("capo/rejected_frac", "capo/scaled_frac")
TUNING_HALF = 0.5  # docs/protocol.md: the mean reward of the second half of a run decides
RULES = (
    f"Collapsed: the mean of the last {outcomes.WINDOW} steps is below the base accuracy (mean reward of the first "
    f"step over all runs) after a window at least {100 * outcomes.RISE:.0f} points above it. Fell: it is more than "
    f"{100 * outcomes.MARGIN:.0f} points below the best window. Survived: not fallen. "
    "Usable: survived, and not below the base accuracy."
)
Estimate = dict[str, float]  # value, and the ends low and high of its 95 % bootstrap interval


# --- how numbers are written -----------------------------------------------------------------------------------------


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> str:
    """A Markdown table with a title above, and below the notes on how its numbers were made."""
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), "", notes, ""])


def number(value: float, form: str = ".3f") -> str:
    """Write a number; – for an unknown one, and words for a target that is not reached."""
    if math.isnan(value):
        return "–"
    return "not reached" if math.isinf(value) else format(value, form).rstrip(".")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Write mean ± standard error over seeds; NaN values are left out."""
    known = [value for value in values if not math.isnan(value)]
    _, mean, error = stats.mean_and_error([{0: value} for value in known])
    if not len(mean):
        return "–"
    return f"{mean[0]:{form}}" + ("" if math.isnan(error[0]) else f" ± {error[0]:{form}}")


def interval(estimate: Estimate, form: str = ".3f") -> str:
    """Write an estimate as value [low, high]."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    known = not (math.isnan(low) or math.isinf(low))
    return number(value, form) + (f" [{number(low, form)}, {number(high, form)}]" if known else "")


# --- what is tabled --------------------------------------------------------------------------------------------------


def pairs(run: RunData, predicted: str, measured: str, exponent: int) -> np.ndarray:
    """Prediction and measurement (T', 2) of each step that was taken, without NaN.

    The metrics predict the scheduled rate's step; a planned one was shorter by s = capo/step_scale: m_F is quadratic
    in it (`exponent` 2), m_H linear to first order. Skipped steps moved nothing and are left out.
    """
    scale = np.nan_to_num(run.columns["capo/step_scale"], nan=1.0)
    both = np.stack([run.columns[predicted] * scale**exponent, run.columns[measured]], axis=1)
    return both[np.isfinite(both).all(1) & (np.nan_to_num(run.columns["capo/skipped_step"]) == 0)]


def pooled(statistic: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Sequence[np.ndarray]], float]:
    """Turn a statistic of two columns into one of the pooled steps of several seeds."""
    return lambda seeds: statistic(*np.concatenate(list(seeds)).T)


def estimate(
    seeds: Sequence[np.ndarray], statistic: Callable[[Sequence[np.ndarray]], float], draws: int = stats.DRAWS
) -> Estimate:
    """A statistic of seeds' steps with its 95 % bootstrap interval over seeds and steps."""
    seeds = [rows for rows in seeds if len(rows)]
    if not seeds:
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    low, high = stats.bootstrap(seeds, statistic, steps=True, draws=draws)
    return {"value": statistic(seeds), "low": low, "high": high}


def mean(seeds: Sequence[np.ndarray]) -> float:
    """Mean over the steps of several seeds."""
    return float(np.concatenate(list(seeds)).mean())


def mean_seconds(run: RunData, key: str) -> float:
    """Mean of a time/ metric over the steps after the first, which warms caches up; NaN if it was not logged."""
    values = run.series(key)[1][1:]
    return float(values.mean()) if len(values) else float("nan")


def acted_on(run: RunData) -> float:
    """The mean share of a run's tokens that were rejected or scaled."""
    return float(sum(np.nan_to_num(run.columns[key]).mean() for key in ACTS))


def base_of(data: Data) -> float:
    """The base policy's accuracy, as the runs of an experiment at its scale tell it."""
    return outcomes.base_accuracy([run.rewards for run in data.runs])


def outcome(line: Line, base: float) -> dict[str, Any]:
    """Last and best accuracy of an arm's runs, and how many of n collapsed, fell, survived and stayed usable."""
    rewards = [run.rewards for run in line.runs]
    survived = sum(map(outcomes.survived, rewards))
    return {
        "n": len(rewards),
        "last": [outcomes.last_accuracy(one) for one in rewards],
        "best": [outcomes.best_accuracy(one) for one in rewards],
        "collapsed": sum(outcomes.collapsed(one, base) for one in rewards),
        "fell": len(rewards) - survived,
        "survived": survived,
        "usable": sum(outcomes.usable(one, base) for one in rewards),
        "test": [float(run.tests[-1][TEST]) for run in line.runs if run.tests],
    }


def cost(line: Line, target: float, column: str) -> Estimate:
    """The median over seeds of what a target costs, with its bootstrap interval over seeds; ∞: not reached."""
    spent = [np.array([stats.cost_to(target, run.columns["reward"], run.columns[column])]) for run in line.runs]
    median = lambda seeds: float(np.quantile(np.concatenate(seeds), 0.5, method="inverted_cdf"))  # noqa: E731
    low, high = stats.bootstrap(spent, median)
    return {"value": median(spent), "low": low, "high": high, "reached": int(np.isfinite(spent).sum())}


# --- the tables ------------------------------------------------------------------------------------------------------


def table1(data: Data) -> Result:
    """Table 1: where the seconds of a step go, in mean seconds and shares of the total."""
    rows, numbers = [], {line.arm.label: {} for line in data.lines}
    paper = published.SECONDS if data.experiment.scale == published.SCALE else {}
    for key, label in SECONDS.items():
        cells = [label]
        for line in data.lines:
            seconds, total = ([mean_seconds(run, name) for run in line.runs] for name in (key, "time/total"))
            average = float(np.mean(seconds))
            share = average / float(np.mean(total))
            numbers[line.arm.label][key] = {"seconds": average, "share": share}
            cells.append("–" if math.isnan(share) else f"{spread(seconds)} ({share:.1%})")
        if paper:
            cells.append(f"{paper[key]:.2f} ({paper[key] / paper['time/total']:.1%})" if key in paper else "–")
        rows.append(cells)
    header = ["seconds a step", *numbers, *(["paper"] if paper else [])]
    notes = f"Mean seconds a step without the first, ± standard error over seeds; share of the total. {data.seeds}."
    return Result(heading(data) | {"arms": numbers}, table=markdown(data.experiment.title, header, rows, notes))


def table5(data: Data) -> Result:
    """Table 5: Spearman's ρ of m_F with the measured KL, by token and by batch, with its interval."""
    rho = pooled(stats.spearman)
    batch, token = "capo/batch_policy_shift", "capo/policy_shift/mean"
    kinds = {
        "token: in a step, mean over steps": ("token", lambda run: run.series("capo/kl_spearman")[1][:, None], mean),
        "token: mean m_F of a step's tokens, over steps": (
            "step", lambda run: pairs(run, token, "capo/measured_kl", 0), rho),
        "batch: over steps": ("batch", lambda run: pairs(run, batch, "capo/measured_kl", 2), rho),
    }  # fmt: skip
    rows, numbers = [], {line.arm.label: {} for line in data.lines}
    for label, (kind, steps_of, statistic) in kinds.items():
        cells = [label]
        for line in data.lines:
            numbers[line.arm.label][kind] = one = estimate([steps_of(run) for run in line.runs], statistic)
            paper = published.SPEARMAN.get(kind, {}).get(line.arm.recipe)
            beside = f" (paper {paper})" if paper and data.experiment.scale == published.SCALE else ""
            cells.append(interval(one) + beside)
        rows.append(cells)
    notes = (
        "Spearman's ρ, ties averaged [95 % bootstrap interval over seeds and steps; the steps of a run depend on each "
        f"other, so it is rather too narrow]. Skipped steps are left out. {data.seeds}."
    )
    table = markdown(data.experiment.title, ["m_F against the measured KL", *numbers], rows, notes)
    return Result(heading(data) | {"arms": numbers}, table=table)


def efficiency(data: Data) -> Result:
    """Table the cost of reaching conservative GRPO's final accuracy; a FigureError if it is not among the arms."""
    reference = next((line for line in data.lines if line.arm.recipe == "grpo_conservative"), None)
    if reference is None:
        raise FigureError("the target is the final accuracy of grpo_conservative, which is not among the arms")
    base = base_of(data)
    target = float(np.mean([outcomes.last_accuracy(run.rewards) for run in reference.runs]))
    rows, numbers = [], {}
    labels = [line.arm.label for line in data.lines]
    for line in data.lines:
        label = line.arm.label
        label = ", ".join((label, *line.arm.overrides)) if labels.count(label) > 1 else label
        ended = outcome(line, base)
        costs = {column: cost(line, target, column) for column in ("completions", "accepted_tokens", "step")}
        numbers[label] = ended | {"costs": costs}
        n, cells = ended["n"], [interval(one, ",.0f") for one in costs.values()]
        ends = [spread(ended[name]) for name in ("best", "last", "test")]
        counts = [f"{count}/{n}" for count in (costs["step"]["reached"], ended["collapsed"], ended["fell"])]
        rows.append([label, counts[0], *cells, *ends, *counts[1:]])
    header = ["arm", "reached", "completions", "accepted tokens", "steps"]
    header += ["best", "last", "last TEST", "collapsed", "fell"]
    notes = (
        f"To {target:.3f}, the mean last accuracy of {reference.arm.label} (in-training, windows of {outcomes.WINDOW} "
        "steps; taken as given): median over seeds [95 % bootstrap interval over seeds]. Best, last, TEST: mean ± "
        f"standard error. {RULES} The base accuracy is {base:.3f}. {data.seeds}."
    )
    table = markdown(data.experiment.title, header, rows, notes)
    return Result(heading(data) | {"target": target, "base": base, "arms": numbers}, table=table)


def transfer(scales: Sequence[Data]) -> Result:
    """Table the last accuracy of each arm of one experiment at several scales, and how many seeds stayed usable."""
    numbers, labels = {}, {}
    for data in scales:
        base = base_of(data)
        for line in data.lines:
            label = (line.arm.label, *line.arm.overrides)
            labels[label] = None
            acted = {"base": base, "acted_on": float(np.mean([acted_on(run) for run in line.runs]))}
            numbers.setdefault(data.experiment.scale, {})[label] = outcome(line, base) | acted
    rows = [["base policy", "", *(number(next(iter(arms.values()))["base"]) for arms in numbers.values())]]
    for label in labels:
        cells = [label[0], ", ".join(label[1:])]
        for arms in numbers.values():
            one = arms.get(label)
            text = f"{spread(one['last'])} ({one['usable']}/{one['n']})" if one else "–"
            text += f", {one['acted_on']:.1%}" if one and one["acted_on"] else ""
            rivals = [np.mean(other["last"]) for name, other in arms.items() if name[0] == label[0]]
            best = one and len(rivals) > 1 and np.mean(one["last"]) == max(rivals)
            cells.append(f"**{text}**" if best else text)
        rows.append(cells)
    title = scales[0].experiment.title
    seeds = "; ".join(f"{data.experiment.scale}: {data.seeds}" for data in scales)
    notes = (
        f"Last in-training accuracy, mean ± standard error over seeds (usable seeds / n), share of tokens rejected or "
        f"scaled where there are any; bold: the best of an arm's settings. {RULES} {seeds}."
    )
    plain = {scale: {", ".join(label): one for label, one in arms.items()} for scale, arms in numbers.items()}
    table = markdown(title, ["arm", "settings", *numbers], rows, notes)
    return Result({"name": scales[0].experiment.name, "title": title, "scales": plain}, table=table)


def tuning(data: Data) -> Result:
    """Table what each method's settings are chosen by: the mean reward of the second half of the runs."""
    numbers, rows = {}, []
    shared = set.intersection(*(set(line.arm.overrides) for line in data.lines))
    for line in data.lines:
        name = ", ".join(item for item in line.arm.overrides if item not in shared)
        halves = [run.rewards[int(len(run.rewards) * TUNING_HALF) :] for run in line.runs]
        one = {"reward": [float(np.mean(half)) for half in halves], "acted_on": [acted_on(run) for run in line.runs]}
        numbers.setdefault(line.arm.label, {})[name] = one
    for label, settings in numbers.items():
        best = max(float(np.mean(one["reward"])) for one in settings.values())
        for name, one in settings.items():
            reward, mark = float(np.mean(one["reward"])), "**" if np.mean(one["reward"]) == best else ""
            each = ", ".join(f"{value:.3f}" for value in one["reward"])
            rows.append([label, name, f"{mark}{reward:.3f}{mark}", each, f"{np.mean(one['acted_on']):.2%}"])
    header = ["method", "settings", "reward", "each seed", "tokens rejected or scaled"]
    common = f"All runs have {', '.join(sorted(shared))}. " if shared else ""
    notes = f"Mean reward of the second half of the steps; the best of each method in bold. {common}{data.seeds}."
    table = markdown(data.experiment.title, header, rows, notes)
    return Result(heading(data) | {"methods": numbers}, table=table)
