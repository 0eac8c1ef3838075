"""Run what is missing of an experiment: side by side on this machine's CPU, on its GPUs, or as Slurm jobs.

    python -m open_r1_capo.experiments.sweep fig2 --scale lab --seeds 5

Finished runs are skipped, so the same command goes on with an interrupted sweep. Exit codes: 0 all runs are there;
1 some failed (their logs are named); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from open_r1_capo.cluster.vllm import gpu_memory
from open_r1_capo.experiments.spec import Arm, Experiment, ExperimentError, known_experiments, load
from open_r1_capo.runs.exit import run_cli
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.outcomes import base_accuracy, usable
from open_r1_capo.runs.run import Run, read_lines
from open_r1_capo.runs.summary import duration
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import FITTED, ConfigError, pin_policy

Job = tuple[Arm, int]
LOGS = ".sweeps"  # a run's output, in a folder beside the runs
TRAIN_SCRIPT = "slurm/train.slurm"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run what is missing of an experiment."""
    parser = argparse.ArgumentParser(prog="make experiment", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", default="", help=f"one of {', '.join(known_experiments())}")
    parser.add_argument("--scale", default="lab")
    parser.add_argument("--seeds", type=int, help="the first so many of the experiment's seeds; by default all")
    parser.add_argument("--jobs", type=int, help="runs side by side on the CPU; by default one a core")
    parser.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help=f"submit the runs by {TRAIN_SCRIPT} with these options of it, such as '--nodes 2'; by default submitted "
        "where there is sbatch and the runs need GPUs",
    )
    parser.add_argument("--no-slurm", action="store_true", help="run here, even if there is sbatch")
    parser.add_argument("--dry-run", action="store_true", help="list the missing runs")
    options = parser.parse_args(argv)
    return run_cli(lambda: work(options), "interrupted; run the same command to do the missing runs")


def work(options: argparse.Namespace) -> int:
    """Run what is missing, or list it; returns the exit code.

    Raises:
        ExperimentError: no such experiment, or this machine can run none of it.
    """
    if options.jobs is not None and options.jobs < 1:
        raise ExperimentError(f"--jobs is the number of runs side by side, at least 1, got {options.jobs}")
    experiment = load(options.name, options.scale, options.seeds)
    settings = check(experiment)
    if options.dry_run:
        for job in due(experiment, _survival(experiment)):
            print(shlex.join(command(experiment, job)))
        if experiment.search:
            print("a search: these are its next runs, and decide which ones follow", file=sys.stderr)
        return 0
    slurm = None if options.slurm is None else shlex.split(options.slurm)
    if slurm is None and settings.get("needs_gpu") and shutil.which("sbatch") and not options.no_slurm:
        slurm = []
    if slurm is None and settings.get("needs_gpu") and not settings.get("use_cpu") and not gpu_memory():
        raise ExperimentError(
            f"the scale {experiment.scale} needs a GPU, and here is neither one nor sbatch: "
            f"`make experiment NAME={experiment.name} SCALE=lab` runs"
        )
    if slurm is None and settings.get("use_cpu"):
        launch = partial(on_cpu, experiment, workers=options.jobs or cores())
    else:
        launch = partial(by_commands, experiment, slurm=slurm)
    failed = run(experiment, launch)
    for job in failed:
        print(f"failed: {experiment.folder(*job)} (log: {log_of(experiment, job)})", file=sys.stderr)
    return 1 if failed else 0


# --- which runs ------------------------------------------------------------------------------------------------------


