"""The batch process of a Slurm job: starts its srun steps, passes signals on to the trainer and requeues the job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from open_r1_capo.cluster.vllm import tail
from open_r1_capo.runs.exit import PREEMPTED, SIGNALS

LOGS = Path("outputs/slurm")
REPEAT = 30.0  # seconds until an unheeded signal is sent once more
GRACE = 120.0  # seconds in which a trainer whose server has gone may end by itself


@dataclass(frozen=True)
class SrunStep:
    """One srun of a job."""

    name: str  # `trainer`, `server`, or `server2` and on for a server's other nodes
    nodes: tuple[str, ...]  # one task each
    gpus: int  # on each node; 0 for the CPU
    cpus: int | None  # on each node; None leaves them to Slurm
    command: tuple[str, ...]  # of each task
    environment: Mapping[str, str] = field(default_factory=dict)  # variables beside the job's

    def srun(self) -> list[str]:
        """The command that starts it."""
        # a task that ends takes the others with it after two minutes (--wait), not at once: ranks that stop at a
        # checkpoint end one after the other, all with the exit code that says so; --mem=0 lets steps share the memory
        count = len(self.nodes)
        words = ["srun", f"--job-name={self.name}", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
        words += [f"--nodelist={','.join(self.nodes)}", "--exact", "--mem=0", "--kill-on-bad-exit=0", "--wait=120"]
        words += [f"--gres=gpu:{self.gpus}"] if self.gpus else []
        words += [f"--cpus-per-task={self.cpus}"] if self.cpus else []
        return [*words, *self.command]

    def line(self) -> str:
        """The command as a shell reads it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.srun())])


def run_job(steps: Sequence[SrunStep], job: int) -> int:
    """Run servers and at most one trainer until the trainer ends, or without one until a server does.

    Returns:
        The exit code of the trainer; 1 if a server ended before it.
    """
    signals: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda sign, frame: signals.append(sign))
    servers = [step for step in steps if step.name != "trainer"]
    running = {step.name: start(step, job if step in servers else None) for step in steps}
    try:
        code = _wait(running, signals, job) if len(servers) < len(steps) else _serve(running, signals)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()  # to srun: end all of its tasks
        for process in running.values():
            process.wait()
    return requeue(job, code) if code == PREEMPTED else code


def start(step: SrunStep, job: int | None) -> subprocess.Popen:
    """Start a step; with a job's number its output goes into a log of its own, otherwise into the job's."""
    print(step.line(), flush=True)
    log = None
    if job is not None:
        LOGS.mkdir(parents=True, exist_ok=True)
        log = log_of(step.name, job).open("a")
        print(f"  its log: {log.name}", flush=True)
    return subprocess.Popen(step.srun(), stdout=log, stderr=log, env={**os.environ, **step.environment})


def log_of(name: str, job: int) -> Path:
    """Where a server's output goes."""
    return LOGS / f"{name}-{job}.log"


def _wait(running: Mapping[str, subprocess.Popen], signals: list[int], job: int) -> int:
    """Wait for the trainer, and forward signals, again and again, until it stops."""
    trainer = running["trainer"]
    sent, server_ended = 0.0, None
    while trainer.poll() is None:
        now = time.monotonic()
        if signals and now - sent > REPEAT:
            # SIGUSR1 whatever came: srun passes it on, but takes SIGTERM as the order to kill its tasks at once
            trainer.send_signal(signal.SIGUSR1)
            sent = now
        ended = [name for name, process in running.items() if process is not trainer and process.poll() is not None]
        if ended and server_ended is None:
            server_ended = now
            name, log = ended[0], log_of(ended[0], job)
            what = f"the {name} has ended with code {running[name].returncode}"
            print(f"error: {what}; the last lines of {log}:\n{tail(log)}", file=sys.stderr, flush=True)
        if server_ended is not None and now - server_ended > GRACE:
            break
        time.sleep(0.2)
    code = trainer.poll()
    if code is None or (server_ended is not None and code not in (0, PREEMPTED)):
        return 1
    return code if code >= 0 else 128 - code


def _serve(running: Mapping[str, subprocess.Popen], signals: list[int]) -> int:
    """Wait until a server ends or a signal arrives."""
    while not signals:
        if any(process.poll() is not None for process in running.values()):
            return 1
        time.sleep(0.2)
    return 0


def requeue(job: int, code: int) -> int:
    """Requeue a job that stopped at a checkpoint, unless it is being cancelled; Slurm then ends this process."""
    state = subprocess.run(["squeue", "-h", "-j", str(job), "-o", "%T"], capture_output=True, text=True).stdout.split()
    if state != ["RUNNING"]:
        print(f"job {job} is {' '.join(state).lower() or 'gone'}: not requeued, submit it again", file=sys.stderr)
        return code
    done = subprocess.run(["scontrol", "requeue", str(job)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        print(f"job {job} cannot be requeued ({reason}): submit it again to resume it", file=sys.stderr)
    else:
        print(f"job {job} is requeued and will resume", file=sys.stderr, flush=True)
    return code
