"""Experiments are read into runs, a search asks for the runs that decide it, and a sweep does what is missing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from open_r1_capo.cluster import launch
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments import sweep
from open_r1_capo.experiments.spec import Arm, Experiment, ExperimentError, known_experiments, load
from open_r1_capo.runs import outcomes
from open_r1_capo.runs.run import SUMMARY, Run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of experiments, with settings that both scales share."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common.yaml").write_text("scales: {lab*: {evaluation.problems: 0, save_strategy: \"'no'\"}}\n")

    def write(name, **content):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    return write


def write_run(path, rewards):
    path.mkdir(parents=True)
    rows = [{"step": i + 1, "completions": 96 * (i + 1), "reward": r} for i, r in enumerate(rewards)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps(dict.fromkeys(SUMMARY)))


@pytest.mark.parametrize("name", known_experiments())
def test_every_experiment_composes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs are
    sweep.check(load(name))


@pytest.mark.parametrize("scale", ["qwen2.5-math-7b", "lab_wide"])
def test_the_main_figure_composes_at_every_scale(scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep.check(load("fig2", scale))


def test_arms_grids_and_folders(folder):
    grid = {"learning_rate": [1e-4, 2e-3], "capo.step_feedback": [True]}
    arms = [
        {"label": "A", "recipe": "grpo_aggressive"},
        {"label": "B", "recipe": "grpo_planned", "overrides": {"beta": 0.1}, "grid": grid},
    ]
    folder("one", title="One", seeds=[2, 3, 4], arms=arms)
    found = load("one", "lab_wide", seeds=2)
    assert [arm.overrides for arm in found.arms] == [
        (),
        ("beta=0.1", "learning_rate=0.0001", "capo.step_feedback=true"),
        ("beta=0.1", "learning_rate=0.002", "capo.step_feedback=true"),
    ]
    assert found.arms[2].value("learning_rate") == 2e-3
    assert str(found.folder(found.arms[0], 3)) == "outputs/experiments/grpo_aggressive/lab_wide/seed3"
    last = "outputs/experiments/grpo_planned,beta=0.1,learning_rate=0.002,capo.step_feedback=true/lab_wide/seed2"
    assert str(found.folder(found.arms[2], 2)) == last
    assert [(arm.label, seed) for arm, seed in found.runs()][:4] == [("A", 2), ("B", 2), ("B", 2), ("A", 3)]
    assert found.common == ("evaluation.problems=0", "save_strategy='no'")
    folder("two", title="Two", seeds=[2], arms=arms, scales={"lab_*": {"evaluation.problems": 9}})
    assert load("two", "lab_wide").common == ("evaluation.problems=9", "save_strategy='no'")
    assert load("two", "lab").common == found.common
    assert load("two", "qwen2.5-math-7b").common == ()
    assert load("one", "qwen2.5-math-7b").common == ()


def test_the_folder_is_the_one_that_a_run_takes(folder):
    """`variant` puts the overrides into the run's own folder name."""
    from open_r1_capo.settings.recipes import compose_recipe
    from open_r1_capo.training.build import build

    folder("one", title="One", seeds=[7], arms=[{"label": "A", "recipe": "grpo_aggressive", "grid": {"beta": [0.1]}}])
    experiment = load("one")
    run, args = build(compose_recipe("grpo_aggressive", experiment.overrides(experiment.arms[0], 7)))
    assert run.folder(args.seed) == experiment.folder(experiment.arms[0], 7)
    assert (args.seed, args.beta, args.save_strategy) == (7, 0.1, "no")


def test_extending(folder):
    arms = [{"label": "A", "recipe": "grpo_aggressive"}, {"label": "B", "recipe": "capo_aggressive"}]
    folder("one", title="One", seeds=[2], arms=arms)
    folder("two", extends="one", title="Two", only=["B"])
    found = load("two")
    assert (found.title, found.seeds, [arm.label for arm in found.arms]) == ("Two", (2,), ["B"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"title": "T", "seeds": [1], "arms": [{"label": "A"}]}, "perhaps overrides"),
        (
            {"title": "T", "seeds": [1], "arms": [{"label": "A", "recipe": "r", "lr": 1}]},
            "perhaps overrides",
        ),
        ({"title": "T", "arms": []}, "does not say 'seeds'"),
        ({"title": "T", "seeds": [1], "arms": [], "sedes": 3}, "'sedes' is none of"),
        ({"extends": "base", "only": ["X"]}, "has no arm 'X'"),
    ],
)
def test_mistakes_in_a_file(folder, content, message):
    folder("base", title="T", seeds=[1], arms=[{"label": "A", "recipe": "r"}])
    folder("bad", **content)
    with pytest.raises(ExperimentError, match=message):
        load("bad")


