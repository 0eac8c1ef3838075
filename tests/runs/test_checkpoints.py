"""When a checkpoint is complete, and with how many processes it goes on."""

import json

import pytest

from open_r1_capo.runs import checkpoints
from open_r1_capo.runs.checkpoints import (
    SEAL,
    CheckpointError,
    check_processes,
    checkpoint_folders,
    find_damage,
    newest_complete,
    seal,
    step_of,
)


@pytest.fixture
def checkpoint(tmp_path):
    """A sealed one of two processes."""
    folder = tmp_path / "checkpoints" / "checkpoint-20"
    (folder / "capo").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(100)))
    (folder / "capo" / "state.safetensors").write_bytes(b"state")
    seal(folder, processes=2)
    return folder


def test_a_sealed_folder_is_complete(checkpoint):
    assert find_damage(checkpoint) is None
    assert step_of(checkpoint) == 20
    assert {path.name for path in checkpoint.iterdir()} == {"model.safetensors", "capo", SEAL}
    (checkpoint / "more").write_text("whoever looks at it may leave something")
    assert find_damage(checkpoint) is None
    seal(checkpoint)  # again, without listing itself
    assert set(json.loads((checkpoint / SEAL).read_text())["files"]) == {
        "model.safetensors", "capo/state.safetensors", "more"
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": ["a"]}'])
def test_a_seal_that_cannot_be_read_is_damage(checkpoint, content):
    (checkpoint / SEAL).write_text(content)
    assert find_damage(checkpoint) == f"{SEAL} is unreadable"
    (checkpoint / SEAL).unlink()
    assert find_damage(checkpoint) == "it was cut off while being written"


def test_a_file_that_differs_is_damage(checkpoint):
    weights, state = checkpoint / "model.safetensors", checkpoint / "capo" / "state.safetensors"
    weights.write_bytes(bytes(range(1, 101)))  # as long as before
    assert find_damage(checkpoint) == "model.safetensors has changed or is cut off"
    state.unlink()
    weights.write_bytes(bytes(range(100)))
    assert find_damage(checkpoint) == "capo/state.safetensors is missing"
    state.mkdir()
    assert find_damage(checkpoint) == "capo/state.safetensors is missing"


def test_large_files_are_compared_by_size(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoints, "HASHED_BYTES", 50)
    seal(checkpoint)
    assert json.loads((checkpoint / SEAL).read_text())["files"]["model.safetensors"] == {"bytes": 100}
    (checkpoint / "model.safetensors").write_bytes(bytes(99))
    assert find_damage(checkpoint) == "model.safetensors has changed or is cut off"


def test_the_newest_complete_one_is_resumed_from(checkpoint):
    folder = checkpoint.parent
    for name in ("checkpoint-100", "checkpoint-3", "checkpoint-tmp", "checkpoint-"):
        (folder / name).mkdir()
    seal(folder / "checkpoint-3")
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    path, skipped = newest_complete(folder)
    assert path == checkpoint
    assert skipped == [f"{folder / 'checkpoint-100'} is not usable: it was cut off while being written"]
    assert newest_complete(folder / "nothing") == (None, [])


def test_processes_are_those_of_the_checkpoint(checkpoint):
    assert check_processes(checkpoint, 2, allowed=False) is None
    with pytest.raises(CheckpointError, match="was written by 2 processes, and this launch has 4: .* launch 2, or"):
        check_processes(checkpoint, 4, allowed=False)
    assert "it is not exactly the uninterrupted run" in check_processes(checkpoint, 4, allowed=True)
    (checkpoint / "global_step20").mkdir()
    with pytest.raises(CheckpointError, match="DeepSpeed's shards"):
        check_processes(checkpoint, 4, allowed=True)
    (checkpoint / SEAL).write_text('{"files": {}}')  # of the first versions
    assert check_processes(checkpoint, 4, allowed=False) is None
