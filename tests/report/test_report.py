"""The report of a run and the page of several, from the files of runs."""

import gzip
import json
import math
import re
import subprocess
import sys

import pytest

import pages
from open_r1_capo.report.__main__ import main
from open_r1_capo.report.compare import main as compare
from open_r1_capo.report.facts import time_breakdown, worst_steps
from open_r1_capo.report.page import embed, fit_metrics
from open_r1_capo.report.panels import MEAN, STEP_KL, TAKEN, metric_columns
from open_r1_capo.report.records import fit, read_records
from open_r1_capo.report.run import bounds
from open_r1_capo.runs.run import Run
from open_r1_capo.runs.summary import summarise, summary_lines


def data_of(page):
    """What a page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def titles(page):
    return [panel["title"] for panel in data_of(page)["panels"]]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    folder.mkdir(parents=True)
    rows = [
        {
            "step": i, "reward": 0.1 * (i % 4), "completions": 96 * i, "accepted_tokens": 900 * i, "grad_norm": 0.0,
            "entropy": 0.3, "capo/rejected_frac": 0.01 * i, "capo/scaled_frac": 0.0, "capo/measured_kl": 1e-3 * i,
            "capo/step_scale": 1.0, "capo/policy_shift/max": 0.0, "time/total": 0.5,
            **({"accuracy": 0.2 + 0.01 * i} if i % 5 == 0 else {}),
        }
        for i in range(1, 21)
    ]  # fmt: skip
    del rows[3]["reward"]  # a step on completions of an earlier one
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "rew')
    (folder / "config.yaml").write_text("recipe: capo_aggressive\nscale: lab\nseed: 0\nenvironment: {}\n")
    settings = {"recipe": "capo_aggressive", "scale": "lab", "seed": 0}
    accuracy = {"accuracy": 0.2, "standard_error": 0.01, "n": 500}
    summary = summarise(settings, Run(folder).metrics(), accuracy, accuracy)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_summary(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["completions"] == 1920
    assert (summary["accuracy_best"], summary["accuracy_best_step"]) == (pytest.approx(0.4), 20)
    assert summary["rejected_frac"] == {"mean": pytest.approx(0.105), "max": 0.2, "min": 0.01}
    assert len(summary["reward_windows"]) == 2
    assert summary["training_seconds"] == 10  # of all steps, whichever call took them


def test_a_collapse_is_said(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert "collapsed" not in "\n".join(summary_lines(Run(run_folder)))
    summary["accuracy_after"]["accuracy"] = 0.01
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "the policy collapsed" in "\n".join(summary_lines(Run(run_folder)))


def test_report_again_with_evaluations(run_folder, capsys):
    assert main([str(run_folder)]) == 0
    assert "held-out accuracy  0.200 ± 0.010 before" in capsys.readouterr().out
    plain = (run_folder / "report.html").read_text()
    assert "TEST, mean of" not in plain
    assert "kept no token records" in plain
    lines = [
        {"step": s, "completions": 96 * s, "accepted_tokens": 900 * s, "test": 0.5, "test_stderr": 0.01, "over": 8}
        for s in (20, 0, 10)
    ]
    (run_folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    assert "TEST, mean of 8 test sets" in titles(page)
    assert "training accepted tokens" in page
    assert data_of(page)["runs"][0]["tests"]["step"] == [0, 10, 20]


def test_an_empty_summary_is_a_run_that_has_not_ended(run_folder, capsys):
    (run_folder / "summary.json").write_text("{}")
    assert main([str(run_folder)]) == 0
    assert "the run has not ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", '{"step": 21, "reward": "x", "accuracy": "x", "time/total": "x", "capo/rejected_frac": []}'),
        ("metrics.jsonl", '{"step": 21, "reward": NaN, "completions": {}}'),
        ("metrics.jsonl", '{"step": "21"}'),
        ("eval.jsonl", '{"step": 20, "test": "x", "tasks": 3, "over": "x"}'),
        ("eval.jsonl", '{"test": 0.5}'),
    ],
)
def test_what_is_no_number_is_left_out(run_folder, tmp_path, name, line):
    """Of the curves, of the summary so far and of the page of several runs alike."""
    metrics = run_folder / "metrics.jsonl"
    metrics.write_text("".join(text + "\n" for text in metrics.read_text().splitlines()[:-1]))
    (run_folder / "summary.json").unlink()
    with (run_folder / name).open("a") as file:
        file.write(line + "\n")
    assert main([str(run_folder)]) == 0
    assert "1,920 completions" in (run_folder / "report.html").read_text()
    other = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0")
    assert compare(["--out", str(tmp_path / "compare.html"), str(run_folder), str(other)]) == 0


def test_a_run_without_a_reward_has_a_summary(run_folder):
    """Its end is not the place for a KeyError."""
    summary = json.loads((run_folder / "summary.json").read_text())
    summary |= {"reward_windows": [], "accuracy_after": None}
    for name in ("step_scale", "scaled_frac"):
        del summary[name]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "20 steps" in "\n".join(summary_lines(Run(run_folder)))


def test_columns():
    rows = [{"step": i, "reward": r, "learning_rate": 0.1, "capo/step_scale": s} for i, r, s in
            ((1, 0.2, 1.0), (2, math.nan, 0.5), (3, 0.4, 0.25))]  # fmt: skip
    columns = metric_columns([*rows, {"step": 4, "note": "text"}])
    assert columns["reward"] == [0.2, None, 0.4, None]
    assert columns[MEAN] == [0.2, None, 0.3, None]
    assert columns[TAKEN] == [0.1, 0.05, 0.025, None]
    assert metric_columns([{"step": 1, "learning_rate": 0.1, "budget/alpha": 0.3}])[TAKEN] == [0.3]
    assert "note" not in columns


def test_times_are_shares_of_the_total():
    columns = {"time/total": [2.0, 1.0], "time/generate": [1.0, None], "time/train": [1.0, 1.0]}
    rows = {row["name"]: (row["seconds"], row["share"]) for row in time_breakdown(columns)}
    assert rows == {
        "generation": (0.5, pytest.approx(1 / 3)), "train": (1.0, pytest.approx(2 / 3)), "total": (1.5, 1.0)
    }  # fmt: skip
    assert time_breakdown({}) == []


def test_worst_steps():
    columns = {
        "step": [1, 2, 3, 4, 5, 6, 7], STEP_KL: [0.1, 0.5, 0.2, 0.0, None, 0.3, 0.1],
        "reward": [0.6, 0.6, 0.6, 0.6, 0.0, 0.0, 0.0],
    }  # fmt: skip
    kl, fall = worst_steps(columns)
    assert kl["steps"] == [(2, 0.5), (6, 0.3), (3, 0.2)]
    assert fall["steps"][0] == (4, pytest.approx(-0.6))  # the step after whose update the reward was gone
    assert worst_steps({"step": [1]}) == []


def test_runs_without_capo_or_cut_off(tmp_path, capsys):
    """Whatever is missing, the page is written, and says how far the run is."""
    folder = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0", steps=10, planned=40)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in row.items() if not k.startswith("capo/") and k != "accepted_tokens"} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain) + '{"st')
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("mask", "off"))
    (folder / "eval.jsonl").write_text((folder / "eval.jsonl").read_text()[:-9])
    assert main([str(folder)]) == 0
    assert "the run has not ended" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "it was at step 10 of 40" in page
    assert "capo.mode is off" in page
    assert "Policy shift m_F (nats)" not in titles(page)
    assert data_of(page)["runs"][0]["tests"]["step"] == [0]
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink()
    assert main([str(folder)]) == 0
    assert "has not finished a step yet" in (folder / "report.html").read_text()


def test_no_runs_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "run folder not found" in capsys.readouterr().err
    assert main([]) == 2


def test_records_are_read_merged_and_ordered(tmp_path):
    for name in ("most_rejected", "largest_kl"):
        pages.write_record(tmp_path, name, pages.make_record(7))
    pages.write_record(tmp_path, "first", pages.make_record(1))
    (tmp_path / "tokens" / "step3.json.gz").write_bytes(b"no gzip")
    short = pages.make_record(4)
    del short["completions"][2]["weight"][-1]
    pages.write_record(tmp_path, "step4", short)
    records, notes = read_records(Run(tmp_path), [])
    assert [(r["step"], sorted(r["labels"])) for r in records] == [
        (1, ["first step"]), (7, ["largest measured KL", "most tokens rejected"])
    ]  # fmt: skip
    assert len(notes) == 2
    assert "tokens/step3.json.gz cannot be read" in notes[0]
    assert "weight does not have a value for every token" in notes[1]


def test_records_of_every_step_show_the_interesting_ones(tmp_path):
    for step in range(1, 13):
        pages.write_record(tmp_path, f"step{step}", pages.make_record(step, completions=1))
    records, notes = read_records(Run(tmp_path), [11, 12])
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 11, 12]
    assert notes == ["12 records were kept; at most 8 of them are on this page."]


def test_records_fit_a_budget(tmp_path):
    record = pages.make_record(1, completions=30)
    record["completions"][29]["policy_shift"][0] = math.nan
    records = [record | {"labels": []}, pages.make_record(2, completions=30) | {"labels": []}]
    fitted = fit(records, 60_000)
    assert len(json.dumps(fitted)) < 60_000
    for each in fitted:
        kept = each["completions"]
        assert 5 < len(kept) < 30 == each["of"]
        rejected = [c["weight"].count(0.0) for c in kept]
        assert rejected == sorted(rejected, reverse=True)
    whole = fit(records, 10**7)[0]["completions"]
    assert next(c for c in whole if c["position"] == 29)["policy_shift"][0] is None
    assert fit(records, 0)[0]["completions"] == []


def test_long_runs_fit(tmp_path):
    table = {name: list(range(5000)) for name in ("step", "reward", "other")}
    kept, note = fit_metrics(table, {"step", "reward"}, set(), limit=60_000)
    assert set(kept) == {"step", "reward"}
    assert "Only the metrics of the panels" in note
    kept, note = fit_metrics(table, {"step", "reward"}, {4321}, limit=20_000)
    assert {0, 4321, 4999} <= set(kept["step"])
    assert len(embed(kept)) < 21_000
    assert "one of 3 steps is drawn" in note


def test_nothing_of_a_run_becomes_html(tmp_path):
    folder = pages.make_run(tmp_path / "capo_aggressive" / "lab" / "seed0")
    pages.write_record(folder, "first", pages.make_record(1, evil=pages.EVIL))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"system_prompt: '{pages.EVIL}'\n")
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("</script>") == 2  # the data's and the script's own
    assert "<img" not in page
    assert "{{" not in page
    assert data_of(page)["records"][0]["completions"][0]["tokens"][-1] == pages.EVIL


def test_a_page_stays_below_five_megabytes(tmp_path):
    folder = pages.make_run(tmp_path / "capo_aggressive" / "lab" / "seed0")
    pages.write_record(folder, "first", pages.make_record(1, completions=96, length=400))
    pages.write_record(folder, "largest_kl", pages.make_record(2, completions=96, length=400, evil="<" * 20))
    assert main([str(folder)]) == 0
    assert 3_000_000 < (folder / "report.html").stat().st_size <= 5_000_000
    for record in data_of((folder / "report.html").read_text())["records"]:
        assert 0 < len(record["completions"]) < record["of"] == 96


def test_records_that_are_no_json(tmp_path):
    (tmp_path / "tokens").mkdir()
    for name, content in (("step1", b"[1]"), ("step2", b"{"), ("step3", b'{"step": 1}'), ("step4", b"\xff")):
        with gzip.open(tmp_path / "tokens" / f"{name}.json.gz", "wb") as file:
            file.write(content)
    records, notes = read_records(Run(tmp_path), [])
    assert records == []
    assert len(notes) == 4


def test_results_are_compared(run_folder, tmp_path):
    """What a run ended with, and how far one is that has not ended."""
    other = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0", steps=10, planned=40)
    assert compare(["--out", str(tmp_path / "compare.html"), str(run_folder), str(other)]) == 0
    page = (tmp_path / "compare.html").read_text()
    first, second = re.findall(r"<tr>.*?</tr>", page.split('id="worst"')[1].split("</section>")[0])[1:]
    assert re.findall(r"<td>(.*?)</td>", first) == [
        "20", "1,920", "0.18 → 0.1333", "0.2 → 0.2", "0.4", "–", "10.50% / 20.00%", "1.1e-02 / 2.0e-02", "1", "10"
    ]  # fmt: skip
    assert "capo_aggressive</th>" in first
    assert re.findall(r"<td>(.*?)</td>", second)[3:6] == ["–", "–", "0.35 / 0.4"]
    assert "grpo_aggressive: This run has not ended: it was at step 10 of 40" in page


@pytest.mark.parametrize(
    ("capo", "policy", "objective"),
    [
        ({"mode": "mask", "max_policy_shift": 1.0, "max_objective_shift": 0.1}, 1.0, [-0.1, 0.1]),
        ({"mode": "scale", "max_policy_shift": 1e-5, "max_objective_shift": math.inf}, 1e-5, [None, None]),
        ({"max_objective_shift": 0.1, "min_objective_shift": -math.inf}, None, [None, 0.1]),
        ({"mode": "observe"}, None, [None, None]),
        (None, None, [None, None]),
    ],
)
def test_bounds_are_those_in_the_settings(capo, policy, objective):
    assert bounds({"capo": capo}) == {"policy": policy, "objective": objective}


def test_a_broken_line_in_the_middle_is_said(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    (run_folder / "metrics.jsonl").write_text("\n".join([*lines[:6], lines[6][:30], *lines[7:]]))
    assert main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    assert "Line 7 of metrics.jsonl is broken" in page
    assert data_of(page)["runs"][0]["metrics"]["step"] == [1, 2, 3, 4, 5, 6]


def test_a_page_that_cannot_be_written_is_one_sentence(run_folder, tmp_path, capsys):
    other = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0")
    (run_folder / "report.html").mkdir()
    no_folder = ["--out", str(run_folder / "config.yaml" / "compare.html"), str(run_folder), str(other)]
    for command, arguments in ((main, [str(run_folder)]), (compare, no_folder)):
        assert command(arguments) == 2
        assert re.fullmatch(r"error: .* cannot be read or written \(.*\)\n", capsys.readouterr().err)


def test_pages_are_made_without_torch():
    """Nothing that takes seconds to import."""
    heavy = "torch", "transformers", "trl", "datasets", "numpy", "hydra", "omegaconf"
    program = (
        f"import sys; from open_r1_capo.report import __main__, compare; print(sys.modules.keys() & {set(heavy)})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
