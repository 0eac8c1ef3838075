"""The tables of the paper and ours, as Markdown and as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from open_r1_capo.experiments.figures import published, stats
from open_r1_capo.experiments.figures.curves import TEST, Data, FigureError, Line, Run
from open_r1_capo.experiments.figures.drawing import Result, heading
from open_r1_capo.runs import outcomes

SECONDS = {  # the rows of Table 1, as far as TRL's step can be told apart
    "time/generate": "generation",
    "time/reward": "reward",
    "time/curvature": "CAPO: shifts, selection, moments",
    "time/measure": "measuring the true KL",
    "time/train": "forward and backward passes, optimizer",
    "time/total": "total",
}
# what predicts, what is measured, and the exponent of capo/step_scale that turns α's prediction into the taken step's
PAIRS = {
    "m_F → KL": ("capo/batch_policy_shift", "capo/measured_kl", 2),
    "m_F → KL of the last layer alone": ("capo/batch_policy_shift", "capo/measured_kl_head", 2),
    "m_H → change of the objective": ("capo/batch_objective_shift", "capo/measured_objective", 1),
}
CALIBRATION_KEYS = (*dict.fromkeys(key for a, b, _ in PAIRS.values() for key in (a, b)),)
SCALE_KEYS = ("capo/step_scale", "capo/skipped_step")


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> str:
    """Lay a table out.

    Args:
        title: above it.
        header: of the columns.
        rows: cells.
        notes: below it; how every figure in it was made.

    Returns:
        Markdown.
    """
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), "", notes, ""])


def number(value: float, form: str = ".3f") -> str:
    """Write a number; – for one that is not known, and words for a target that is not reached."""
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


def pairs(run: Run, predicted: str, measured: str, exponent: int) -> np.ndarray:
    """Take a step's prediction and measurement, for the step that was taken.

    The metrics predict the scheduled rate's step; a planned one was shorter by s = capo/step_scale: m_F is quadratic
    in it, m_H linear to first order. Skipped steps moved nothing and are left out.

    Args:
        run: with both columns and SCALE_KEYS.
        predicted: a column.
        measured: a column.
        exponent: of s.

    Returns:
        (T', 2), without NaN.
    """
    scale = np.nan_to_num(run.columns["capo/step_scale"], nan=1.0)
    both = np.stack([run.columns[predicted] * scale**exponent, run.columns[measured]], axis=1)
    return both[np.isfinite(both).all(1) & (np.nan_to_num(run.columns["capo/skipped_step"]) == 0)]


def pooled(statistic: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Sequence[np.ndarray]], float]:
    """Turn a statistic of two columns into one of the pooled steps of several seeds."""
    return lambda seeds: statistic(*np.concatenate(list(seeds)).T)


def mean_seconds(run: Run, key: str) -> float:
    """Mean of a time/ metric over the steps after the first, which warms caches up; NaN if it was not logged."""
    values = run.series(key)[1][1:]
    return float(values.mean()) if len(values) else float("nan")


def table1(data: Data, smooth: float = 0.0) -> Result:
    """Table 1: where the seconds of a step go.

    Args:
        data: runs with the time/ metrics.
        smooth: not used.

    Returns:
        Mean seconds a step and share of the total, by arm.
    """
    rows, numbers = [], {line.arm.label: {} for line in data.lines}
    paper = published.SECONDS if data.experiment.scale == published.SCALE else {}
    for key, label in SECONDS.items():
        cells = [label]
        for line in data.lines:
            seconds, total = ([mean_seconds(run, name) for run in line.runs] for name in (key, "time/total"))
            mean = float(np.mean(seconds))
            share = mean / float(np.mean(total))
            numbers[line.arm.label][key] = {"seconds": mean, "share": share}
            cells.append("–" if math.isnan(share) else f"{spread(seconds)} ({share:.1%})")
        if paper:
            cells.append(f"{paper[key]:.2f} ({paper[key] / paper['time/total']:.1%})" if key in paper else "–")
        rows.append(cells)
    header = ["seconds a step", *numbers, *(["paper"] if paper else [])]
    notes = f"Mean seconds a step without the first, ± standard error over seeds; share of the total. {data.seeds}."
    return Result(heading(data) | {"arms": numbers}, table=markdown(data.experiment.title, header, rows, notes))


def estimate(
    seeds: Sequence[np.ndarray], statistic: Callable[[Sequence[np.ndarray]], float], draws: int = stats.DRAWS
) -> dict[str, float]:
    """A statistic of seeds' steps with its 95 % bootstrap interval over seeds and steps."""
    seeds = [rows for rows in seeds if len(rows)]
    if not seeds:
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    low, high = stats.bootstrap(seeds, statistic, steps=True, draws=draws)
    return {"value": statistic(seeds), "low": low, "high": high}


def interval(found: dict[str, float], form: str = ".3f") -> str:
    """Write an estimate as value [low, high]."""
    ends = (
        ""
        if math.isnan(found["low"]) or math.isinf(found["low"])
        else f" [{number(found['low'], form)}, {number(found['high'], form)}]"
    )
    return number(found["value"], form) + ends


def table5(data: Data, smooth: float = 0.0) -> Result:
    """Table 5: Spearman's ρ of m_F with the measured KL, by token and by batch.

    Args:
        data: runs with measured_kl.
        smooth: not used.

    Returns:
        ρ with its interval, by arm.
    """
    rho = pooled(stats.spearman)
    batch, mean_token = (("capo/batch_policy_shift", 2), ("capo/policy_shift/mean", 0))
    kinds = {
        "token: in a step, mean over steps": ("token", lambda run: run.series("capo/kl_spearman")[1][:, None], mean),
        "token: mean m_F of a step's tokens, over steps": (
            "step", lambda run: pairs(run, mean_token[0], "capo/measured_kl", mean_token[1]), rho),
        "batch: over steps": ("batch", lambda run: pairs(run, batch[0], "capo/measured_kl", batch[1]), rho),
    }  # fmt: skip
    rows, numbers = [], {line.arm.label: {} for line in data.lines}
    for label, (kind, oneof, statistic) in kinds.items():
        cells = [label]
        for line in data.lines:
            found = estimate([oneof(run) for run in line.runs], statistic)
            numbers[line.arm.label][kind] = found
            paper = published.SPEARMAN.get(kind, {}).get(line.arm.recipe)
            beside = f" (paper {paper})" if paper and data.experiment.scale == published.SCALE else ""
            cells.append(interval(found) + beside)
        rows.append(cells)
    notes = (
        "Spearman's ρ, ties averaged [95 % bootstrap interval over seeds and steps; the steps of a run depend on each "
        f"other, so it is rather too narrow]. Skipped steps are left out. {data.seeds}."
    )
    table = markdown(data.experiment.title, ["m_F against the measured KL", *numbers], rows, notes)
    return Result(heading(data) | {"arms": numbers}, table=table)


def mean(seeds: Sequence[np.ndarray]) -> float:
    """Mean over the steps of several seeds."""
    return float(np.concatenate(list(seeds)).mean())


def outcome(line: Line, base: float) -> dict[str, Any]:
    """What became of an arm's runs.

    Args:
        line: its runs.
        base: `outcomes.base_accuracy` of the experiment at this scale.

    Returns:
        last and best accuracy of each seed, and how many of n collapsed, fell, survived and stayed usable.
    """
    rewards = [run.rewards for run in line.runs]
    return {
        "n": len(rewards),
        "last": [outcomes.last_accuracy(one) for one in rewards],
        "best": [outcomes.best_accuracy(one) for one in rewards],
        "collapsed": sum(outcomes.collapsed(one, base) for one in rewards),
        "fell": len(rewards) - sum(map(outcomes.survived, rewards)),
        "survived": sum(map(outcomes.survived, rewards)),
        "usable": sum(outcomes.usable(one, base) for one in rewards),
        "test": [float(run.tests[-1][TEST]) for run in line.runs if run.tests],
    }


def cost(line: Line, target: float, column: str) -> dict[str, float]:
    """The median over seeds of what a target costs, with its bootstrap interval over seeds; ∞: not reached."""
    spent = [np.array([stats.cost_to(target, run.columns["reward"], run.columns[column])]) for run in line.runs]
    median = lambda seeds: float(np.quantile(np.concatenate(seeds), 0.5, method="inverted_cdf"))  # noqa: E731
    low, high = stats.bootstrap(spent, median)
    return {"value": median(spent), "low": low, "high": high, "reached": int(np.isfinite(spent).sum())}


def efficiency(data: Data, smooth: float = 0.0) -> Result:
    """Table what it costs to reach the final accuracy of conservative GRPO, and what became of the runs.

    Args:
        data: runs with one arm of the recipe grpo_conservative.
        smooth: not used.

    Returns:
        Completions, accepted tokens and steps to the target, best and last accuracy, collapsed seeds.

    Raises:
        FigureError: no arm to take the target from.
    """
    reference = next((line for line in data.lines if line.arm.recipe == "grpo_conservative"), None)
    if reference is None:
        raise FigureError("the target is the final accuracy of grpo_conservative, which is not among the arms")
    base = outcomes.base_accuracy([run.rewards for line in data.lines for run in line.runs])
    target = float(np.mean([outcomes.last_accuracy(run.rewards) for run in reference.runs]))
    rows, numbers = [], {}
    labels = [line.arm.label for line in data.lines]
    for line in data.lines:
        label = line.arm.label
        label = ", ".join((label, *line.arm.overrides)) if labels.count(label) > 1 else label
        found = outcome(line, base)
        costs = {column: cost(line, target, column) for column in ("completions", "accepted_tokens", "step")}
        reached, n = costs["step"]["reached"], found["n"]
        numbers[label] = found | {"costs": costs}
        cells = [interval(one, ",.0f") for one in costs.values()]
        ends = [spread(found["best"]), spread(found["last"]), spread(found["test"])]
        rows.append([label, f"{reached}/{n}", *cells, *ends, f"{found['collapsed']}/{n}", f"{found['fell']}/{n}"])
    header = [
        "arm",
        "reached",
        "completions",
        "accepted tokens",
        "steps",
        "best",
        "last",
        "last TEST",
        "collapsed",
        "fell",
    ]
    notes = (
        f"To {target:.3f}, the mean last accuracy of {reference.arm.label} (in-training, windows of {outcomes.WINDOW} "
        "steps; taken as given): median over seeds [95 % bootstrap interval over seeds]. Best, last, TEST: mean ± "
        f"standard error. {RULES} The base accuracy is {base:.3f}. {data.seeds}."
    )
    table = markdown(data.experiment.title, header, rows, notes)
    return Result(heading(data) | {"target": target, "base": base, "arms": numbers}, table=table)


def largest_kl(run: Run) -> float:
    """The largest measured KL of a run's steps, in nats; NaN if none was measured."""
    return float(max(run.series("capo/measured_kl")[1], default=float("nan")))


def stability(data: Data) -> tuple[dict[str, list[Line]], dict[str, Any], str]:
    """Find what each method survives on its grid of learning rates.

    Args:
        data: arms that share a label and override learning_rate.

    Returns:
        The lines of each method, in the order of their rates; the numbers by method; Markdown.

    Raises:
        FigureError: an arm without a learning rate.
    """
    base = outcomes.base_accuracy([run.rewards for line in data.lines for run in line.runs])
    methods: dict[str, list[Line]] = {}
    for line in data.lines:
        if line.setting("learning_rate") is None:
            raise FigureError(f"the arm {line.arm.label!r} sets no learning_rate, which is the horizontal axis")
        methods.setdefault(line.arm.label, []).append(line)
    numbers, rows, all_of = {}, [], len(data.experiment.seeds)
    for label, lines in methods.items():
        lines.sort(key=lambda line: line.setting("learning_rate"))
        found = {line.setting("learning_rate"): outcome(line, base) for line in lines}
        largest = {
            f"largest_{verdict}": max((rate for rate, one in found.items() if one[verdict] == all_of), default=None)
            for verdict in ("survived", "usable")
        }
        numbers[label] = {"rates": found} | largest
        numbers[label]["largest_kl"] = kl = max(largest_kl(run) for line in lines for run in line.runs)
        cells = [f"{rate:g}: {spread(one['last'])} ({one['usable']}/{one['n']})" for rate, one in found.items()]
        rates = (f"{rate:g}" if rate else "none" for rate in largest.values())
        rows.append([label, *rates, "; ".join(cells), number(kl, ".2g")])
    header = [
        "method",
        "largest rate survived",
        "largest rate usable",
        "rate: last accuracy (usable seeds / n)",
        "largest KL of a step, nats",
    ]
    notes = f"Mean ± standard error over seeds; by all of {all_of} seeds. {RULES} The base accuracy is {base:.3f}."
    return methods, {"base": base, "methods": numbers}, markdown(data.experiment.title, header, rows, notes)


def transfer(scales: Sequence[Data], smooth: float = 0.0) -> Result:
    """Table the last accuracy of each arm at each scale.

    Args:
        scales: one experiment at several scales.
        smooth: not used.

    Returns:
        Mean ± standard error, and how many seeds stayed usable, by arm and scale.
    """
    numbers, labels = {}, {}
    for data in scales:
        base = outcomes.base_accuracy([run.rewards for line in data.lines for run in line.runs])
        for line in data.lines:
            label = (line.arm.label, *line.arm.overrides)
            labels[label] = None
            acted = {"base": base, "acted_on": float(np.mean([acted_on(run) for run in line.runs]))}
            numbers.setdefault(data.experiment.scale, {})[label] = outcome(line, base) | acted
    rows = [["base policy", "", *(number(next(iter(arms.values()))["base"]) for arms in numbers.values())]]
    for label in labels:
        cells = [label[0], ", ".join(label[1:])]
        for arms in numbers.values():
            found = arms.get(label)
            text = f"{spread(found['last'])} ({found['usable']}/{found['n']})" if found else "–"
            text += f", {found['acted_on']:.1%}" if found and found["acted_on"] else ""
            rivals = [np.mean(one["last"]) for name, one in arms.items() if name[0] == label[0]]
            best = found and len(rivals) > 1 and np.mean(found["last"]) == max(rivals)
            cells.append(f"**{text}**" if best else text)
        rows.append(cells)
    title = scales[0].experiment.title
    seeds = "; ".join(f"{data.experiment.scale}: {data.seeds}" for data in scales)
    notes = (
        f"Last in-training accuracy, mean ± standard error over seeds (usable seeds / n), share of tokens rejected or "
        f"scaled where there are any; bold: the best of an arm's settings. {RULES} {seeds}."
    )
    plain = {scale: {", ".join(label): found for label, found in arms.items()} for scale, arms in numbers.items()}
    table = markdown(title, ["arm", "settings", *numbers], rows, notes)
    return Result({"name": scales[0].name, "title": title, "scales": plain}, table=table)


def acted_on(run: Run) -> float:
    """The mean share of a run's tokens that were rejected or scaled."""
    return float(sum(np.nan_to_num(run.columns[key]).mean() for key in ACTS))


TUNING_HALF = 0.5  # docs/protocol.md: the mean reward of the second half of a run decides
ACTS = ("capo/rejected_frac", "capo/scaled_frac")


def tuning(data: Data, smooth: float = 0.0) -> Result:
    """Table what the settings of each method are chosen by: the mean reward of the second half of the runs.

    Args:
        data: arms that share a label and differ in their settings.
        smooth: not used.

    Returns:
        The mean over seeds of each setting, the best of each label in bold, and the share of tokens acted on.
    """
    numbers, rows = {}, []
    shared = set.intersection(*(set(line.arm.overrides) for line in data.lines))
    for line in data.lines:
        name = ", ".join(item for item in line.arm.overrides if item not in shared)
        halves = [run.rewards[int(len(run.rewards) * TUNING_HALF) :] for run in line.runs]
        found = {"reward": [float(np.mean(half)) for half in halves], "acted_on": [acted_on(run) for run in line.runs]}
        numbers.setdefault(line.arm.label, {})[name] = found
    for label, settings in numbers.items():
        best = max(float(np.mean(found["reward"])) for found in settings.values())
        for name, found in settings.items():
            mean, mark = float(np.mean(found["reward"])), "**" if np.mean(found["reward"]) == best else ""
            each = ", ".join(f"{one:.3f}" for one in found["reward"])
            rows.append([label, name, f"{mark}{mean:.3f}{mark}", each, f"{np.mean(found['acted_on']):.2%}"])
    header = ["method", "settings", "reward", "each seed", "tokens rejected or scaled"]
    common = f"All runs have {', '.join(sorted(shared))}. " if shared else ""
    notes = f"Mean reward of the second half of the steps; the best of each method in bold. {common}{data.seeds}."
    table = markdown(data.experiment.title, header, rows, notes)
    return Result(heading(data) | {"methods": numbers}, table=table)


RULES = (
    f"Collapsed: the mean of the last {outcomes.WINDOW} steps is below the base accuracy (mean reward of the first "
    f"step over all runs) after a window at least {100 * outcomes.RISE:.0f} points above it. Fell: it is more than "
    f"{100 * outcomes.MARGIN:.0f} points below the best window. Survived: not fallen. "
    "Usable: survived, and not below the base accuracy."
)
