"""The job scripts under a real Slurm: two nodes with stand-in GPUs on this machine (`make test-slurm`)."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import cluster

ROOT = Path(__file__).resolve().parents[2]
REASON = cluster.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SMALL = "completions_per_step=16 num_generations=4 max_completion_length=16 evaluation.problems=0 learning_rate=2e-4"
PATIENCE = 900  # seconds for a job of a few steps; most of it is the start of Python on a busy machine


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster.cluster(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, slurm):
    """A copy of the sources, whose outputs are in the temporary folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src", "recipes", "slurm", "eval"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "slurm" / "site.sh").unlink(missing_ok=True)
    for name in ("setup.py", "Makefile", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for environment in ROOT.glob(".venv*"):
        borrow(environment, folder / environment.name)
    slurm["PIP_DRY_RUN"] = "1"  # whatever make thinks of the environments, they are not this checkout's to change
    slurm["PYTHONPATH"] = str(folder / "src")
    slurm["OMP_NUM_THREADS"] = "1"
    return folder


def borrow(environment, place):
    """Link a virtual environment's parts, with stamps of its own that say it is up to date."""
    place.mkdir()
    for path in environment.iterdir():
        if path.name in (".installed", ".ready", ".tried"):
            (place / path.name).touch()
        else:
            (place / path.name).symlink_to(path)


@pytest.fixture
def run(slurm, checkout):
    """Run a command in the checkout; returns its output."""

    def call(*command, expect=0, **more):
        done = subprocess.run(
            command, cwd=checkout, env=slurm | more, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.fixture
def submit(run, lab_policy):
    """Submit a training of the lab; returns the job's number."""

    def call(*options, root="outputs", steps=6, **more):
        settings = f"{SMALL} max_steps={steps} model_name_or_path={lab_policy} output_root={root}"
        return int(
            re.search(r"job (\d+)", run("slurm/train.slurm", "--scale", "lab", *options, "--args", settings, **more))[
                1
            ]
        )

    return call


def log(checkout, job):
    return "".join(path.read_text() for path in (checkout / "outputs" / "slurm").glob(f"*-{job}.out"))


def wait_for_steps(slurm, checkout, job, folder, number):
    """Wait until a running job has done so many steps."""

    def there():
        assert cluster.queue(slurm, job), f"job {job} has ended:\n{log(checkout, job)}"
        return len(steps(folder)) >= number

    cluster.wait_until(there, PATIENCE, f"job {job} makes no steps")


def wait_for_end(slurm, checkout, *jobs):
    for job in jobs:
        end = time.monotonic() + PATIENCE
        while cluster.queue(slurm, job):
            assert time.monotonic() < end, log(checkout, job)
            time.sleep(0.5)


def steps(folder):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{key: value for key, value in row.items() if "time" not in key} for row in rows]


def test_stopped_on_two_nodes_requeued_and_resumed(slurm, checkout, submit, run):
    """Twice: by the signal before the time limit, and by a SIGTERM to the job's processes, as preemption sends it."""
    options = ("--recipe", "capo_aggressive", "--accelerator", "ddp", "--nodes", "2", "--gpus-per-node", "1")
    whole = submit(*options, root="outputs/whole", steps=12)
    job = submit(*options, steps=12)
    folder = checkout / "outputs" / "capo_aggressive" / "lab" / "seed0"
    wait_for_steps(slurm, checkout, job, folder, 2)
    run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait_until(lambda: "stopped by SIGUSR1" in log(checkout, job), PATIENCE, "the trainer was not told")
    wait_for_steps(slurm, checkout, job, folder, len(steps(folder)) + 2)
    run("scancel", "--signal=TERM", str(job))
    wait_for_end(slurm, checkout, job, whole)
    text = log(checkout, job)
    assert len(re.findall(r"stopped by SIG(USR1|TERM) at step \d+; run the same command to resume", text)) == 2, text
    assert text.count(f"job {job} is requeued and will resume") == 2
    assert text.count("resuming from outputs/capo_aggressive/lab/seed0/checkpoints/checkpoint-") == 2
    assert "Traceback" not in text
    assert (folder / "summary.json").is_file(), text
    assert yaml.safe_load((folder / "config.yaml").read_text())["environment"]["processes"] == 2
    assert [row["step"] for row in steps(folder)] == list(range(1, 13))
    assert steps(folder) == steps(checkout / "outputs" / "whole" / "capo_aggressive" / "lab" / "seed0")


def test_an_array_of_seeds_and_its_evaluation(slurm, checkout, submit, run):
    job = submit("--recipe", "grpo_planned", "--seed", "0-1", root="outputs/array", steps=2)
    wait_for_end(slurm, checkout, job)
    folders = [checkout / "outputs" / "array" / "grpo_planned" / "lab" / f"seed{seed}" for seed in (0, 1)]
    first, second = (steps(folder) for folder in folders)
    assert len(first) == len(second) == 2
    assert first != second
    if not (ROOT / ".venv-eval" / ".ready").is_file():
        pytest.skip("no environment to evaluate in: make eval MODEL=lab builds it")
    words = [f"RUN={folders[0].relative_to(checkout)}", "BACKEND=transformers", "LIMIT=2", "TASKS=lab_base"]
    told = run("slurm/evaluate.slurm", *words, SBATCH_GRES="none")
    evaluation = int(re.search(r"job (\d+)", told)[1])
    wait_for_end(slurm, checkout, evaluation)
    lines = folders[0] / "eval.jsonl"
    assert lines.is_file(), log(checkout, evaluation)
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()][-1] == 2


