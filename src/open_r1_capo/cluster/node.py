"""The task of one node: `accelerate launch` with its node's rank, which leaves signals to the trainers.

Slurm sends signals to every process; the trainers need minutes to end at a checkpoint where torchrun would grant them
30 seconds. Their exit code is kept, where `accelerate launch` ends with 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from open_r1_capo.runs.exit import PREEMPTED, SIGNALS


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accelerate launch` here; returns 85 if a process stopped at a checkpoint, else the first failure's code."""
    for number in SIGNALS:  # the trainers inherit this until they listen; whoever sends a signal repeats it
        signal.signal(number, signal.SIG_IGN)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(sys.argv[1:] if argv is None else argv)
    options.machine_rank = int(os.environ.get("SLURM_PROCID", "0"))
    options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's own, without SIGTERM
    try:
        launch_command(options)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return PREEMPTED if PREEMPTED in codes else _code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    return 0


def _code(returned: int) -> int:
    """A process's exit code as a shell gives it: 128 and the number of the signal that ended it."""
    return 128 - returned if returned < 0 else returned


if __name__ == "__main__":
    sys.exit(main())
