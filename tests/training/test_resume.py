"""What a run may go on from: its own number of processes, a disk with room; and a policy that stands still says so."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from open_r1_capo import grpo
from open_r1_capo.runs.checkpoints import newest_complete, seal
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.training import callbacks, run, run_trainer
from open_r1_capo.training.callbacks import RunCallback
from test_grpo import command, refused


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, lab_policy):
    """The outputs of a run of four steps that has its checkpoint of step 2 and says that two processes wrote it."""
    root = tmp_path_factory.mktemp("stopped")
    assert grpo.main(arguments(root, lab_policy)) == 0
    folder = root / "capo_aggressive" / "lab" / "seed0"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    seal(folder / "checkpoints" / "checkpoint-2", processes=2)
    return root


def arguments(root, policy, *more):
    return command(root, policy, "max_steps=4", "reward_funcs=[tag_count]", *more)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_another_number_of_processes_is_refused(stopped, lab_policy, capsys, monkeypatch):
    before = contents(stopped)
    monkeypatch.setattr(run, "make_trainer", None)  # nothing is loaded for a run that will not be
    error = refused(capsys, *arguments(stopped, lab_policy))
    assert "checkpoint-2 was written by 2 processes, and this launch has 1: they would draw other completions" in error
    assert "launch 2, or accept that with allow_other_processes=true" in error
    assert contents(stopped) == before


def test_another_number_of_processes_is_accepted(stopped, lab_policy, capsys, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert grpo.main(arguments(tmp_path, lab_policy, "allow_other_processes=true")) == 0
    assert "this launch has 1: from here on it is not exactly the uninterrupted run" in capsys.readouterr().err
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0" / "checkpoints" / "checkpoint-4"
    assert json.loads((folder / "complete.json").read_text())["processes"] == 1


def test_deepspeeds_shards_fit_one_number(stopped, lab_policy, capsys, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0" / "checkpoints" / "checkpoint-2"
    (folder / "global_step2").mkdir()
    error = refused(capsys, *arguments(tmp_path, lab_policy, "allow_other_processes=true"))
    assert "DeepSpeed's shards fit their own number alone, so launch 2" in error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 816512 vs 816404"),
            "the disk is full",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (RuntimeError("I/O error: File too large (os error 27)"), "a file would be larger than ulimit -f allows"),
    ],
)
def test_no_room_is_said_in_a_sentence(error, sentence):
    found = run.explain(error)
    assert (
        found == f"{sentence}: free some space, then run the same command to resume from the last complete checkpoint"
    )


def test_a_policy_that_stands_still_is_told_once(tmp_path, capsys):
    """Ten updates in a row that were not taken: one warning, and again only after an update was taken."""
    args = state = type("", (), {"is_world_process_zero": True, "max_steps": 100, "global_step": 0})()
    callback = RunCallback(None, RunFolder(tmp_path), None)
    told = []
    for skipped in [1] * 9 + [0] + [1] * 15 + [0] + [1] * 10:
        state.global_step += 1
        callback.on_log(args, state, None, logs={"loss": 0.0, "capo/skipped_step": float(skipped)})
        if f"none of the last {callbacks.SKIPPED} updates was taken" in capsys.readouterr().err:
            told.append(state.global_step)
    assert told == [20, 36]


def test_no_checkpoint_goes_before_the_next_is_complete(build, monkeypatch):
    """A run dies just before it seals one, beside a torn one: of two that are kept, the complete one is there."""
    trainer = build({"mode": "observe"}, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=2)
    folder, whole = Path(trainer.args.output_dir), run_trainer.seal

    def tear_or_die(path, processes):
        if path.name == "checkpoint-2":
            raise KeyboardInterrupt
        whole(path, processes)
        (folder / "checkpoint-9").mkdir()  # as a killed run leaves one behind

    monkeypatch.setattr(run_trainer, "seal", tear_or_die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert newest_complete(folder)[0].name == "checkpoint-1"
    monkeypatch.setattr(run_trainer, "seal", whole)
    trainer._save_checkpoint(trainer.model, None)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-2"}
    assert newest_complete(folder)[0].name == "checkpoint-2"
