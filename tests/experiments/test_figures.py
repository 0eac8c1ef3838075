"""The figures and tables: statistics by hand, what is drawn against the files, and what happens to bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import synthetic_runs
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import __main__ as figures
from open_r1_capo.experiments.figures import calibration, curves, drawing, paper, stability, stats, tables
from open_r1_capo.runs import outcomes

EXPERIMENTS = {
    "fig2": """
        {title: methods, seeds: [2, 3], arms: [
          {label: GRPO, recipe: grpo_conservative}, {label: GRPO (A), recipe: grpo_aggressive},
          {label: DrGRPO (A), recipe: drgrpo_aggressive}, {label: REINFORCE (A), recipe: reinforce_aggressive},
          {label: CAPO, recipe: capo_aggressive}, {label: Dr.CAPO, recipe: drcapo_aggressive},
          {label: ReinCAPO, recipe: reincapo_aggressive}]}""",
    "fig1": "{title: f1, extends: fig2, only: [GRPO, GRPO (A), CAPO]}",
    "fig3": "{title: f3, extends: fig2}",
    "fig4": "{title: f4, extends: fig2, only: [DrGRPO (A), Dr.CAPO, REINFORCE (A), ReinCAPO]}",
    "fig5": "{title: f5, extends: fig2, only: [CAPO, Dr.CAPO, ReinCAPO]}",
    "fig9": "{title: f9, extends: fig2, only: [GRPO (A), CAPO]}",
    "fig10": "{title: f10, extends: fig2}",
    "table1": "{title: t1, extends: fig2}",
    "table5": "{title: t5, extends: fig2, only: [GRPO (A), CAPO]}",
    "efficiency": "{title: efficiency, extends: fig2}",
    "calibration": "{title: calibration, extends: fig2, only: [GRPO (A), CAPO]}",
    "fig6": """
        {title: optimizer model, seeds: [2], arms: [
          {label: CAPO (SGD), recipe: capo_aggressive, overrides: {capo.optimizer_model: sgd}},
          {label: CAPO (Adam), recipe: capo_aggressive}]}""",
    "fig7": """
        {title: clipping, seeds: [2], arms: [
          {label: e 0.2, recipe: grpo_aggressive, overrides: {epsilon: 0.2}, grid: {num_iterations: [2, 5]}},
          {label: CAPO, recipe: capo_aggressive}]}""",
    "fig8": "{title: KL, seeds: [2], arms: [{label: b 0.1, recipe: grpo_aggressive, overrides: {beta: 0.1}}]}",
    "stability": """
        {title: stability, seeds: [2, 3], search: learning_rate, arms: [
          {label: GRPO, recipe: grpo_aggressive, grid: &rates {learning_rate: [4.0e-4, 8.0e-4, 1.6e-3, 3.2e-3]}},
          {label: Dr.CAPO, recipe: drcapo_aggressive, grid: *rates}]}""",
    "transfer": "{title: transfer, seeds: [2], arms: [{label: GRPO (A), recipe: grpo_aggressive}]}",
    "transfer_batch": "{title: batch, extends: transfer}",
    "variants": "{title: variants, extends: transfer}",
    "warmup": "{title: warm-up, extends: stability}",
    "stability_cost": "{title: cost, extends: fig2}",
    "step_sizes": "{title: sizes, extends: tuning_methods}",
    "step_sizes_sgd": "{title: sizes, extends: stability}",
    "sgd": "{title: SGD, extends: stability}",
    "tuning_methods": """
        {title: tuning, seeds: [2, 3], arms: [{label: GRPO, recipe: grpo_aggressive, overrides: {beta: 0},
          grid: {learning_rate: [4.0e-4, 1.6e-3]}}]}""",
    "tuning_rivals": "{title: rivals, extends: tuning_methods}",
    "tuning_mask": "{title: mask, extends: tuning_methods}",
    "tuning_budget": "{title: budgets, extends: tuning_methods}",
    "no_rate": "{title: no rate, extends: fig2}",
    "tuning_sgd": "{title: SGD, extends: tuning_methods}",
    "tuning_rates": "{title: rates, extends: tuning_methods}",
    "long": "{title: long, extends: fig2}",
    "guarantee": "{title: guarantee, extends: fig2}",
    "first_guess": "{title: first guess, extends: fig2}",
    "equal_tuning": """
        {title: equal tuning, seeds: [2, 3], arms: [
          {label: budget, recipe: grpo_budget, grid: {budget.entropy_share: [0.001, 0.003]}},
          {label: GRPO, recipe: grpo_aggressive, grid: {learning_rate: [4.0e-4, 1.6e-3]}}]}""",
    "equal_tuning_batch": "{title: equal tuning, extends: equal_tuning}",
    "common": "{}",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with experiment files and no runs, as the working directory."""
    (tmp_path / "experiments").mkdir()
    for name, text in EXPERIMENTS.items():
        (tmp_path / "experiments" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(experiments, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fig2(place):
    """All runs of fig2; gives the experiment."""
    experiment = experiments.load("fig2")
    synthetic_runs.write_experiment(experiment)
    return experiment


def rewards_of(experiment, label):
    arm = next(arm for arm in experiment.arms if arm.label == label)
    files = [experiment.folder(arm, seed) / "metrics.jsonl" for seed in experiment.seeds]
    return np.array([[json.loads(line)["reward"] for line in file.read_text().splitlines()] for file in files])


# --- statistics, by hand ---------------------------------------------------------------------------------------------


def test_ema_is_the_weighted_mean_of_the_past():
    x, w = [1.0, 4.0, np.nan, 2.0], 0.5
    found = stats.ema(x, w)
    assert np.allclose(found[[0, 1, 3]], [1, (0.5 * 1 + 4) / 1.5, (0.125 + 0.25 * 4 + 2) / (0.125 + 0.25 + 1)])
    assert np.isnan(found[2])
    assert np.array_equal(stats.ema([3.0, 5.0], 0), [3, 5])
    with pytest.raises(ValueError, match="weight"):
        stats.ema(x, 1.0)


def test_mean_and_error_take_common_steps_alone():
    steps, mean, error = stats.mean_and_error([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: np.nan, 3: 1.0, 4: 5.0}])
    assert steps.tolist() == [1, 3]
    assert mean.tolist() == [2, 5]
    assert np.allclose(error, [1.0, 4.0])  # stdev √2 and 4√2, over √2
    steps, mean, error = stats.mean_and_error([{7: 0.25}])
    assert (steps.tolist(), mean.tolist()) == ([7], [0.25])
    assert np.isnan(error).all()
    assert not len(stats.mean_and_error([{1: 1.0}, {2: 1.0}])[0])


def test_spearman_averages_ties():
    assert stats.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    # without ties, 1 − 6 Σd² / n(n² − 1); d = 1, 1, 0, 1, 1
    assert stats.spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert stats.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(22.5))
    assert np.isnan(stats.spearman([1, 1, 1], [1, 2, 3]))
    assert stats.spearman([1, np.nan, 2, 3], [3, 0, 2, 1]) == pytest.approx(-1)


