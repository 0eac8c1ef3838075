"""Check every inequality of the paper's theorem (Theorem 5.1, App. E and K) on random exact problems.

python -m open_r1_capo.experiments.theorem --instances 2000 --seed 0 --out docs/figures    # or make theorem

Writes theorem.json, theorem.md, theorem.png and theorem.svg into OUT; docs/theorem.md explains them. Exit codes: 0
done, whatever was found; 2 the input cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from open_r1_capo.experiments.figures.drawing import Result, save
from open_r1_capo.experiments.theorem import figure, measure, report
from open_r1_capo.experiments.theorem.families import FAMILIES
from open_r1_capo.runs.exit import UserError, positive, run_cli


def work(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before the minutes of work
    except OSError as error:
        raise UserError(f"{options.out} cannot be made a folder ({error.strerror}): name another with --out") from None
    found = measure.run(FAMILIES, options.instances, options.seed)
    content = report.numbers(found, FAMILIES, options.seed)
    text = report.markdown(content)
    print(text)
    try:
        paths = save(Result(content, figure.draw(found, content), text), "theorem", options.out)
    except OSError as error:
        raise UserError(f"{error.filename or options.out} cannot be written ({error.strerror})") from None
    print("  ".join(map(str, paths)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and check."""
    parser = argparse.ArgumentParser(prog="make theorem", description=__doc__.split("\n\n")[0])
    parser.add_argument("--instances", type=positive, default=2000, help="random problems, over all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/figures"))
    options = parser.parse_args(argv)
    return run_cli(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