def check(experiment: Experiment) -> dict[str, Any]:
    """Compose the arms, so that a mistake in the last one is known before the first has run.

    Of a grid, whose arms differ only in numbers, the first arm and those with runs are composed. Returns the settings
    of the first arm, which tell where the runs can run.

    Raises:
        ConfigError: an arm's recipe or override is not accepted, or a finished run of it has other settings than the
            recipe has now.
    """
    kinds = {(arm.recipe, *(item.partition("=")[0] for item in arm.overrides)): arm for arm in experiment.arms[::-1]}
    first: dict[str, Any] = {}
    for arm in experiment.arms:
        folders = {seed: RunFolder(experiment.folder(arm, seed)) for seed in experiment.seeds}
        finished = [seed for seed, folder in folders.items() if folder.summary is not None]
        if not finished and arm not in kinds.values():
            continue
        try:
            settings = compose_recipe(arm.recipe, experiment.overrides(arm, experiment.seeds[0]))
        except ConfigError as error:
            raise ConfigError(f"recipes/experiments/{experiment.name}.yaml, {arm.label}: {error}") from None
        first = first or settings
        for seed in finished:  # a figure would mix two settings under one name
            differing = folders[seed].differences(pin_policy(settings) | {"seed": seed})
            differing.pop("evaluation", None)  # what is measured on the side
            if settings.get("fit_machine"):  # what the machine chose for the run
                differing = {k: v for k, v in differing.items() if k not in FITTED or settings.get(k) is not None}
            if differing:
                key, (theirs, ours) = next(iter(differing.items()))
                raise ConfigError(
                    f"{folders[seed].path} was run with other settings than its recipe has now ({key} was {theirs!r}, "
                    f"now {ours!r}): move it away or delete it, and the same command makes it again"
                )
    return first


def due(experiment: Experiment, outcome: Callable[[Job], bool | None]) -> list[Job]:
    """The runs to do next: every missing one; in a search, for each label, the one that decides its next step.

    `outcome` tells whether a finished run is usable, and is None for a run that is not there.
    """
    if experiment.search is None:
        return [job for job in experiment.runs() if outcome(job) is None]
    labels = itertools.groupby(experiment.arms, key=lambda arm: arm.label)
    return [job for _, arms in labels if (job := next_probe(list(arms), experiment, outcome)) is not None]


def next_probe(arms: Sequence[Arm], experiment: Experiment, outcome: Callable[[Job], bool | None]) -> Job | None:
    """The next run of the bisection for the largest value at which every seed survives; None when that is known.

    Survival is taken as monotone in the value. `arms` are those of one label, `outcome` is as in `due`.
    """
    ordered = sorted(arms, key=lambda arm: arm.value(experiment.search))
    low, high = -1, len(ordered)  # the largest value known to survive, the smallest known to fail
    while high - low > 1:
        middle = (low + high) // 2
        for seed in experiment.seeds:
            lives = outcome((ordered[middle], seed))
            if lives is None:
                return ordered[middle], seed
            if not lives:
                high = middle
                break
        else:
            low = middle
    return None


def _survival(experiment: Experiment) -> Callable[[Job], bool | None]:
    """Look up what became of the runs; in a search, whether they ended near their best and above the base policy."""
    runs = {job: Run(experiment.folder(*job)) for job in experiment.runs()}
    finished = {job: run for job, run in runs.items() if run.summary is not None}
    if not experiment.search:
        return lambda job: True if job in finished else None
    rewards = {job: run.rewards() for job, run in finished.items()}
    base = base_accuracy(rewards.values())
    return lambda job: usable(rewards[job], base) if job in rewards else None


# --- how they are run ------------------------------------------------------------------------------------------------


def run(experiment: Experiment, launch: Callable[[list[Job]], None]) -> list[Job]:
    """Have `launch` run what is missing, in rounds where the experiment is a search; returns the runs that failed."""
    failed: list[Job] = []
    (experiment.root / LOGS).mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        jobs = [job for job in due(experiment, _survival(experiment)) if job not in failed]
        if not jobs:
            break
        if number == 0 or experiment.search:
            print(f"{experiment.name}: {len(jobs)} runs to do", file=sys.stderr, flush=True)
        with progress(experiment, jobs):
            launch(jobs)
        failed += [job for job in jobs if Run(experiment.folder(*job)).summary is None]
    return failed


