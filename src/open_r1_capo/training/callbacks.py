"""What a run writes and shows while it trains: metrics.jsonl, the held-out accuracy and a live progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.summary import duration

if TYPE_CHECKING:
    from open_r1_capo.training.run_trainer import RunTrainer

SKIPPED = 10  # updates in a row that were not taken, after which the user is told


class RunCallback(TrainerCallback):
    """Writes a metrics line for each optimizer step and shows how far the run is.

    Args:
        trainer: whose metrics are written.
        folder: the run's folder.
        accuracy: measures the policy on held-out problems, or None.
        suite: measures TEST, a line of eval.jsonl but for the counters, or None.
        every: steps between two measurements of TEST.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        folder: RunFolder,
        accuracy: Callable[[], dict[str, float]] | None,
        suite: Callable[[], dict[str, Any]] | None = None,
        every: int = 10,
    ):
        self.trainer, self.folder, self.accuracy, self.suite, self.every = trainer, folder, accuracy, suite, every
        self.first_step, self.start, self.skipped = 0, time.time(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the base policy, and start the clock of the remaining time."""
        if state.global_step == 0:
            self._test(state)
        self.first_step, self.start = state.global_step, time.time()

    def on_step_end(self, args, state, control, **kwargs):
        """Measure the held-out accuracy at every checkpoint, so that it stands in that step's line."""
        due = state.global_step % state.save_steps == 0 or state.global_step == state.max_steps
        if self.accuracy and due:
            self.trainer.record({"accuracy": self.accuracy()["accuracy"]})
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._test(state)

    def _test(self, state: TrainerState) -> None:
        """Write a line of eval.jsonl; every process measures, as the policy may be in shards."""
        if self.suite is None:
            return
        line = {"step": state.global_step, **self.trainer.counters, **self.suite()}
        if state.is_world_process_zero:
            self.folder.append_evaluation(line)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the step's line; other messages of the trainer are not metrics."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if not k.startswith("eval_")}}
        self.folder.append_metrics(row)
        self.skipped = self.skipped + 1 if row.get("capo/skipped_step") else 0
        if self.skipped == SKIPPED:
            show(
                f"warning: none of the last {SKIPPED} updates was taken, as their gradients were not finite or too "
                "large: the policy stands still; see capo/skipped_step and grad_norm in metrics.jsonl",
                last=True,
            )
        done = state.global_step - self.first_step
        left = (time.time() - self.start) / done * (state.max_steps - state.global_step)
        show(progress(row, state.max_steps, left), last=state.global_step == state.max_steps)


def progress(row: dict[str, float], steps: int, seconds_left: float) -> str:
    """One line below 100 characters: step, reward, KL and budget or tokens and shifts, remaining time."""
    parts = [f"step {row['step']}/{steps}"]
    if "reward" in row:  # a step on completions of an earlier one has none
        parts.append(f"reward {row['reward']:.3f}")
    changed = row.get("capo/rejected_frac", 0.0) + row.get("capo/scaled_frac", 0.0)
    if "budget/kl" in row:
        parts += [f"KL {row['budget/kl']:.1e} of {row['budget/nats']:.1e}", f"rate {row['budget/alpha']:.1e}"]
    if "capo/rejected_frac" in row and (changed or "budget/kl" not in row):
        parts += [f"{'scaled' if row['capo/scaled_frac'] else 'rejected'} {changed:.1%}"]
        parts += [f"m_F {row['capo/batch_policy_shift']:.1e}", f"m_H {row['capo/batch_objective_shift']:.1e}"]
        parts += [f"step x{row['capo/step_scale']:.2f}"] if row["capo/step_scale"] < 1 else []
    return "  ".join([*parts, f"ETA {duration(seconds_left)}"])


def show(line: str, last: bool = False) -> None:
    """Rewrite the progress line on a terminal (`last` ends it); elsewhere print every tenth step."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last or line.split("/")[0].endswith("0"):
        print(line, file=sys.stderr, flush=True)
