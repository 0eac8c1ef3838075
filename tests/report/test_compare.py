"""Several runs on one page: which runs are a group, what a group's mean is, and how lines are told apart."""

import json
import re

import pytest

import pages
from open_r1_capo.report.compare import main as compare
from open_r1_capo.report.compare import mean_table


def data_of(page):
    """What a page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def titles(page):
    return [panel["title"] for panel in data_of(page)["panels"]]


def test_compare(tmp_path, capsys):
    runs = [
        pages.make_run(tmp_path / "capo_aggressive" / "lab" / "seed0"),
        pages.make_run(tmp_path / "grpo_aggressive,learning_rate=1e-3" / "lab" / "seed0", steps=30, rate=1e-3),
    ]
    out = tmp_path / "new" / "compare.html"
    assert compare(["--out", str(out), *map(str, runs)]) == 0
    page = out.read_text()
    assert [run["label"] for run in data_of(page)["runs"]] == ["capo_aggressive", "grpo_aggressive,learning_rate=1e-3"]
    panel = next(p for p in data_of(page)["panels"] if p["title"] == "Measured KL of the update (nats)")
    assert [(line["run"], line["colour"]) for line in panel["lines"]] == [(0, 0), (1, 1)]
    assert '<th scope="row">learning_rate</th><td>0.002</td><td>0.001</td>' in page
    assert '<th scope="row">seed</th>' not in page
    capsys.readouterr()
    for names, sentence in (
        ([runs[0]], "name two run folders or more"),
        ([runs[0], runs[1], runs[0].parent / ".." / "lab" / "seed0"], "is named twice"),
        ([runs[0], runs[0]], "is named twice"),
        ([runs[0], tmp_path / "nothing"], "run folder not found"),
    ):
        assert compare(["--out", str(tmp_path / "no.html"), *map(str, names)]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()


def test_seeds_of_one_recipe_are_a_group(tmp_path):
    seeds = [pages.make_run(tmp_path / "capo_aggressive" / "lab" / f"seed{seed}", seed=seed) for seed in range(3)]
    (seeds[2] / "metrics.jsonl").write_text("")  # has not finished a step
    other = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0", steps=30)
    out = tmp_path / "compare.html"
    assert compare(["--out", str(out), *map(str, (seeds[0], other, *seeds[1:]))]) == 0
    page = out.read_text()
    runs = data_of(page)["runs"]
    assert [(run["label"], run["colour"], run["style"].strip()) for run in runs] == [
        *((f"capo_aggressive · seed {seed}", 0, "thin") for seed in range(3)),
        ("capo_aggressive, mean of 2 seeds", 0, "thick"),
        ("grpo_aggressive · seed 0", 1, ""),
    ]
    assert '<th scope="col">capo_aggressive</th><th scope="col">grpo_aggressive</th>' in page
    rewards = [run["metrics"].get("reward") for run in runs]
    assert rewards[2] is None
    assert rewards[3] == pytest.approx([(a + b) / 2 for a, b in zip(*rewards[:2], strict=True)], rel=1e-4)
    assert '<th scope="row">seed</th><td>0, 1, 2</td><td>0</td>' in page
    assert '<th scope="row">recipe</th><td>capo_aggressive</td><td>grpo_aggressive</td>' in page


def test_the_mean_of_a_group_is_over_the_steps_that_all_seeds_have():
    first = {"step": [1, 2, 3], "reward": [0.2, None, 0.6], "test_stderr": [0.1, 0.1, 0.1], "more": [1, 1, 1]}
    second = {"step": [2, 3, 4], "reward": [0.4, 0.2, 0.9], "test_stderr": [0.1, 0.1, 0.1]}
    assert mean_table([first, second]) == {"step": [2, 3], "reward": [None, pytest.approx(0.4)]}
    assert mean_table([first, {}]) == mean_table([first, {"step": [4], "reward": [1]}]) == {}


def test_runs_of_one_recipe_and_seed_are_told_apart_by_their_paths(tmp_path):
    runs = [
        pages.make_run(tmp_path / name / "capo_aggressive" / "lab" / "seed0", rate=rate)
        for name, rate in (("slow", 1e-4), ("fast", 1e-2))
    ]
    assert compare(["--out", str(tmp_path / "compare.html"), *map(str, runs)]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert [run["label"] for run in data_of(page)["runs"]] == [
        f"{n}/capo_aggressive/lab/seed0" for n in ("slow", "fast")
    ]


def test_more_groups_than_colours_are_dashed(tmp_path):
    runs = [pages.make_run(tmp_path / f"capo_aggressive,x={i}" / "lab" / "seed0", rate=1 / (i + 1)) for i in range(9)]
    assert compare(["--out", str(tmp_path / "compare.html"), *map(str, runs)]) == 0
    looks = [(run["colour"], run["style"]) for run in data_of((tmp_path / "compare.html").read_text())["runs"]]
    assert len(set(looks)) == 9
    assert looks[8] == (looks[0][0], "dashed")
