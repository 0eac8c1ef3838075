"""Write what every finished run of the experiments ended with into one small file, to be kept beside the figures.

    .venv/bin/python -m open_r1_capo.experiments.archive docs/figures/experiments.json

One entry a run, by its folder under `outputs/experiments`: commit, reward of every step, largest measured KL.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from open_r1_capo.experiments.spec import OUTPUTS
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.run import write_atomically


def entry(folder: RunFolder) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        folder: of a finished run.

    Returns:
        commit; reward, one number a step on fresh completions; largest_kl in nats, None where it was not measured.
    """
    rows = folder.metrics()
    kls = [kl for row in rows if (kl := row.get("capo/measured_kl")) is not None and math.isfinite(kl)]
    commit = OmegaConf.select(OmegaConf.load(folder.config_file), "environment.commit") or "unknown"
    rewards = [round(row["reward"], 3) for row in rows if row.get("reward") is not None]
    return {"commit": commit, "reward": rewards, "largest_kl": float(f"{max(kls):.3g}") if kls else None}


def main(argv: list[str]) -> int:
    """Write the file.

    Args:
        argv: its name.

    Returns:
        0, or 2 if there is no run or no name, or a file that cannot be read or written.
    """
    folders = [RunFolder(path.parent) for path in sorted(OUTPUTS.glob("*/*/seed*/summary.json"))]
    folders = [folder for folder in folders if folder.summary is not None]
    if len(argv) != 1 or not folders:
        print(f"error: give the file's name, and have finished runs in {OUTPUTS}", file=sys.stderr)
        return 2
    lines = []
    for one in folders:
        try:
            lines.append(f'"{one.path.relative_to(OUTPUTS)}": {json.dumps(entry(one))}')
        except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
            reason = " ".join(str(error).split())
            print(f"error: {one.config_file} is not a run's ({reason}): delete the run", file=sys.stderr)
            return 2
    try:
        write_atomically(Path(argv[0]), "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        print(f"error: {argv[0]} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