def command(experiment: Experiment, job: Job, slurm: Sequence[str] | None = None) -> list[str]:
    """The command of a run: `make train`, or with options of slurm/train.slurm its submission, which waits."""
    arm, seed = job
    changes = (item for item in experiment.overrides(*job) if item.partition("=")[0] not in ("scale", "seed"))
    args = shlex.join(changes)  # both hand it to a shell or to shlex
    if slurm is None:
        return ["make", "train", f"RECIPE={arm.recipe}", f"SCALE={experiment.scale}", f"SEED={seed}", f"ARGS={args}"]
    place = ["--recipe", arm.recipe, "--scale", experiment.scale, "--seed", str(seed)]
    return [TRAIN_SCRIPT, "--wait", *place, *slurm, "--args", args]


def log_of(experiment: Experiment, job: Job) -> Path:
    """Where a run's output goes."""
    arm, seed = job
    return experiment.root / LOGS / f"{arm.name}-{experiment.scale}-seed{seed}.log"


def by_commands(experiment: Experiment, jobs: Sequence[Job], slurm: Sequence[str] | None) -> None:
    """Run jobs by `command` and wait for them: on this machine's GPUs one after the other, or by Slurm all at once.

    Ctrl-C leaves submitted jobs to Slurm.
    """
    running = []
    for job in jobs:
        words = command(experiment, job, slurm)
        with log_of(experiment, job).open("a") as log:
            print(time.strftime("%F %T"), shlex.join(words), file=log, flush=True)
            running.append(subprocess.Popen(words, stdout=log, stderr=log))
        if slurm is None:
            running[-1].wait()
    for process in running:
        process.wait()


def on_cpu(experiment: Experiment, jobs: Sequence[Job], workers: int) -> None:
    """Run jobs in processes of this machine, each of which imports torch once.

    Each is a pool of its own: if it is killed (out of memory), its run fails, and another process takes its place.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, which stops the processes.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: one run a core
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: its processes would outlive it
    waiting = iter(jobs)  # the threads share it

    def serve() -> None:
        process = one_process()
        for job in waiting:
            try:
                process.submit(train_here, job[0].recipe, experiment.overrides(*job), log_of(experiment, job)).result()
            except BrokenProcessPool:
                process = one_process()
        process.shutdown()

    with ThreadPoolExecutor(workers) as threads:
        try:
            for thread in [threads.submit(serve) for _ in range(min(workers, len(jobs)))]:
                thread.result()
        except KeyboardInterrupt:
            list(waiting)  # leaves none to the threads
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGINT)
            raise


def one_process() -> ProcessPoolExecutor:
    """A process that runs submitted calls one after the other."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, _interrupt_once))


def _interrupt_once(*_: Any) -> None:
    """Raise KeyboardInterrupt for the first of two SIGINTs: the terminal sends one, and the sweep another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def train_here(recipe: str, overrides: list[str], log: Path) -> int:
    """Train in this process with all output, also that of its children, in the log; returns the exit code."""
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    print(time.strftime("%F %T"), recipe, *overrides, flush=True)
    try:
        from open_r1_capo.training.run import command  # seconds of imports, once a process

        return command(recipe, overrides)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(experiment: Experiment, jobs: Sequence[Job], seconds: float = 5.0) -> Iterator[None]:
    """Show a line of the sweep's progress while the block runs: on a terminal live, elsewhere once a minute."""
    live, begin, stop = sys.stderr.isatty(), time.time(), threading.Event()
    runs = [Run(experiment.folder(*job)) for job in jobs]

    def line() -> str:
        done = sum(run.summary is not None for run in runs)
        steps = sum(map(share_done, runs))
        left = (time.time() - begin) / steps * (len(jobs) - steps) if steps else None
        rest = "" if left is None else f", ETA {duration(left)}"
        return f"{experiment.name}: {done} of {len(jobs)} runs done{rest}"

    def watch() -> None:
        while not stop.wait(seconds if live else 60):
            print(f"\r\033[K{line()}" if live else line(), end="" if live else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        print(f"\r\033[K{line()}" if live else line(), file=sys.stderr, flush=True)


def share_done(run: Run) -> float:
    """The share of a run's steps that it has written; 1 only if it has ended."""
    if run.summary is not None:
        return 1.0
    rows = read_lines(run.metrics_file).rows
    return min(0.99, rows[-1]["step"] / (run.max_steps or rows[-1]["step"])) if rows else 0.0


if __name__ == "__main__":
    sys.exit(main())
