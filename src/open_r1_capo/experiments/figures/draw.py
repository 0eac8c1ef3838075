"""Draw the paper's figures and tables, and ours, from the metrics of an experiment's runs alone.

python -m open_r1_capo.experiments.figures.draw --name fig2 --scale lab            # one
python -m open_r1_capo.experiments.figures.draw                                    # all whose runs there are
python -m open_r1_capo.experiments.figures.draw outputs/*/lab/seed*                # any runs against each other
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import curves, published, tables
from open_r1_capo.experiments.figures import own as ours
from open_r1_capo.experiments.figures.curves import TEST, Data, FigureError, Line
from open_r1_capo.experiments.figures.drawing import Panel, Result, draw, save
from open_r1_capo.experiments.figures.overview import against_each_other, has_steps
from open_r1_capo.experiments.spec import ExperimentError

ACCURACY = Panel("reward", "in-training accuracy", published=published.MATH)
ON_TEST = Panel(TEST, "TEST accuracy (mean of eight)", published=published.TEST)


def fig1(data: Data, smooth: float) -> Result:
    """Figure 1: in-training accuracy of the methods."""
    return draw(data, [ACCURACY], 1, smooth)


def fig2(data: Data, smooth: float) -> Result:
    """Figure 2: in-training accuracy and TEST."""
    return draw(data, with_test(data, [ACCURACY, ON_TEST]), 2, smooth)


def fig3(data: Data, smooth: float) -> Result:
    """Figure 3: the shifts of tokens and of the batch."""
    columns = {"mean": "token, mean", "p99": "token, 99th percentile", "batch": "batch"}
    panels = []
    for kind, symbol, scale in (
        ("policy", "policy shift $m_F$", "log"),
        ("objective", "objective shift $m_H$", "symlog"),
    ):
        keys = [f"capo/batch_{kind}_shift" if c == "batch" else f"capo/{kind}_shift/{c}" for c in columns]
        panels += [Panel(k, f"{symbol}: {t}", scale=scale) for k, t in zip(keys, columns.values(), strict=True)]
    return draw(data, panels, 3, smooth)


def fig4(data: Data, smooth: float) -> Result:
    """Figure 4: Dr.GRPO and REINFORCE with and without the selection."""
    families = {"Dr.GRPO": "dr", "REINFORCE": "rein"}
    panels = [
        Panel(panel.key, f"{name}: {panel.title}", shows=lambda line, start=start: line.arm.recipe.startswith(start))
        for panel in with_test(data, [ACCURACY, ON_TEST])
        for name, start in families.items()
    ]
    return draw(data, panels, 2, smooth)


def fig5(data: Data, smooth: float) -> Result:
    """Figure 5: the share of tokens rejected."""
    panel = Panel("capo/rejected_frac", "tokens rejected", scale="percent", published=published.REJECTED)
    return draw(data, [panel], 1, smooth)


def fig6(data: Data, smooth: float) -> Result:
    """Figure 6: the optimizer modelled as SGD or as Adam, a panel for each method."""
    names = {line.arm.recipe: line.arm.label.split(" (")[0].split(",")[0] for line in reversed(data.lines)}
    recipes = list(dict.fromkeys(line.arm.recipe for line in data.lines))
    panels = [
        Panel("reward", f"{names[r]}: in-training accuracy", shows=lambda line, r=r: line.arm.recipe == r)
        for r in recipes
    ]
    return draw(data, panels, min(3, len(panels)), smooth)


def fig7(data: Data, smooth: float) -> Result:
    """Figure 7: PPO clipping, a panel for each number of iterations; an arm that sets none is in all."""
    numbers = sorted({line.setting("num_iterations") for line in data.lines} - {None})
    panels = [
        Panel("reward", f"in-training accuracy, {n:g} iterations a batch", shows=lambda line, n=n: belongs(line, n))
        for n in numbers
    ]
    return draw(data, panels or [ACCURACY], len(panels) or 1, smooth)


def fig8(data: Data, smooth: float) -> Result:
    """Figure 8: the KL regulariser, and the gradient norm before clipping."""
    panels = [ACCURACY, Panel("grad_norm", "gradient norm before clipping", scale="log", smooth=False)]
    return draw(data, panels, 2, smooth)


def fig9(data: Data, smooth: float) -> Result:
    """Figure 9: the measured KL of each step."""
    panel = Panel("capo/measured_kl", "measured KL of a step (nats)", scale="log", smooth=False)
    return draw(data, [panel], 1, smooth)


def fig10(data: Data, smooth: float) -> Result:
    """Figure 10: accuracy against the tokens that were learnt from."""
    panels = [Panel(p.key, p.title, x="accepted_tokens") for p in with_test(data, [ACCURACY, ON_TEST])]
    return draw(data, panels, len(panels), smooth)


def belongs(line: Line, iterations: float) -> bool:
    """Whether an arm has this num_iterations, or sets none."""
    return line.setting("num_iterations") in (None, iterations)


def with_test(data: Data, panels: list[Panel]) -> list[Panel]:
    """Take TEST's panel only if it was measured, with a warning about the runs where it was not."""
    without = [run.folder for line in data.lines for run in line.runs if not run.tests]
    if without:
        data.warnings.append(
            f"{len(without)} runs have no TEST (the first: {without[0]}); make eval RUN=… measures it"
        )
    return [
        panel for panel in panels if panel.key != TEST or any(run.tests for line in data.lines for run in line.runs)
    ]


