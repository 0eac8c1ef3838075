"""Draw the paper's figures and tables, and ours, from the metrics of an experiment's runs.

python -m open_r1_capo.experiments.figures --name fig2 --scale lab    # one
python -m open_r1_capo.experiments.figures                            # all that have runs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import budgets, calibration, curves, equal, paper, stability, tables
from open_r1_capo.experiments.figures.curves import TEST, Data
from open_r1_capo.experiments.figures.drawing import Result, draw, save
from open_r1_capo.runs.exit import BAD_INPUT, UserError, run_cli

DEFAULT_SCALE = "lab"  # whose files bear the figure's name alone


@dataclass(frozen=True)
class Entry:
    """A figure or table; its runs are those of the experiment of its name."""

    make: Callable[[Any], Result] | None = None  # from its data; None if it is drawn from panels
    keys: tuple[str, ...] = ()  # metrics that it reads, beside those of every figure
    panels: Callable[[Data], paper.Layout] | None = None
    scales: bool = False  # shows every scale that has runs, side by side: `make` gets a list of data
    also: tuple[str, ...] = ()  # further experiments whose runs it shows, if there are any
    partial: bool = False  # an arm may be without runs

    def result(self, data: Data | list[Data], smooth: float) -> Result:
        """Make it; `smooth` is the weight of the curves' moving average, 0 for none."""
        return draw(data, *self.panels(data), smooth) if self.panels else self.make(data)


STABILITY = Entry(stability.stability, ("capo/measured_kl",))
STEP_SIZES = Entry(stability.step_sizes, ("grad_norm", "capo/measured_kl"))
TUNING = Entry(tables.tuning, tables.ACTS)
BUDGETS = Entry(budgets.budgets, budgets.KEYS)
TRANSFER = Entry(tables.transfer, tables.ACTS, scales=True)
EQUAL = Entry(equal.equal_tuning, equal.KEYS, scales=True, also=("equal_tuning_batch",), partial=True)
FIGURES = {
    "fig1": Entry(panels=paper.fig1),
    "fig2": Entry(panels=paper.fig2, keys=(TEST,)),
    "fig3": Entry(panels=paper.fig3, keys=tuple(paper.SHIFTS)),
    "fig4": Entry(panels=paper.fig4, keys=(TEST,)),
    "fig5": Entry(panels=paper.fig5, keys=("capo/rejected_frac",)),
    "fig6": Entry(panels=paper.fig6),
    "fig7": Entry(panels=paper.fig7),
    "fig8": Entry(panels=paper.fig8, keys=("grad_norm",)),
    "fig9": Entry(panels=paper.fig9, keys=("capo/measured_kl",)),
    "fig10": Entry(panels=paper.fig10, keys=(TEST,)),
    "table1": Entry(tables.table1, tuple(tables.SECONDS)),
    "table5": Entry(tables.table5, (*tables.TABLE5_KEYS, *tables.TAKEN_KEYS)),
    "stability": STABILITY,
    "stability_grid": STABILITY,
    "stability_cost": Entry(tables.efficiency),
    "calibration": Entry(calibration.calibration, (*calibration.KEYS, *tables.TAKEN_KEYS)),
    "tuning_methods": TUNING,
    "tuning_rivals": TUNING,
    "tuning_mask": TUNING,
    "tuning_sgd": TUNING,
    "tuning_budget": BUDGETS,
    "no_rate": BUDGETS,
    "long": Entry(panels=budgets.long_runs, keys=("capo/measured_kl",)),
    "guarantee": Entry(budgets.guarantee, budgets.GUARANTEE_KEYS),
    "first_guess": Entry(budgets.first_guesses, budgets.GUESS_KEYS),
    "equal_tuning": EQUAL,
    "tuning_rates": TUNING,
    "efficiency": Entry(tables.efficiency, (TEST,)),
    "transfer": TRANSFER,
    "transfer_batch": TRANSFER,
    "variants": TRANSFER,
    "warmup": STABILITY,
    "sgd": STABILITY,
    "step_sizes": STEP_SIZES,
    "step_sizes_sgd": STEP_SIZES,
}


def make(name: str, options: argparse.Namespace) -> list[Path]:
    """Make one of FIGURES and return the files written.

    Raises:
        UserError: its runs are missing, broken or of different settings, or a file cannot be written.
    """
    entry = FIGURES[name]
    if entry.scales:
        names = [name, *(other for other in entry.also if curves.scales_with_runs(other, options.seeds))]
        data = [one for each in names for one in curves.load_scales(each, options.seeds, entry.keys, entry.partial)]
    else:
        data = curves.load(experiments.load(name, options.scale, options.seeds), entry.keys)
    result = entry.result(data, options.smooth)
    for one in data if entry.scales else [data]:
        for sentence in dict.fromkeys(one.warnings):
            print(f"warning: {name}: {sentence}", file=sys.stderr)
    try:
        plain = entry.scales or options.scale == DEFAULT_SCALE
        return save(result, name if plain else f"{name}_{options.scale}", options.out)
    except OSError as error:
        raise UserError(f"{error.filename or options.out} cannot be written ({error.strerror})") from None


def drawable(scale: str) -> list[str]:
    """List the figures that have runs at the scale, and print which have none."""
    known, names, empty = experiments.known_experiments(), [], []
    for name in (name for name in FIGURES if name in known):
        one = experiments.load(name, scale)
        there = curves.scales_with_runs(name, None) if FIGURES[name].scales else curves.has_runs(one)
        (names if there else empty).append(name)
    if empty:
        command = f"make experiment NAME={empty[0]} SCALE={scale}"
        print(f"without runs at the scale {scale}: {', '.join(empty)} ({command} …)", file=sys.stderr)
    return names


def smoothing(text: str) -> float:
    """Read --smooth: a weight in [0, 1), or off, which is 0; an ArgumentTypeError if it is neither."""
    try:
        value = 0.0 if text == "off" else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a weight in [0, 1) nor off")
    return value


def work(options: argparse.Namespace) -> int:
    """Make what the command line names; a figure that is refused does not stop the others."""
    names, refused = [options.name] if options.name else drawable(options.scale), 0
    for name in names:
        try:
            print(f"{name}: {'  '.join(map(str, make(name, options)))}")
        except UserError as error:
            print(f"error: {name} is not drawn: {error}", file=sys.stderr)
            refused += 1
    if not names:
        raise UserError("there is no run to draw yet: make experiment NAME=… makes one, make compare draws any others")
    return BAD_INPUT if refused else 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and draw; the exit code is 2 if a figure was refused or there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="make figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", choices=FIGURES, metavar="NAME", help=f"one of {', '.join(FIGURES)}; by default all")
    parser.add_argument("--scale", default=DEFAULT_SCALE)
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    parser.add_argument("--smooth", type=smoothing, default=0.9, help="weight of the moving average, or off")
    parser.add_argument("--out", type=Path, default=Path("outputs/figures"))
    options = parser.parse_args(argv)
    return run_cli(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
