"""Run an experiment: its missing runs by Hydra's multirun, side by side here (joblib) or as Slurm jobs (submitit).

    python -m open_r1_capo.experiments.sweep fig2 --scale lab --seeds 5

Finished runs are skipped, so the same command goes on with an interrupted sweep. Exit codes: 0 all runs are there;
1 some failed (their logs are named); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from open_r1_capo.experiments.spec import Arm, Experiment, ExperimentError, known_experiments, load
from open_r1_capo.runs.folder import RunFolder, RunFolderError
from open_r1_capo.runs.outcomes import base_accuracy, usable
from open_r1_capo.settings.recipes import RECIPES, compose_recipe
from open_r1_capo.settings.run import ConfigError
from open_r1_capo.training.callbacks import duration

Job = tuple[Arm, int]
SWEEPS = ".sweeps"  # manifests and logs, beside the runs


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of an experiment.

    Args:
        argv: arguments; None takes the process's.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="make experiment", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(known_experiments())}")
    parser.add_argument("--scale", default="lab")
    parser.add_argument("--seeds", type=int, help="the first so many of the experiment's seeds; by default all")
    parser.add_argument(
        "--launcher", choices=("joblib", "submitit_slurm"), help="by default Slurm, where there is one"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs side by side; by default one a core, or one where GPUs are used"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the missing runs")
    parser.add_argument("hydra", nargs="*", help="settings of the launcher, such as hydra.launcher.partition=gpu")
    options = parser.parse_intermixed_args(argv)  # make puts options between the name and the settings
    if options.jobs is not None and options.jobs < 1:
        print(f"error: --jobs is the number of runs side by side, at least 1, got {options.jobs}", file=sys.stderr)
        return 2
    try:
        experiment = load(options.name or "", options.scale, options.seeds)
        check(experiment)
    except (ExperimentError, ConfigError, RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print("\n".join(command(experiment, job) for job in due(experiment, _survival(experiment))))
        if experiment.search:
            print("a search: these are its next runs, and decide which ones follow", file=sys.stderr)
        return 0
    slurm = options.launcher == "submitit_slurm" or (options.launcher is None and _has_slurm(options.scale))
    launcher = "submitit_slurm" if slurm else "joblib"
    settings = [f"hydra/launcher={launcher}", *options.hydra]
    settings += [] if slurm else [f"hydra.launcher.n_jobs={options.jobs or _side_by_side(options.scale)}"]
    try:
        failed = run(experiment, settings)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the missing runs", file=sys.stderr)
        return 130
    for job in failed:
        print(f"failed: {experiment.folder(*job)} (log: {log_of(experiment, job)})", file=sys.stderr)
    return 1 if failed else 0


def check(experiment: Experiment) -> None:
    """Compose the arms, so that a mistake in the last one is known before the first has run.

    Args:
        experiment: of a grid, whose arms differ in numbers alone, the first arm is composed, and those with runs.

    Raises:
        ConfigError: an arm's recipe or override is not accepted (names the experiment), or a finished run of it has
            other settings than the recipe has now.
    """
    kinds = {(arm.recipe, *(item.partition("=")[0] for item in arm.overrides)): arm for arm in experiment.arms[::-1]}
    for arm in experiment.arms:
        folders = {seed: RunFolder(experiment.folder(arm, seed)) for seed in experiment.seeds}
        there = [seed for seed, folder in folders.items() if folder.summary is not None]
        if not there and arm not in kinds.values():
            continue
        try:
            settings = compose_recipe(arm.recipe, experiment.overrides(arm, experiment.seeds[0]))
        except ConfigError as error:
            raise ConfigError(f"recipes/experiments/{experiment.name}.yaml, {arm.label}: {error}") from None
        for seed in there:
            check_current(folders[seed], settings | {"seed": seed})


def check_current(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Refuse a finished run that the recipe no longer describes: a figure would mix two settings under one name.

    Args:
        folder: of the run.
        settings: the resolved recipe of today.

    Raises:
        ConfigError: they differ in more than in what is measured on the side.
    """
    differing = {key: both for key, both in folder.differences(settings).items() if key != "evaluation"}
    if differing:
        key, (theirs, ours) = next(iter(differing.items()))
        raise ConfigError(
            f"{folder.path} was run with other settings than its recipe has now ({key} was {theirs!r}, now {ours!r}): "
            "move it away or delete it, and the same command makes it again"
        )


def run(experiment: Experiment, settings: Sequence[str]) -> list[Job]:
    """Run what is missing, in rounds where the experiment searches for a largest value.

    Args:
        experiment: to be completed.
        settings: of Hydra's launcher.

    Returns:
        The runs that failed.
    """
    failed: list[Job] = []
    for number in itertools.count():
        jobs = [job for job in due(experiment, _survival(experiment)) if job not in failed]
        if not jobs:
            break
        if number == 0 or experiment.search:
            print(f"{experiment.name}: {len(jobs)} runs to do", file=sys.stderr, flush=True)
        with progress(experiment, jobs):
            multirun(experiment, jobs, settings)
        failed += missing(experiment, jobs)
    return failed


def due(experiment: Experiment, outcome: Callable[[Job], bool | None]) -> list[Job]:
    """The runs to do next.

    Args:
        experiment: with or without a search.
        outcome: whether a finished run is usable; None for a run that is not there.

    Returns:
        Every missing run; in a search the one run of each label that decides its next step.
    """
    if experiment.search is None:
        return [job for job in experiment.runs() if outcome(job) is None]
    labels = itertools.groupby(experiment.arms, key=lambda arm: arm.label)
    return [job for _, arms in labels if (job := next_probe(list(arms), experiment, outcome)) is not None]


