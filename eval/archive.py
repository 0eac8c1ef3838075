"""Write what every finished run of the experiments ended with into one small file, to be kept beside the figures.

    python eval/archive.py docs/figures/experiments.json

One entry a run, by its folder under `outputs/experiments`: commit, reward of every step, largest measured KL.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from open_r1_capo.experiments import OUTPUTS
from open_r1_capo.run_folder import RunFolder, write_atomically


def entry(folder: RunFolder) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        folder: of a finished run.

    Returns:
        commit; reward, one number a step; largest_kl in nats, None where it was not measured.
    """
    rows = folder.read_metrics()
    kls = [kl for row in rows if (kl := row.get("capo/measured_kl")) is not None and math.isfinite(kl)]
    commit = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["environment"]["commit"]
    rewards = [round(row["reward"], 3) for row in rows]
    return {"commit": commit, "reward": rewards, "largest_kl": float(f"{max(kls):.3g}") if kls else None}


def main(argv: list[str]) -> int:
    """Write the file.

    Args:
        argv: its name.

    Returns:
        0, or 2 if there is no run or no name.
    """
    folders = [RunFolder(path.parent) for path in sorted(OUTPUTS.glob("*/*/seed*/summary.json"))]
    folders = [folder for folder in folders if folder.finished() is not None]
    if len(argv) != 1 or not folders:
        print(f"error: give the file's name, and have finished runs in {OUTPUTS}", file=sys.stderr)
        return 2
    lines = (f'"{one.path.relative_to(OUTPUTS)}": {json.dumps(entry(one))}' for one in folders)
    write_atomically(Path(argv[0]), "{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
