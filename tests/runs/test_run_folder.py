"""Whose a run's folder is: a second process, however it is started, leaves the first one's as it is."""

import json
import subprocess
import sys

import pytest

from open_r1_capo.runs import folder as run_folder
from open_r1_capo.runs.folder import RunFolder, RunFolderError
from open_r1_capo.runs.run import SUMMARY

SETTINGS = {"recipe": "capo_aggressive", "learning_rate": 1.0}
ANOTHER = """
import sys, time
from pathlib import Path
from open_r1_capo.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).claim({"recipe": "capo_aggressive", "learning_rate": 1.0}, False):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "capo_aggressive" / "lab" / "seed0"


@pytest.fixture
def claimed_by_another(path):
    """A folder that another process trains in, with what it has written."""
    process = subprocess.Popen([sys.executable, "-c", ANOTHER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    yield path
    process.kill()
    process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_use_is_left_alone(claimed_by_another, overwrite):
    with pytest.raises(RunFolderError, match="another process is training in"):
        RunFolder(claimed_by_another).claim(SETTINGS, overwrite).__enter__()
    names = sorted(path.name for path in claimed_by_another.iterdir())
    assert names == ["config.yaml", "metrics.jsonl"]
    assert [path.name for path in claimed_by_another.parent.iterdir()] == ["seed0"]


def test_of_two_that_start_at_once_one_goes_on(path, monkeypatch):
    """The second one looks at the folder before the first one has made it, and makes it afterwards."""
    first, environment = RunFolder(path), run_folder.environment
    claim = first.claim(SETTINGS, False)

    def slow():
        monkeypatch.setattr(run_folder, "environment", environment)
        claim.__enter__()
        return environment()

    monkeypatch.setattr(run_folder, "environment", slow)
    with pytest.raises(RunFolderError, match="another process is training in"):
        RunFolder(path).claim(SETTINGS, False).__enter__()
    assert first.config_file.is_file()
    assert [path.name for path in path.parent.iterdir()] == ["seed0"]
    with pytest.raises(RunFolderError, match="another process is training in"):
        RunFolder(path).claim(SETTINGS, False).__enter__()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_can_be_taken(path, overwrite):
    path.mkdir(parents=True)
    with RunFolder(path).claim(SETTINGS, overwrite) as (resume, notes):
        assert (resume, notes) == (None, [])
        assert [path.name for path in path.iterdir()] == ["config.yaml"]


def test_a_new_folder_can_be_read_like_its_neighbours(path):
    with RunFolder(path).claim(SETTINGS, False):
        assert path.stat().st_mode == path.parent.stat().st_mode


@pytest.mark.parametrize("end", [b'{"st', b"7\n", b"\xff\xfe\x00", b'{"reward": 1}\n', b'{"step": "2"}\n'])
def test_metrics_end_at_the_first_line_that_is_none(path, end):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + end)
    assert RunFolder(path).metrics() == [{"step": 1}]
    (path / "metrics.jsonl").rename(path / "eval.jsonl")
    assert RunFolder(path).evaluations() == [{"step": 1}]


@pytest.mark.parametrize("content", ["{}", '{"steps": 1}', "[1]", '{"recipe": "capo_agg'])
def test_a_summary_has_all_that_is_shown_of_it(path, content):
    path.mkdir(parents=True)
    (path / "summary.json").write_text(content)
    assert RunFolder(path).summary is None
    (path / "summary.json").write_text(json.dumps(dict.fromkeys(SUMMARY)))
    assert RunFolder(path).summary.keys() == set(SUMMARY)