def next_probe(arms: Sequence[Arm], experiment: Experiment, outcome: Callable[[Job], bool | None]) -> Job | None:
    """One step of the bisection for the largest value at which every seed survives, taking survival as monotone.

    Args:
        arms: of one label, one for each value of the grid.
        experiment: its seeds and the searched key.
        outcome: as in `due`.

    Returns:
        The run that is missing for the next decision; None when the value is known.
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
    """Look up what became of the runs: a run lives if it ends near its best and not below the base policy."""
    folders = {job: RunFolder(experiment.folder(*job)) for job in experiment.runs()}
    finished = {job: folder for job, folder in folders.items() if folder.summary is not None}
    if not experiment.search:
        return lambda job: True if job in finished else None
    rewards = {
        job: [row["reward"] for row in folder.metrics() if row.get("reward") is not None]
        for job, folder in finished.items()
    }
    base = base_accuracy(rewards.values())
    return lambda job: usable(rewards[job], base) if job in rewards else None


def missing(experiment: Experiment, jobs: Iterator[Job] | Sequence[Job]) -> list[Job]:
    """The runs without a summary."""
    return [job for job in jobs if RunFolder(experiment.folder(*job)).summary is None]


def command(experiment: Experiment, job: Job) -> str:
    """The make command of one run, as a shell reads it."""
    arm, seed = job
    return shlex.join(make_train(arm.recipe, experiment.overrides(arm, seed)))


def make_train(recipe: str, overrides: Sequence[str]) -> list[str]:
    """The make command of a run, word by word.

    Args:
        recipe: its name.
        overrides: among them scale and seed, which make is told by variables, as the scale decides how it launches.

    Returns:
        The words; make hands ARGS to a shell, so that it is quoted in itself.
    """
    names = {"scale": "SCALE", "seed": "SEED"}
    said = [item for item in overrides if item.partition("=")[0] in names]
    rest = shlex.join(item for item in overrides if item not in said)
    variables = [f"{names[key]}={value}" for key, _, value in (item.partition("=") for item in said)]
    return ["make", "train", f"RECIPE={recipe}", *variables, f"ARGS={rest}"]


def log_of(experiment: Experiment, job: Job) -> Path:
    """Where a run's output goes."""
    arm, seed = job
    name = ",".join((arm.recipe, *arm.overrides))
    return experiment.root / SWEEPS / f"{name}-{experiment.scale}-seed{seed}.log"


def multirun(experiment: Experiment, jobs: Sequence[Job], settings: Sequence[str]) -> None:
    """Hand jobs to Hydra's launcher and wait for them; a job that fails leaves the others alone.

    Args:
        experiment: whose runs they are.
        jobs: arms and seeds.
        settings: overrides of Hydra's launcher.
    """
    lines = [
        {
            "recipe": arm.recipe,
            "overrides": experiment.overrides(arm, seed),
            "log": str(log_of(experiment, (arm, seed)).absolute()),
            "in_process": experiment.scale.startswith("lab"),
        }
        for arm, seed in jobs
    ]
    manifest = (experiment.root / SWEEPS / f"{experiment.name}-{experiment.scale}-{os.getpid()}.json").absolute()
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(lines, indent=1))
    numbers = ",".join(map(str, range(len(jobs))))
    arguments = ["sweep", "--multirun", f"manifest='{manifest}'", f"job={numbers}", *settings]
    before = sys.argv
    try:
        sys.argv = arguments
        hydra.main(version_base="1.3", config_path=str(RECIPES / "sweep"), config_name="job")(run_job)()
    finally:
        sys.argv = before
        manifest.unlink()


def run_job(config: DictConfig) -> int:
    """Do one line of a manifest: train in this process, or by `make train`, which knows how to launch on GPUs.

    Args:
        config: `manifest` and `job`.

    Returns:
        The exit code, which nobody needs: the run's summary says whether it ended.
    """
    job = json.loads(Path(config.manifest).read_text())[config.job]
    with Path(job["log"]).open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        print(f"{time.strftime('%F %T')} {job['recipe']} {' '.join(job['overrides'])}", flush=True)
        if not job["in_process"]:
            words = make_train(job["recipe"], job["overrides"])
            return subprocess.run(words, stdout=log, stderr=log, check=False).returncode
        from open_r1_capo import grpo  # seconds of imports that the listing of an experiment does not need

        GlobalHydra.instance().clear()  # the run composes its recipe itself
        try:
            return grpo.main(["--config-name", job["recipe"], *job["overrides"]])
        except Exception:
            traceback.print_exc()
            return 1


@contextlib.contextmanager
def progress(experiment: Experiment, jobs: Sequence[Job], seconds: float = 5.0) -> Iterator[None]:
    """Show a line of the sweep's progress while the block runs: on a terminal live, elsewhere once a minute."""
    live, start, stop = sys.stderr.isatty(), time.time(), threading.Event()
    folders = [RunFolder(experiment.folder(*job)) for job in jobs]

    def line() -> str:
        done = sum(folder.summary is not None for folder in folders)
        steps = sum(1 if f.summary else _share_done(f) for f in folders)
        left = (time.time() - start) / steps * (len(jobs) - steps) if steps else None
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


def _share_done(folder: RunFolder) -> float:
    """The share of a running run's steps that it has written."""
    if not folder.metrics_file.is_file():
        return 0.0
    planned = OmegaConf.load(folder.config_file).max_steps  # written before the first step
    with folder.metrics_file.open("rb") as file:
        return min(0.99, sum(1 for _ in file) / planned)


def _has_slurm(scale: str) -> bool:
    return not scale.startswith("lab") and shutil.which("sbatch") is not None


def _side_by_side(scale: str) -> int:
    """One lab run a core; runs on GPUs take all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if scale.startswith("lab") else 1


if __name__ == "__main__":
    sys.exit(main())
