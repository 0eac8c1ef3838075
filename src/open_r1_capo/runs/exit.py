"""What command lines share: exit codes, the signals that stop a run, errors for the user, and a check of numbers."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

BAD_INPUT = 2
PREEMPTED = 85  # stopped at a checkpoint; no shell or library that is used here gives this code another meaning
INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # let the running optimizer step finish, save, and end with PREEMPTED


class UserError(Exception):
    """An error that the user can fix. The message is one sentence: what is wrong, where, what to do."""


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run_cli(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code; a `UserError` or Ctrl-C becomes one line on stderr."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