def test_bootstrap_covers_the_standard_error():
    rng = np.random.default_rng(3)
    seeds = list(rng.normal(size=(200, 1)))
    low, high = stats.bootstrap(seeds, lambda drawn: float(np.mean(drawn)))
    half = 1.96 * np.std(seeds, ddof=1) / np.sqrt(200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert (low, high) == stats.bootstrap(seeds, lambda drawn: float(np.mean(drawn)))
    wide = stats.bootstrap([rng.normal(size=(50, 1))], lambda drawn: float(np.mean(drawn[0])), steps=True)
    assert wide[0] < wide[1]
    assert np.isnan(stats.bootstrap(seeds[:1], np.mean)).all()


def test_a_target_is_not_reached_before_its_window_is_full():
    rewards, cost = [1.0] * 5 + [0.0] * 5 + [1.0] * 10, np.arange(1, 21) * 96
    assert stats.cost_to(0.5, rewards, cost) == 10 * 96
    assert stats.cost_to(0.6, rewards, cost) == 16 * 96  # the window of steps 7 to 16 holds six ones
    assert stats.cost_to(1.1, rewards, cost) == np.inf
    assert stats.cost_to(0.5, rewards[:9], cost[:9]) == np.inf
    assert stats.cost_to(0.5, [np.nan, *rewards], [0, *cost]) == 10 * 96


def test_what_became_of_a_run():
    rise_and_fall, flat, ruined = [0.3] + [0.6] * 30 + [0.1] * 10, [0.3] * 20, [0.02] * 30
    base = outcomes.base_accuracy([rise_and_fall, flat, [np.nan], []])
    assert base == pytest.approx(0.3)
    assert outcomes.collapsed(rise_and_fall, base)
    assert not outcomes.survived(rise_and_fall)
    assert not outcomes.usable(rise_and_fall, base)
    assert outcomes.usable(flat, base - 1e-9)
    assert outcomes.survived(ruined)  # nothing to fall from
    assert not outcomes.usable(ruined, base)


# --- figures and tables ----------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds(fig2, capsys):
    assert figures.main(["--name", "fig2", "--smooth", "off", "--out", "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"fig2.png", "fig2.svg", "fig2.json"}
    numbers = json.loads(Path("out/fig2.json").read_text())
    training, test = numbers["panels"]
    arm = next(arm for arm in training["arms"] if arm["label"] == "CAPO")
    rewards = rewards_of(fig2, "CAPO")
    assert np.allclose(arm["mean"], rewards.mean(0), rtol=1e-3)
    assert np.allclose(arm["se"], rewards.std(0, ddof=1) / np.sqrt(2), rtol=1e-3)
    assert (arm["x"][0], arm["x"][-1], arm["n"]) == (96, 9600, 2)
    assert test["arms"][0]["x"][:2] == [0, 3840]
    assert (numbers["seeds"], numbers["smoothing"]) == ("n = 2 seeds", None)
    assert "not smoothed" in Path("out/fig2.svg").read_text()
    assert not capsys.readouterr().err


def test_smoothing_is_applied_and_stated(fig2):
    data = curves.load(fig2, ())
    result = drawing.draw(data, *paper.fig1(data), 0.9)
    smoothed = [stats.ema(rewards, 0.9) for rewards in rewards_of(fig2, "CAPO")]
    arm = next(arm for arm in result.numbers["panels"][0]["arms"] if arm["label"] == "CAPO")
    assert np.allclose(arm["mean"], np.mean(smoothed, axis=0))
    assert "weight 0.9" in drawing.note(data, [paper.ACCURACY], 0.9)


def test_every_figure_is_made(place, fig2):
    for name in ("fig6", "fig7", "fig8", "stability", "transfer", "tuning_methods", "equal_tuning"):
        synthetic_runs.write_experiment(experiments.load(name))
    for name, entry in figures.FIGURES.items():
        if name == "stability_grid":
            continue
        if entry.scales:
            data = curves.load_scales(name, None, entry.keys, entry.partial)
        else:
            data = curves.load(experiments.load(name), entry.keys)
        result = entry.result(data, 0.9)
        assert result.figure is not None or result.table, name
        assert len(json.dumps(drawing.compact(result.numbers))) < drawing.LIMIT, name
        for panel in result.numbers.get("panels", ()):
            assert panel["arms"] and all(len(arm["x"]) for arm in panel["arms"]), (name, panel["title"])
        if result.figure:
            drawing.plt.close(result.figure)


@pytest.mark.parametrize("high", [0, 1])
def test_panels_that_share_an_axis_hold_every_curve(place, high):
    experiment = experiments.load("fig6")
    synthetic_runs.write_experiment(experiment)
    arm, rows = experiment.arms[high], synthetic_runs.metrics(experiment.arms[high], 2)
    rows[50]["reward"] = 5.0
    synthetic_runs.write_run(experiment.folder(arm, 2), arm, 2, rows)
    panels = [
        drawing.Panel("reward", one.label, shows=lambda line, label=one.label: line.arm.label == label)
        for one in experiment.arms
    ]
    figure = drawing.draw(curves.load(experiment, ()), panels, 2, 0.0).figure
    assert all(low == 0 and top > 5 for low, top in (axis.get_ylim() for axis in figure.axes))
    drawing.plt.close(figure)


def test_the_papers_points_are_drawn_at_its_scale_alone(place):
    for scale, marks in (("lab", 0), ("qwen2.5-math-7b", 3)):
        experiment = experiments.load("fig2", scale)
        synthetic_runs.write_experiment(experiment)
        data = curves.load(experiment, ())
        result = drawing.draw(data, *paper.fig1(data), 0.9)
        drawn = [line for line in result.figure.axes[0].get_lines() if line.get_marker() == "D"]
        assert len(drawn) == marks
        drawing.plt.close(result.figure)


def test_efficiency_by_hand(fig2):
    numbers = tables.efficiency(curves.load(fig2, ("test",))).numbers
    target = np.mean([outcomes.last_accuracy(list(one)) for one in rewards_of(fig2, "GRPO")])
    assert numbers["target"] == pytest.approx(target)
    plain, ours = numbers["arms"]["GRPO (A)"], numbers["arms"]["ReinCAPO"]
    assert plain["collapsed"] == plain["fell"] == plain["n"] == 2
    assert plain["costs"]["completions"]["value"] == np.inf
    by_hand = [stats.cost_to(target, one, np.arange(1, 101) * 96) for one in rewards_of(fig2, "ReinCAPO")]
    assert ours["costs"]["completions"]["value"] == min(by_hand)
    assert ours["collapsed"] == 0
    without = curves.load(experiments.load("fig5"), ())
    with pytest.raises(curves.FigureError, match="grpo_conservative"):
        tables.efficiency(without)


def test_calibration_finds_slope_ratio_and_rank():
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=400))
    assert calibration.slope(x, 3 * x**0.5) == pytest.approx(0.5)
    assert calibration.median_ratio(np.append(x, -1), np.append(3 * x, 9)) == pytest.approx(3)
    arm = experiments.Arm("a", "capo_aggressive")
    rows = synthetic_runs.metrics(arm, 2, steps=4)
    columns = {key: np.array([row[key] for row in rows]) for key in (*calibration.KEYS, *tables.TAKEN_KEYS)}
    columns["capo/step_scale"][:] = 0.5
    columns["capo/skipped_step"][1] = 1
    found = tables.pairs(curves.RunData(Path(), columns, [], {}), *calibration.PAIRS["m_F → KL"])
    assert np.allclose(found[:, 0], columns["capo/batch_policy_shift"][[0, 2, 3]] / 4)


def test_table5_has_intervals_around_its_values(fig2):
    entry = figures.FIGURES["table5"]
    result = tables.table5(curves.load(experiments.load("table5"), entry.keys))
    assert set(result.numbers["arms"]) == {"GRPO (A)", "CAPO"}
    for found in result.numbers["arms"]["CAPO"].values():
        assert found["low"] <= found["value"] <= found["high"]


def test_stability_marks_the_largest_rate_that_every_seed_survives(place):
    experiment = experiments.load("stability")
    for arm, seed in experiment.runs():
        if arm.recipe == "grpo_aggressive" or arm.value("learning_rate") == 3.2e-3:  # a searched grid has gaps
            synthetic_runs.write_run(experiment.folder(arm, seed), arm, seed)
    data = curves.load(experiment, figures.FIGURES["stability"].keys)
    assert not data.warnings
    _, numbers, _ = stability.rates_table(data)
    assert numbers["methods"]["GRPO"]["largest_survived"] == 8e-4
    assert list(numbers["methods"]["Dr.CAPO"]["rates"]) == [3.2e-3]


def test_tuning_takes_the_second_half(place):
    experiment = experiments.load("tuning_methods")
    synthetic_runs.write_experiment(experiment)
    result = tables.tuning(curves.load(experiment, tables.ACTS))
    low, high = result.numbers["methods"]["GRPO"].values()
    rows = [synthetic_runs.metrics(experiment.arms[0], seed) for seed in (2, 3)]
    assert low["reward"] == pytest.approx([np.mean([row["reward"] for row in one[50:]]) for one in rows])
    assert low["acted_on"] == pytest.approx([np.mean([row["capo/rejected_frac"] for row in one]) for one in rows])
    assert np.mean(high["reward"]) < np.mean(low["reward"])
    assert f"| learning_rate=0.0004 | **{np.mean(low['reward']):.3f}** |" in result.table
    assert "All runs have beta=0." in result.table


def test_long_curves_are_thinned(tmp_path):
    arm = {"label": "a", "n": 1, "x": np.arange(30_000.0), "mean": np.arange(30_000.0)}
    drawing.save(drawing.Result({"name": "x", "panels": [{"arms": [arm]}]}), "x", tmp_path)
    text = (tmp_path / "x.json").read_text()
    assert len(text) <= drawing.LIMIT + 1
    numbers = json.loads(text)
    assert numbers["panels"][0]["arms"][0]["x"][1] == numbers["every"]
    assert numbers["panels"][0]["arms"][0]["x"][-1] == 30_000  # 29999, rounded


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_seeds_are_stated_and_missing_arms_refused(fig2, capsys):
    first = fig2.folder(fig2.arms[4], 2) / "metrics.jsonl"
    text = first.read_text()
    first.write_text("\n".join(text.splitlines()[:50]) + "\n")  # unfinished: no part of a mean
    assert figures.main(["--name", "fig5", "--out", "out"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"warning: fig5: 1 of 6 runs .*capo_aggressive/lab/seed2\).*make experiment NAME=fig5", err)
    numbers = json.loads(Path("out/fig5.json").read_text())
    assert numbers["seeds"] == "n = 1 to 2 of 2 seeds"
    (fig2.folder(fig2.arms[4], 3) / "metrics.jsonl").unlink()
    assert figures.main(["--out", "all"]) == 2
    err = capsys.readouterr().err
    assert "error: fig5 is not drawn: 'CAPO' has no finished run; 2 of 6 runs are missing" in err
    assert "make experiment NAME=fig5 SCALE=lab SEEDS=2" in err
    assert Path("all/fig4.png").is_file()  # the others go on
    assert "Traceback" not in err


def test_nothing_to_draw_yet(place, capsys):
    assert figures.main([]) == 2
    assert "no run to draw yet" in capsys.readouterr().err
    assert figures.main(["--name", "fig2", "--seeds", "9"]) == 2
    assert "SEEDS is 1 to 2" in capsys.readouterr().err
    assert figures.main(["--name", "table1"]) == 2
    assert "make experiment NAME=table1" in capsys.readouterr().err


def test_seeds_of_different_settings_are_refused(fig2):
    arm = fig2.arms[0]
    config = fig2.folder(arm, 3) / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 3", "seed: 3\nnum_threads: 4"))  # makes no run another run
    assert curves.load(fig2, ()).lines
    config.write_text(text.replace("temperature: 0.9", "temperature: 1.0"))
    with pytest.raises(curves.FigureError, match=r"seed2 and .*seed3.*temperature: 0.9 / 1.0"):
        curves.load(fig2, ())


def test_broken_lines(fig2):
    path = fig2.folder(fig2.arms[0], 2) / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"step": 101, "rew')
    data = curves.load(fig2, ())
    assert data.warnings == [f"the last line of {path} was cut off and is left out"]
    assert len(data.lines[0].runs[0].rewards) == 100
    path.write_text("{broken\n" + lines)
    with pytest.raises(curves.FigureError, match=r"metrics.jsonl:1 is not a JSON object"):
        curves.load(fig2, ())
    path.write_text(lines.replace('"reward": 0', '"reward": "x", "y": 0', 1))
    with pytest.raises(curves.FigureError, match=r"metrics.jsonl:1 has 'x' for reward"):
        curves.load(fig2, ())


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff"])
def test_a_config_that_is_none(fig2, content, capsys):
    folder = fig2.folder(fig2.arms[0], 3)
    (folder / "config.yaml").write_bytes(content)
    assert figures.main(["--name", "fig2", "--out", "out"]) == 2
    assert f"error: fig2 is not drawn: {folder} is not a run folder" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(fig2, capsys):
    Path("out").write_text("")
    assert figures.main(["--name", "fig1", "--out", "out"]) == 2
    assert "error: fig1 is not drawn: out cannot be written (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--name=fig99", "--smooth=1", "--smooth=x"])
def test_command_line_is_checked(argument, place, capsys):
    with pytest.raises(SystemExit) as error:
        figures.main([argument])
    assert error.value.code == 2
    assert argument.split("=")[1] in capsys.readouterr().err


def test_a_scale_that_does_not_exist(place, capsys):
    assert figures.main(["--scale", "nope"]) == 2
    assert "there is no scale 'nope'; there are lab, lab_heavy" in capsys.readouterr().err
