"""Failure drills (`make test-faults`) of files and numbers: disks, checkpoints, metrics, gradients, rewards.

In all of them the same command afterwards ends as the uninterrupted run does: metrics, token records, parameters and
CAPO's moments, bit for bit. docs/reliability.md is the list for users.
"""

import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from processes import descendants, folder_of, goes_on, lines, train, until
from safetensors.torch import load_file

from open_r1_capo.runs.checkpoints import newest_complete
from open_r1_capo.runs.folder import RunFolder
from test_grpo import command, finished, metrics  # noqa: F401, `finished` is a fixture

# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, if we may mount one: `disk(bytes)` sets its size and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(count):
        change = ["-o", f"remount,size={count}"] if folder.is_mount() else ["-o", f"size={count}", "-t", "tmpfs"]
        done = subprocess.run(["mount", *change, "tmpfs", str(folder)], capture_output=True)
        return folder if done.returncode == 0 else None

    yield size
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_is_full_within_a_checkpoint(start, whole, disk, tmp_path, rng):
    """A tmpfs with room for one checkpoint and a part of the next; without one, a limit on the size of files."""
    one = sum(path.stat().st_size for path in (whole / "checkpoints" / "checkpoint-2").rglob("*") if path.is_file())
    root = disk(int(one * rng.uniform(1.15, 1.9))) if os.geteuid() == 0 else None
    process = start(root=root or tmp_path)
    folder = folder_of(root or tmp_path)
    if root is None:
        until(lambda: process.ended() or newest_complete(folder / "checkpoints")[0])
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10**5, 10**5))
    assert process.wait() == 2, process.text()
    what = "the disk is full" if root else "a file would be larger than ulimit -f allows"
    assert (
        process.sentence()
        == f"error: {what}: free some space, then run the same command to resume from the last complete checkpoint"
    )
    assert "Traceback" not in process.text()
    saved, notes = newest_complete(folder / "checkpoints")
    assert saved.name == "checkpoint-2"
    print(notes, lines(folder))
    assert [row["step"] for row in RunFolder(folder).metrics()] == list(range(1, lines(folder) + 1))
    if root:
        disk(16 * one)
    goes_on(start(root=root or tmp_path), folder, whole, known=f"resuming from {saved}")


# --- damaged files ---------------------------------------------------------------------------------------------------


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path, rng):
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 9)):
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


WAYS = {
    "truncated": ("model.safetensors", truncate),
    "flipped": (None, flip),
    "missing": (None, lambda path, rng: path.unlink()),
    "empty": ("capo/state.safetensors", lambda path, rng: path.write_bytes(b"")),
    "unsealed": ("complete.json", truncate),
}


def hurt(folder, way, rng):
    name, injure = WAYS[way]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "complete.json")
    path = folder / name if name else rng.choice(files)
    print(way, path)
    injure(path, rng)


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the uninterrupted run that has not ended."""
    folder = folder_of(tmp_path)
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_newest_checkpoint_is_damaged(start, unfinished, whole, rng, way):
    last = unfinished / "checkpoints" / "checkpoint-6"
    hurt(last, way, rng)
    process = start()
    goes_on(process, unfinished, whole, known=f"{last} is not usable: ")
    assert f"resuming from {last.with_name('checkpoint-4')}" in process.text()


def test_every_checkpoint_is_damaged(start, unfinished, whole, rng):
    for folder in sorted((unfinished / "checkpoints").glob("checkpoint-*")):
        hurt(folder, rng.choice(list(WAYS)), rng)
    process = start()
    goes_on(process, unfinished, whole, known="; resuming from the beginning")
    assert process.text().count(" is not usable: ") == 3


def test_the_last_line_of_the_metrics_is_cut_off(start, unfinished, whole, rng):
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-6")
    path = unfinished / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    kept = rng.choice([4, 5])
    path.write_bytes(b"".join(rows[:kept]) + rows[kept][: rng.randrange(1, len(rows[kept]) - 1)])
    goes_on(start(), unfinished, whole, known="resuming from")


# --- gradients and rewards -------------------------------------------------------------------------------------------


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def same_weights(folder, first, second):
    a, b = weights(folder, first), weights(folder, second)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_gradient_is_not_finite_once(start, tmp_path, rng):
    """That step is not taken and says so; the others are."""
    folder, bad = folder_of(tmp_path), rng.randrange(2, 6)
    process = start("save_steps=1", injury=f"nan_gradients({{{bad}}})")
    assert process.wait() == 0, process.text()
    assert [row["capo/skipped_step"] for row in metrics(folder)] == [float(step == bad) for step in range(1, 7)]
    assert [same_weights(folder, step, step + 1) for step in range(1, 6)] == [step + 1 == bad for step in range(1, 6)]
    assert all(value.isfinite().all() for value in weights(folder, 6).values())
    assert "warning" not in process.text()


def test_no_gradient_is_finite_any_more(start, tmp_path):
    """The policy stands still, and the user is told once."""
    folder = folder_of(tmp_path)
    process = start("max_steps=12", "save_steps=1", "completions_per_step=8", injury="nan_gradients(for_ever)")
    assert process.wait() == 0, process.text()
    assert [row["capo/skipped_step"] for row in metrics(folder)] == [0.0] + 11 * [1.0]
    assert same_weights(folder, 1, 12)
    assert process.text().count("warning: none of the last 10 updates was taken") == 1


def test_reward_workers_are_killed(finished, tmp_path, lab_policy, rng, anew):  # noqa: F811
    """Idle, busy or not yet ready: the rewards stay what they are."""
    folder, killed = folder_of(tmp_path), 0
    process = train(command(tmp_path, lab_policy), tmp_path / "log", anew)
    try:
        for step in range(5):
            until(lambda step=step: process.ended() or lines(folder) >= step)
            process.work(rng.uniform(0, 0.2))
            for pid in [pid for pid in descendants(process.pid) if rng.random() < 0.7]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        print(f"{killed} workers killed")
        goes_on(process, folder, finished[0])
    finally:
        process.kill().wait()
    assert killed