@dataclass(frozen=True)
class Entry:
    """A figure or table; its runs are those of the experiment of its name.

    Attributes:
        make: draws it from its data and the weight of the moving average.
        keys: the metrics it reads, beside those of every figure.
        scales: whether it shows every scale that has runs, side by side.
    """

    make: Callable[..., Result]
    keys: tuple[str, ...] = ()
    scales: bool = False


SHIFTS = tuple(
    key
    for kind in ("policy", "objective")
    for key in (f"capo/{kind}_shift/mean", f"capo/{kind}_shift/p99", f"capo/batch_{kind}_shift")
)
TABLE5 = ("capo/kl_spearman", "capo/policy_shift/mean", "capo/batch_policy_shift", "capo/measured_kl")
FIGURES = {
    "fig1": Entry(fig1),
    "fig2": Entry(fig2, (TEST,)),
    "fig3": Entry(fig3, SHIFTS),
    "fig4": Entry(fig4, (TEST,)),
    "fig5": Entry(fig5, ("capo/rejected_frac",)),
    "fig6": Entry(fig6),
    "fig7": Entry(fig7),
    "fig8": Entry(fig8, ("grad_norm",)),
    "fig9": Entry(fig9, ("capo/measured_kl",)),
    "fig10": Entry(fig10, (TEST,)),
    "table1": Entry(tables.table1, tuple(tables.SECONDS)),
    "table5": Entry(tables.table5, (*TABLE5, *tables.SCALE_KEYS)),
    "stability": Entry(ours.stability, ("capo/measured_kl",)),
    "stability_grid": Entry(ours.stability, ("capo/measured_kl",)),
    "stability_cost": Entry(tables.efficiency),
    "calibration": Entry(ours.calibration, (*tables.CALIBRATION_KEYS, *tables.SCALE_KEYS)),
    "tuning_methods": Entry(tables.tuning, tables.ACTS),
    "tuning_rivals": Entry(tables.tuning, tables.ACTS),
    "tuning_mask": Entry(tables.tuning, tables.ACTS),
    "tuning_sgd": Entry(tables.tuning, tables.ACTS),
    "efficiency": Entry(tables.efficiency, (TEST,)),
    "transfer": Entry(tables.transfer, tables.ACTS, scales=True),
    "transfer_batch": Entry(tables.transfer, tables.ACTS, scales=True),
    "variants": Entry(tables.transfer, tables.ACTS, scales=True),
    "warmup": Entry(ours.stability, ("capo/measured_kl",)),
    "sgd": Entry(ours.stability, ("capo/measured_kl",)),
    "step_sizes": Entry(ours.step_sizes, ("grad_norm", "capo/measured_kl")),
    "step_sizes_sgd": Entry(ours.step_sizes, ("grad_norm", "capo/measured_kl")),
}


