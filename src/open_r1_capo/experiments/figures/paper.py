"""The paper's Figures 1 to 10, as the panels that `drawing.draw` draws; its tables are in `tables.py`.

Each function gives the panels, row by row, and how many stand in a row.
"""

from __future__ import annotations

from open_r1_capo.experiments.figures import published
from open_r1_capo.experiments.figures.curves import FAMILIES, TEST, Data
from open_r1_capo.experiments.figures.drawing import Panel

Layout = tuple[list[Panel], int]
ACCURACY = Panel("reward", "in-training accuracy", published=published.MATH)
ON_TEST = Panel(TEST, "TEST accuracy (mean of eight)", published=published.TEST)
SHIFTS = {  # column of Figure 3 → its panel's title
    "capo/policy_shift/mean": "policy shift $m_F$: token, mean",
    "capo/policy_shift/p99": "policy shift $m_F$: token, 99th percentile",
    "capo/batch_policy_shift": "policy shift $m_F$: batch",
    "capo/objective_shift/mean": "objective shift $m_H$: token, mean",
    "capo/objective_shift/p99": "objective shift $m_H$: token, 99th percentile",
    "capo/batch_objective_shift": "objective shift $m_H$: batch",
}


def fig1(data: Data) -> Layout:
    """In-training accuracy of the methods."""
    return [ACCURACY], 1


def fig2(data: Data) -> Layout:
    """In-training accuracy and TEST."""
    return with_test(data), 2


def fig3(data: Data) -> Layout:
    """The shifts of tokens and of the batch; m_H may be negative."""
    return [Panel(key, title, scale="log" if "$m_F$" in title else "symlog") for key, title in SHIFTS.items()], 3


def fig4(data: Data) -> Layout:
    """Dr.GRPO and REINFORCE with and without the selection."""
    panels = [
        Panel(panel.key, f"{name}: {panel.title}", shows=lambda line, name=name: line.family == name)
        for panel in with_test(data)
        for name in (FAMILIES["dr"], FAMILIES["rein"])
    ]
    return panels, 2


def fig5(data: Data) -> Layout:
    """The share of tokens rejected."""
    return [Panel("capo/rejected_frac", "tokens rejected", scale="percent", published=published.REJECTED)], 1


def fig6(data: Data) -> Layout:
    """The optimizer modelled as SGD or as Adam, a panel for each method."""
    names = {line.arm.recipe: line.arm.label.split(" (")[0].split(",")[0] for line in reversed(data.lines)}
    panels = [
        Panel("reward", f"{names[r]}: in-training accuracy", shows=lambda line, r=r: line.arm.recipe == r)
        for r in dict.fromkeys(line.arm.recipe for line in data.lines)
    ]
    return panels, min(3, len(panels))


def fig7(data: Data) -> Layout:
    """PPO clipping, a panel for each number of iterations; an arm that sets none is in all."""
    panels = [
        Panel(
            "reward",
            f"in-training accuracy, {n:g} iterations a batch",
            shows=lambda line, n=n: line.arm.value("num_iterations") in (None, n),
        )
        for n in sorted({line.arm.value("num_iterations") for line in data.lines} - {None})
    ]
    return panels or [ACCURACY], len(panels) or 1


def fig8(data: Data) -> Layout:
    """The KL regulariser, and the gradient norm before clipping."""
    return [ACCURACY, Panel("grad_norm", "gradient norm before clipping", scale="log", smooth=False)], 2


def fig9(data: Data) -> Layout:
    """The measured KL of each step."""
    return [Panel("capo/measured_kl", "measured KL of a step (nats)", scale="log", smooth=False)], 1


def fig10(data: Data) -> Layout:
    """Accuracy against the number of tokens that were learned from."""
    panels = [Panel(panel.key, panel.title, x="accepted_tokens") for panel in with_test(data)]
    return panels, len(panels)


def with_test(data: Data) -> list[Panel]:
    """Accuracy, and TEST if any run measured it; a warning names those that did not."""
    without = [run.folder for run in data.runs if not run.tests]
    if without:
        data.warnings.append(
            f"{len(without)} runs have no TEST (the first: {without[0]}); make eval RUN=… measures it"
        )
    return [ACCURACY, ON_TEST] if len(without) < len(data.runs) else [ACCURACY]