def test_a_cancelled_job_stays_cancelled(slurm, checkout, submit, run):
    job = submit("--recipe", "grpo_aggressive", root="outputs/cancelled", steps=2000)
    folder = checkout / "outputs" / "cancelled" / "grpo_aggressive" / "lab" / "seed0"
    wait_for_steps(slurm, checkout, job, folder, 1)
    run("scancel", str(job))
    wait_for_end(slurm, checkout, job)
    assert "is requeued" not in log(checkout, job)
    assert "Restarts=0" in run("scontrol", "show", "job", str(job))


def test_a_sweep_of_three_seeds(slurm, checkout, run, lab_policy):
    arm = {"label": "GRPO", "recipe": "grpo_aggressive", "overrides": {"max_steps": 2}}
    experiment = {"title": "Three seeds", "seeds": [0, 1, 2], "arms": [arm]}
    (checkout / "recipes" / "experiments" / "three.yaml").write_text(yaml.safe_dump(experiment))
    common = dict(item.split("=") for item in SMALL.split()) | {"model_name_or_path": str(lab_policy)}
    del common["learning_rate"]
    (checkout / "recipes" / "experiments" / "common.yaml").write_text(yaml.safe_dump({"scales": {"lab": common}}))
    command = [".venv/bin/python", "-m", "open_r1_capo.experiments.sweep", "three", "--scale", "lab", "--slurm"]
    told = run(*command)
    assert "3 of 3 runs done" in told
    logs = list((checkout / "outputs" / "experiments" / ".sweeps").glob("*.log"))
    jobs = [re.search(r"Submitted batch job (\d+)", path.read_text())[1] for path in logs]
    assert len(set(jobs)) == 3
    assert not any(cluster.queue(slurm, int(job)) for job in jobs)
    found = sorted(path.parent for path in (checkout / "outputs" / "experiments").glob("grpo*/lab/seed*/summary.json"))
    assert [path.name for path in found] == ["seed0", "seed1", "seed2"], told
    assert all(len(steps(path)) == 2 for path in found)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_submitted(slurm, checkout, run):
    assert "CAPO_SITE names nowhere.sh" in run("slurm/train.slurm", expect=2, CAPO_SITE="nowhere.sh")
    told = run("slurm/train.slurm", expect=1, SBATCH_PARTITION="nowhere")
    assert "invalid partition specified: nowhere" in told
    assert not cluster.queue(slurm)


def test_a_site_file_is_read(slurm, checkout, run, tmp_path):
    (tmp_path / "site.sh").write_text("export SBATCH_PARTITION=from-the-site\n")
    told = run("slurm/train.slurm", expect=1, CAPO_SITE=str(tmp_path / "site.sh"))
    assert "invalid partition specified: from-the-site" in told


def test_fewer_gpus_than_asked(slurm, checkout, run):
    told = run("sbatch", "--gres=gpu:1", "slurm/train.slurm", "--gpus-per-node", "2")
    job = int(re.search(r"job (\d+)", told)[1])
    wait_for_end(slurm, checkout, job)
    assert log(checkout, job).startswith("error: --gpus-per-node 2 is more than the job's 1"), log(checkout, job)
    assert "ExitCode=2:0" in run("scontrol", "show", "job", str(job))