def make(name: str, options: argparse.Namespace) -> list[Path]:
    """Make one figure or table.

    Args:
        name: of FIGURES.
        options: the command line.

    Returns:
        The files written.

    Raises:
        FigureError: its runs are missing, broken or of different settings.
        ExperimentError: there is no such experiment.
    """
    entry = FIGURES[name]
    if entry.scales:
        data = curves.load_scales(name, options.seeds, entry.keys)
    else:
        data = curves.load(name, experiments.load(name, options.scale, options.seeds), entry.keys)
    result = entry.make(data, options.smooth)
    for one in data if isinstance(data, list) else [data]:
        curves.warn(name, one.warnings)
    return save(result, name if entry.scales or options.scale == "lab" else f"{name}_{options.scale}", options.out)


def drawable(options: argparse.Namespace) -> list[str]:
    """List the figures that have any run at the scale, and say which have none."""
    names, empty = [], []
    for name in FIGURES.keys() & set(experiments.known_experiments()):
        one = experiments.load(name, options.scale)
        there = curves.scales_with_runs(name, None) if FIGURES[name].scales else curves.has_runs(one)
        (names if there else empty).append(name)
    names, empty = (sorted(part, key=list(FIGURES).index) for part in (names, empty))
    if empty:
        command = f"make experiment NAME={empty[0]} SCALE={options.scale}"
        print(f"without runs at the scale {options.scale}: {', '.join(empty)} ({command} …)", file=sys.stderr)
    return names


def smoothing(text: str) -> float:
    """Read --smooth: a weight in [0, 1), or off.

    Args:
        text: from the command line.

    Returns:
        The weight; 0 for off.

    Raises:
        ArgumentTypeError: neither.
    """
    try:
        value = 0.0 if text == "off" else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a weight in [0, 1) nor off")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with 2 and a sentence where it is wrong."""
    parser = argparse.ArgumentParser(prog="figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", choices=FIGURES, metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--scale", default="lab")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    parser.add_argument("--smooth", type=smoothing, default=0.9, help="weight of the moving average, or off")
    parser.add_argument("--out", type=Path, default=Path("outputs/figures"))
    parser.add_argument("--all", action="store_true", help="every figure that has runs, beside the runs named")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, drawn against each other")
    options = parser.parse_args(argv)
    if options.name and options.runs:
        parser.error(f"the runs of {options.name} are its experiment's: give NAME or RUNS, not both")
    return options


def main(argv: list[str] | None = None) -> int:
    """Make what the command line names; a figure that is refused does not stop the others.

    Args:
        argv: arguments; None takes the process's.

    Returns:
        0, or 2 if a figure was refused or there is nothing to draw (a sentence says why).
    """
    options, refused = parse(argv), 0
    runs, out = options.runs, options.out
    if options.all:  # those that have come so far
        runs = [folder for folder in runs if has_steps(folder)]
        waiting = (folder for folder in options.runs if folder not in runs)
        curves.warn("runs", (f"{folder} has no step yet and is left out" for folder in waiting))
    try:
        names = [options.name] if options.name else drawable(options) if options.all or not runs else []
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    jobs = {"runs": partial(against_each_other, runs, options.smooth, out)} if runs else {}
    for name, job in (jobs | {name: partial(make, name, options) for name in names}).items():
        try:
            print(f"{name}: {'  '.join(map(str, job()))}")
        except (FigureError, ExperimentError) as error:
            print(f"error: {name} is not drawn: {error}", file=sys.stderr)
            refused += 1
        except OSError as error:
            print(f"error: {error.filename or out} cannot be read or written ({error.strerror})", file=sys.stderr)
            return 2
    if not names and not runs:
        print("error: there is no run to draw yet; make train or make experiment makes one", file=sys.stderr)
    return 2 if refused or not (names or runs) else 0


if __name__ == "__main__":
    sys.exit(main())