def test_unknown_names_and_seeds(folder):
    folder("fig2", title="T", seeds=[2, 3], arms=[{"label": "A", "recipe": "grpo_aggressive"}])
    with pytest.raises(ExperimentError, match=r"no experiment 'fig3'; did you mean fig2\?"):
        load("fig3")
    with pytest.raises(ExperimentError, match="SEEDS is 1 to 2"):
        load("fig2", seeds=3)
    with pytest.raises(ExperimentError, match="no scale 'labb'; there are lab, lab_heavy"):
        load("fig2", "labb")


def test_an_arm_that_no_run_could_take_is_refused_before_any_run(folder, capsys):
    arms = [{"label": "A", "recipe": "grpo_aggressive"}, {"label": "B", "recipe": "grpo_aggressive",
            "overrides": {"learning_rte": 1}}]  # fmt: skip
    folder("one", title="T", seeds=[2], arms=arms)
    assert sweep.main(["one"]) == 2
    assert "one.yaml, B: there is no setting 'learning_rte'; did you mean learning_rate?" in capsys.readouterr().err
    assert not experiments.OUTPUTS.exists()
    assert sweep.main(["one", "--scale", "lba"]) == 2
    assert "there is no scale 'lba'" in capsys.readouterr().err


def rates(*values):
    return tuple(Arm("A", "r", (f"learning_rate={value:g}",)) for value in values)


@pytest.mark.parametrize("limit", [0.5, 1, 2, 4, 8, 16])
def test_the_search_finds_the_largest_rate_with_few_runs(limit):
    """Against the definition, on a method whose seed 3 fails above `limit` and seed 2 above twice as much."""
    experiment = Experiment("x", "X", "lab", rates(1, 2, 4, 8), (2, 3), search="learning_rate")
    known = {}
    truth = lambda arm, seed: arm.value("learning_rate") <= limit * (2 if seed == 2 else 1)  # noqa: E731
    while jobs := sweep.due(experiment, known.get):
        assert len(jobs) == 1
        known[jobs[0]] = truth(*jobs[0])
    whole = [arm.value("learning_rate") for arm in experiment.arms if known.get((arm, 2)) and known.get((arm, 3))]
    assert max(whole, default=0) == max((rate for rate in (1, 2, 4, 8) if rate <= limit), default=0)
    assert len(known) <= 6 < len(experiment.arms) * 2


def test_what_is_missing(folder):
    folder("one", title="T", seeds=[2, 3], arms=[{"label": "A", "recipe": "grpo_aggressive"}])
    experiment = load("one")
    write_run(experiment.folder(experiment.arms[0], 2), [0.5] * 10)
    assert sweep.due(experiment, sweep._survival(experiment)) == [(experiment.arms[0], 3)]
    assert {"SCALE=lab", "SEED=3"} <= set(sweep.command(experiment, (experiment.arms[0], 3)))


