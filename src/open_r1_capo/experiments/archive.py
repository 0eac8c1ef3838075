"""Write what every finished run of the experiments ended with into one small file, kept beside the figures.

    .venv/bin/python -m open_r1_capo.experiments.archive docs/figures/experiments.json

One entry for each run, by its folder under `outputs/experiments`: commit, reward of every step, largest measured KL.
Runs that the file has and this machine has not are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from open_r1_capo.experiments.spec import OUTPUTS
from open_r1_capo.runs.exit import UserError, run_cli
from open_r1_capo.runs.run import Run, write_atomically
from open_r1_capo.runs.summary import finite


def entry(run: Run) -> dict[str, Any]:
    """Commit, reward of each step on fresh completions, and largest KL in nats (None: not measured) of a run."""
    kls = [kl for row in run.metrics() if (kl := finite(row.get("capo/measured_kl"))) is not None]
    return {
        "commit": run.environment.get("commit") or "unknown",
        "reward": [round(reward, 3) for reward in run.rewards()],
        "largest_kl": float(f"{max(kls):.3g}") if kls else None,
    }


def write(path: Path) -> None:
    """Write the file; a UserError if there is no finished run or a file cannot be read or written."""
    runs = [Run(file.parent) for file in sorted(OUTPUTS.glob("*/*/seed*/summary.json"))]
    runs = [run for run in runs if run.summary is not None]
    if not runs:
        raise UserError(f"there are no finished runs in {OUTPUTS}: make experiment makes some")
    try:
        kept = json.loads(path.read_text()) if path.is_file() else {}
        entries = kept | {str(run.path.relative_to(OUTPUTS)): entry(run) for run in runs}
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(entries.items())]
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is no archive of runs: name another file, or delete it") from None


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    options = parser.parse_args(argv)
    return run_cli(lambda: write(options.file))


if __name__ == "__main__":
    sys.exit(main())
