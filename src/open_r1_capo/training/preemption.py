"""A polite end: SIGTERM or SIGUSR1 lets the running optimizer step finish, writes a checkpoint and stops.

Slurm sends such a signal before it takes a node away. The same command then goes on exactly where the run stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from open_r1_capo.runs.exit import SIGNALS


class Preempted(Exception):
    """The run has stopped at a checkpoint because it was sent the signal `name`; the message is for the user."""

    def __init__(self, name: str, step: int):
        super().__init__(f"stopped by {name} at step {step}; run the same command to resume")


class Preemption(TrainerCallback):
    """Stops training at a checkpoint once any process of it has been sent one of `SIGNALS`."""

    def __init__(self):
        self.accelerator: Accelerator | None = None
        self.received = torch.zeros(len(SIGNALS), dtype=torch.int64)
        self.stopped: Preempted | None = None

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Catch the signals while the block runs; outside the main thread, where Python cannot, change nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = [signal.signal(number, self._note) for number in SIGNALS]
        try:
            yield self
        finally:
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def watch(self, trainer: Trainer) -> None:
        """Stop this trainer; all of its processes at the same step, so that none waits for one that has gone."""
        self.accelerator = trainer.accelerator
        trainer.add_callback(self)

    def _note(self, number: int, frame: object) -> None:
        self.received[SIGNALS.index(number)] += 1

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if a signal came, unless the next step would use the same completions once more."""
        everywhere = self.accelerator.reduce(self.received.to(self.accelerator.device), "sum").tolist()
        if not any(everywhere) or state.global_step >= state.max_steps:
            return
        reuse = args.steps_per_generation * args.num_iterations
        if state.global_step * args.gradient_accumulation_steps % reuse:
            return
        control.should_save = control.should_training_stop = True
        name = next(number.name for number, count in zip(SIGNALS, everywhere, strict=True) if count)
        self.stopped = Preempted(name, state.global_step)

    def check(self) -> None:
        """End the run here if it was stopped (Preempted)."""
        if self.stopped:
            raise self.stopped