def test_a_dry_run_of_a_search_lists_its_next_runs(folder, capsys):
    grid = {"learning_rate": [1e-4, 2e-4, 4e-4]}
    folder("one", title="T", seeds=[2, 3], search="learning_rate", arms=[{"label": "A", "recipe": "grpo_aggressive",
           "grid": grid}])  # fmt: skip
    assert sweep.main(["one", "--dry-run"]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert "learning_rate=0.0002" in line
    assert "SEED=2" in line
    assert "a search" in said.err


def test_how_far_a_run_is(tmp_path):
    run = Run(tmp_path / "run")
    assert sweep.share_done(run) == 0
    write_run(run.path, [0.3] * 15)
    assert sweep.share_done(run) == 1
    run.summary_file.unlink()
    run.config_file.write_text("recipe: grpo_planned\nmax_steps: 60\n")
    assert sweep.share_done(run) == 0.25


@pytest.fixture
def on_gpus(folder, tmp_path, monkeypatch):
    """An experiment of two runs on GPUs; make and slurm/train.slurm write what they are given into the file `said`."""
    grid = {"learning_rate": [1e-4, 1e-5]}
    folder("one", title="T", seeds=[2], arms=[{"label": "A", "recipe": "grpo_planned", "grid": grid}])
    (tmp_path / "Makefile").write_text("train:\n\t@printf '%s\\n' $(RECIPE) $(SCALE) $(SEED) $(ARGS) >> said\n")
    script = tmp_path / "slurm" / "train.slurm"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho submitted\nprintf "%s\\n" "$@" >> said.$$\n')
    script.chmod(0o755)
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    monkeypatch.setattr(sweep, "gpu_memory", lambda: [2**36])
    return ["one", "--scale", "qwen2.5-math-1.5b"]


def test_a_run_on_gpus_is_made_by_make(on_gpus, tmp_path, capsys):
    """The line that is shown and the one that is run both reach a program with every override whole."""
    assert sweep.main([*on_gpus, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in lines:
        subprocess.run(["bash", "-c", line], check=True)
    said = tmp_path / "said"
    shown = said.read_text()
    assert shown.splitlines()[:3] == ["grpo_planned", "qwen2.5-math-1.5b", "2"]
    assert {"variant='learning_rate=0.0001'", "variant='learning_rate=1e-05'"} <= set(shown.splitlines())
    said.unlink()
    assert sweep.main(on_gpus) == 1  # no summary
    assert said.read_text() == shown
    assert capsys.readouterr().err.count("failed: ") == 2
    assert sweep.main(["one", "--jobs", "0"]) == 2
    assert "at least 1, got 0" in capsys.readouterr().err


def test_runs_on_gpus_are_not_begun_without_one(on_gpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "gpu_memory", list)
    assert sweep.main(on_gpus) == 2
    assert "qwen2.5-math-1.5b needs a GPU, and here is neither one nor sbatch" in capsys.readouterr().err
    assert not (tmp_path / "said").exists()


def test_runs_on_gpus_are_submitted_where_there_is_slurm(on_gpus, tmp_path, monkeypatch):
    """Each with the script's options, and its overrides as one word that the launcher splits."""
    monkeypatch.setattr(sweep.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert sweep.main([*on_gpus, "--no-slurm"]) == 1
    assert (tmp_path / "said").is_file()
    assert sweep.main([*on_gpus, "--slurm", "--nodes=2 --tp 2"]) == 1
    found = sorted(tmp_path.glob("said.*"))
    assert len(found) == 2
    submitted = [launch.parser().parse_args(path.read_text().splitlines()) for path in found]
    place = [(one.wait, one.recipe, one.scale, one.seed, one.nodes, one.tp) for one in submitted]
    assert place == [(True, "grpo_planned", "qwen2.5-math-1.5b", "2", 2, 2)] * 2
    rates = {word for one in submitted for word in shlex.split(one.args) if word.startswith("variant")}
    assert rates == {"variant='learning_rate=0.0001'", "variant='learning_rate=1e-05'"}
    assert "submitted" in next(tmp_path.glob("outputs/experiments/.sweeps/*.log")).read_text()
    assert sweep.main(on_gpus) == 1
    assert len(sorted(tmp_path.glob("said.*"))) == 4


def test_outcomes():
    """Hand-made runs: base accuracy .3."""
    up, down = [0.3 + 0.005 * i for i in range(100)], [0.3 + 0.02 * i for i in range(20)] + [0.0] * 80
    assert outcomes.survived(up)
    assert outcomes.usable(up, 0.3)
    assert not outcomes.collapsed(up, 0.3)
    assert outcomes.best_accuracy(down) == pytest.approx(sum(0.3 + 0.02 * i for i in range(10, 20)) / 10)
    assert outcomes.last_accuracy(down) == 0
    assert outcomes.collapsed(down, 0.3)
    assert not outcomes.survived(down)
    dead = [0.02] * 30  # gone within the first steps: nothing left to fall from, and still of no use
    assert outcomes.survived(dead)
    assert not outcomes.usable(dead, 0.3)
    assert not outcomes.collapsed(dead, 0.3)
    assert outcomes.trailing_means([0.0] * 10 + [1.0]) == [0.0, 0.1]


def test_a_sweep_of_real_runs(folder, lab_policy, tmp_path, capsys):
    """Two seeds in a process of their own; the second call makes the one that is gone again, with the same numbers."""
    (tmp_path / lab_policy.name).symlink_to(lab_policy)  # a folder's name has no '/'
    small = {"max_steps": 2, "completions_per_step": 8, "data.problems": 8, "model_name_or_path": lab_policy.name}
    folder("one", title="T", seeds=[2, 3], arms=[{"label": "A", "recipe": "grpo_planned", "overrides": small}])
    assert sweep.main(["one", "--jobs", "1"]) == 0
    experiment = load("one")
    runs = [experiment.folder(experiment.arms[0], seed) for seed in (2, 3)]
    numbers = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [len(rows) for rows in numbers] == [2, 2]
    assert numbers[0][0]["entropy"] != numbers[1][0]["entropy"]
    (runs[1] / "summary.json").unlink()
    before = (runs[0] / "summary.json").stat().st_mtime_ns
    assert sweep.main(["one", "--jobs", "1"]) == 0
    assert (runs[0] / "summary.json").stat().st_mtime_ns == before
    again = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    strip = lambda rows: [{k: v for k, v in row.items() if "time" not in k} for row in rows]  # noqa: E731
    assert strip(again) == strip(numbers[1])
    assert "2 of 2 runs done" in capsys.readouterr().err
    assert sweep.main(["one", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == ""
    config = runs[0] / "config.yaml"
    config.write_text(config.read_text().replace("step_policy_shift: 0.0003", "step_policy_shift: 0.1"))
    assert sweep.main(["one", "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{runs[0]} was run with other settings than its recipe has now (capo was" in said
    assert json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[0]) == numbers[0][0]


def test_a_run_that_fails_leaves_the_others_alone(folder, lab_policy, tmp_path, capsys):
    (tmp_path / lab_policy.name).symlink_to(lab_policy)
    small = {"max_steps": 1, "completions_per_step": 8, "data.problems": 8}
    arms = [
        {"label": "A", "recipe": "grpo_planned", "overrides": small | {"model_name_or_path": "nowhere"}},
        {"label": "B", "recipe": "grpo_planned", "overrides": small | {"model_name_or_path": lab_policy.name}},
    ]
    folder("one", title="T", seeds=[2], arms=arms)
    assert sweep.main(["one", "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert said.count("failed:") == 1
    log = next(tmp_path.glob("outputs/experiments/.sweeps/*nowhere*.log"))
    assert str(log.relative_to(tmp_path)) in said
    assert "the model nowhere cannot be loaded" in log.read_text()


def test_a_run_that_is_killed_leaves_the_others_alone(tmp_path, monkeypatch):
    """One process, two runs: the first one kills it."""
    (tmp_path / sweep.LOGS).mkdir()
    experiment = Experiment("x", "X", "lab", (Arm("A", "killed"), Arm("B", "whole")), (2,), root=tmp_path)
    monkeypatch.setattr(sweep, "train_here", killed_or_whole)
    sweep.on_cpu(experiment, list(experiment.runs()), workers=1)
    assert [path.name for path in tmp_path.glob("*/*.log")] == ["whole-lab-seed2.log"]


def killed_or_whole(recipe, overrides, log):
    if recipe == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    log.touch()


def test_ctrl_c_stops_the_runs(folder, lab_policy, tmp_path):
    """SIGINT to the sweep alone: it ends with 130, its run too, and what the run has done can be gone on with."""
    (tmp_path / lab_policy.name).symlink_to(lab_policy)
    small = {"max_steps": 5000, "completions_per_step": 8, "data.problems": 8, "model_name_or_path": lab_policy.name}
    folder("one", title="T", seeds=[2], arms=[{"label": "A", "recipe": "grpo_planned", "overrides": small}])
    program = (
        f"import sys, pathlib; from open_r1_capo.experiments import spec, sweep\n"
        f"spec.EXPERIMENTS = pathlib.Path({str(tmp_path)!r})\n"
        "if __name__ == '__main__': sys.exit(sweep.main(['one']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen([sys.executable, "program.py"], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(Path().glob("outputs/experiments/*/lab/seed2/metrics.jsonl")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    said = process.stderr.read()
    assert "interrupted; run the same command to do the missing runs" in said
    assert "Traceback" not in said
    log = next(Path().glob("outputs/experiments/.sweeps/*.log")).read_text()
    assert "interrupted; run the same command to resume from the last checkpoint" in log
    assert not list(Path().glob("outputs/experiments/*/lab/seed2/summary.json"))
