"""What a reader gets of a run's folder: finished or not, of an earlier version, being written, or broken."""

import gzip
import json

import pytest

import pages
from open_r1_capo.runs.checkpoints import seal
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.records import read_record
from open_r1_capo.runs.run import SUMMARY, Run, RunError, read_lines, run_of, write_atomically

# as the first versions wrote it: without most of today's keys
EARLIER = "recipe: capo_aggressive\nscale: lab\nseed: 3\nlearning_rate: 2.0e-05\ncapo:\n  max_policy_shift: .inf\n"


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "capo_aggressive" / "lab" / "seed3")
    run.path.mkdir(parents=True)
    run.config_file.write_text(EARLIER)
    return run


def test_a_run_of_an_earlier_version_is_read(run):
    assert run.settings["learning_rate"] == 2e-5
    assert run.settings["capo"] == {"max_policy_shift": float("inf")}
    assert run.label == "capo_aggressive · lab · seed 3"
    assert run.environment == {}
    assert run.max_steps is None
    assert (run.summary, run.metrics(), run.rewards(), run.evaluations(), run.checkpoints()) == (None, [], [], [], [])


def test_settings_come_without_the_environment(run):
    run.config_file.write_text(EARLIER + "max_steps: 40\nenvironment:\n  commit: abc\n")
    assert "environment" not in run.settings
    assert run.environment == {"commit": "abc"}
    assert run.max_steps == 40
    run.config_file.write_text(EARLIER + "max_steps: -1\n")  # TRL's: as many as there are epochs
    assert run.max_steps is None


@pytest.mark.parametrize("mode", ["off", "'off'", "false"])
def test_mode_off_is_off_however_yaml_reads_it(run, mode):
    run.config_file.write_text(EARLIER + f"  mode: {mode}\n")
    assert run.settings["capo"]["mode"] == "off"
    ours = run.settings
    ours["capo"]["mode"] = "off"
    assert RunFolder(run.path).differences(ours) == {}


@pytest.mark.parametrize("content", [None, "", "a: [", "- 1\n", "seed: 0\n", "\x00", "recipe: 2024-13-45\n"])
def test_a_folder_of_something_else_is_no_run(run, content):
    run.config_file.unlink() if content is None else run.config_file.write_text(content)
    with pytest.raises(RunError, match="is not a run folder"):
        _ = run.settings
    with pytest.raises(RunError, match="run folder not found"):
        _ = Run(run.path / "nothing").label


def test_a_run_that_is_being_written_is_read_so_far(run):
    folder = RunFolder(run.path)
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "reward": None if step == 2 else step / 10})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "rew')
    run.summary_file.with_name("summary.json.part").write_text('{"recipe": ')
    assert run.rewards() == [0.1, 0.3]
    assert read_lines(run.metrics_file).last
    assert run.summary is None
    folder.trim_metrics(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert read_lines(run.metrics_file).broken is None


@pytest.mark.parametrize("line", ["", '{"step": 3', "[3]", '{"step": 3.0}', '{"reward": 1}'])
def test_lines_end_at_a_broken_one_which_is_named(run, line):
    run.metrics_file.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{line}\n{{"step": 4}}\n')
    lines = read_lines(run.metrics_file)
    assert (lines.rows, lines.broken, lines.last) == ([{"step": 1}, {"step": 2}], 3, False)
    assert run.metrics() == lines.rows


def test_evaluations_are_in_order_and_a_step_measured_again_counts_once(run):
    folder = RunFolder(run.path)
    for step, test in ((0, 0.1), (10, 0.2), (20, 0.3), (10, 0.4)):  # resumed from step 10
        folder.append_evaluation({"step": step, "test": test})
    assert run.evaluations() == [{"step": 0, "test": 0.1}, {"step": 10, "test": 0.4}]
    run.evaluations_file.write_text('{"step": 20}\n{"step": 0}\n')
    assert [row["step"] for row in run.evaluations()] == [0, 20]


def test_a_summary_counts_when_it_is_complete(run):
    write_atomically(run.summary_file, json.dumps(dict.fromkeys(SUMMARY)))
    assert run.summary.keys() == set(SUMMARY)
    assert [path.name for path in run.path.glob("*.part")] == []
    write_atomically(run.summary_file, json.dumps(dict.fromkeys(SUMMARY[1:])))
    assert run.summary is None


def test_checkpoints_are_the_complete_ones_and_know_their_run(run):
    for step in (20, 3, 100):
        folder = run.checkpoint_folder / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if step != 100:
            seal(folder)
    (run.checkpoint_folder / "checkpoint-best").mkdir()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-3", "checkpoint-20"]
    assert run_of(run.checkpoints()[0]).path == run.path.resolve()
    assert run_of(run.path.parent) is None


def test_a_record_is_read_whole_or_refused(run):
    record = pages.make_record(7)
    del record["completions"][0]["entropy"]
    pages.write_record(run.path, "first", record)
    path = run.records_folder / "first.json.gz"
    assert read_record(path) == record
    with pytest.raises(ValueError, match="entropy does not have a value for every token"):
        read_record(path, ("entropy",))
    for change, sentence in (
        ({"step": None}, "it has no step"),
        ({"completions": {}}, "it has no completions"),
        ({"completions": [{"tokens": [1]}]}, "a completion has no tokens"),
        ({"completions": [{"tokens": []}]}, "a completion has no advantage"),
        ({"completions": [{"tokens": ["a"], "advantage": 1, "weight": ["x"]}]}, "policy_shift does not have a value"),
    ):
        pages.write_record(run.path, "first", record | change)
        with pytest.raises(ValueError, match=sentence):
            read_record(path)
    whole = gzip.compress(json.dumps(record).encode())
    for content in (whole[:-30], whole[:40], b"", whole[:30] + b"\xff" * 20 + whole[50:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="."):
            read_record(path)
