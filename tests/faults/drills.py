"""Failure drills (`make test-faults`): a real run is injured from outside, and what is left is looked at.

In all of them the same command afterwards ends as the uninterrupted run does: metrics, token records, parameters and
CAPO's moments, bit for bit. docs/reliability.md is the list for users.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from processes import PATIENCE, Process, Ranks, Server, cpu_seconds, descendants, free_port, train, until

from open_r1_capo.checkpoint import damage, newest_complete
from open_r1_capo.generation.choice import VLLM_PYTHON
from open_r1_capo.run_folder import RunFolder
from test_grpo import command, finished, metrics, same_run
from test_preemption import signalled, test_a_stopped_run_resumes_bit_for_bit  # SIGTERM and SIGUSR1 in mid-step

__all__ = ["finished", "signalled", "test_a_stopped_run_resumes_bit_for_bit"]

TIMES = int(os.environ.get("TIMES") or 1)
MOMENTS = os.environ.get("MOMENTS") or str(random.randrange(10**6))
ANEW = not os.environ.get("FORKED")  # the first time, runs are started by a new interpreter
CHEAP = "reward_funcs=[tag_count]"  # needs no worker processes, and varies as well


@pytest.fixture(params=range(TIMES), autouse=True)
def repetition(request):
    return request.param


@pytest.fixture
def rng(request):
    print(f"MOMENTS={MOMENTS} repeats these moments")
    return random.Random(f"{MOMENTS}/{request.node.name}")


@pytest.fixture
def anew(repetition):
    return ANEW and repetition == 0


@pytest.fixture
def start(tmp_path, lab_policy, anew):
    """Start the run of this test; whatever still lives at the test's end is killed."""
    started = []

    def start(*overrides, root=tmp_path, injury=None):
        started.append(train(command(root, lab_policy, CHEAP, *overrides), tmp_path / "log", anew, injury))
        return started[-1]

    yield start
    for process in started:
        process.kill().wait()


@pytest.fixture
def serve(tmp_path, lab_policy):
    started = []

    def serve(port=None):
        started.append(Server(lab_policy, tmp_path / "server.log", port))
        return started[-1]

    yield serve
    for server in started:
        server.kill().wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lab_policy):
    """The folder of the uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    process = train(command(root, lab_policy, CHEAP), root / "log", ANEW)
    assert process.wait() == 0, process.text()
    return folder_of(root)


def folder_of(root):
    return root / "capo_aggressive" / "lab" / "seed0"


def lines(folder):
    return len(RunFolder(folder).read_metrics())


def reached(process, folder, step):
    """Wait until a run has logged a step, or has ended."""
    until(lambda: process.ended() or lines(folder) >= step)
    assert not process.ended(), process.text()


def goes_on(process, folder, reference, *, known=""):
    """The same command finishes the run as if nothing had happened."""
    assert process.wait() == 0, process.text()
    assert known in process.text()
    same_run(folder, reference)


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_the_trainer_is_killed(start, whole, tmp_path, rng):
    folder, step = folder_of(tmp_path), rng.randrange(5)
    process = start()
    until(lambda: (folder / "config.yaml").is_file())
    reached(process, folder, step)
    assert process.work(rng.uniform(0, 0.3)).kill().wait() == -signal.SIGKILL, process.text()
    print(f"killed after step {lines(folder)}")
    saved, _ = newest_complete(folder / "checkpoints")
    again = start()
    goes_on(again, folder, whole, known=f"going on from {saved}" if saved else "")


def test_the_trainer_is_killed_while_it_writes_a_checkpoint(start, whole, tmp_path, rng):
    folder = folder_of(tmp_path)
    for _ in range(20):  # it may be faster than we see
        process, files = start(), rng.randrange(1, 12)
        torn = stopped_in_a_checkpoint(process, folder / "checkpoints", files)
        process.kill().wait()
        if torn:
            break
        shutil.rmtree(folder)
    assert damage(torn) == "it was cut off while being written"
    saved, _ = newest_complete(folder / "checkpoints")
    known = f"{torn} is not usable: it was cut off while being written; going on from {saved or 'the beginning'}"
    goes_on(start(), folder, whole, known=known)


def stopped_in_a_checkpoint(process, checkpoints, files):
    """Stop a run within a checkpoint of which some files are there; that checkpoint's folder, or None."""

    def unsealed():
        for path in checkpoints.glob("checkpoint-*"):
            names = os.listdir(path)
            if len(names) >= files and "complete.json" not in names:
                return path
        return None

    while not process.ended():
        until(lambda: process.ended() or unsealed(), pause=0.0005)
        process.kill(signal.SIGSTOP)
        if path := unsealed():
            return path
        process.kill(signal.SIGCONT)
    return None


# --- ranks -----------------------------------------------------------------------------------------------------------

TWO = ("max_steps=4", "save_steps=1", CHEAP)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory, lab_policy):
    root = tmp_path_factory.mktemp("two")
    ranks = Ranks(command(root, lab_policy, *TWO), root / "log", ANEW)
    assert set(ranks.wait()) == {0}, ranks.log.read_text()
    return folder_of(root)


def test_one_rank_of_two_is_killed(start, whole_of_two, tmp_path, lab_policy, rng, anew):
    """The other one ends soon with an error; one process alone may not go on, two do."""
    folder, arguments, rank = folder_of(tmp_path), command(tmp_path, lab_policy, *TWO), rng.randrange(2)
    ranks = Ranks(arguments, tmp_path / "ranks.log", anew)
    try:
        until(lambda: ranks.ended() or lines(folder) >= 1)
        until(lambda: newest_complete(folder / "checkpoints")[0])
        victim, moment = ranks.pid(rank), rng.uniform(0, 0.2)
        before = cpu_seconds(victim)
        until(lambda: cpu_seconds(victim) - before >= moment)
        os.kill(victim, signal.SIGKILL)
        codes = ranks.wait(seconds=120)
        assert all(code not in (0, 85) for code in codes), ranks.log.read_text()
        saved, _ = newest_complete(folder / "checkpoints")
        alone = start(*TWO)
        assert alone.wait() == 2
        assert alone.sentence().startswith(f"error: {saved} was written by 2 processes, and this launch has 1: they")
        ranks = Ranks(arguments, tmp_path / "ranks.log", anew)
        assert set(ranks.wait()) == {0}, ranks.log.read_text()
        assert f"going on from {saved}" in ranks.log.read_text()
    finally:
        ranks.close()
    same_run(folder, whole_of_two, last=4)


# --- the generation server -------------------------------------------------------------------------------------------

SERVED = ("generation=vllm_server", "max_completion_length=8", "save_steps=6")


@pytest.fixture(scope="module")
def whole_served(tmp_path_factory, lab_policy):
    root = tmp_path_factory.mktemp("served")
    server = Server(lab_policy, root / "server.log")
    try:
        arguments = command(root, lab_policy, CHEAP, *SERVED, f"vllm_server_base_url={server.url}")
        process = train(arguments, root / "log", anew=False)
        assert process.wait() == 0, process.text()
    finally:
        server.kill().wait()
    return folder_of(root)


@pytest.fixture
def robbed(start, serve, tmp_path, rng):
    """A run whose server was killed at a random moment: the run, the server's address as a setting, its port."""
    server = serve()
    where = f"vllm_server_base_url={server.url}"
    process = start(*SERVED, where)
    reached(process, folder_of(tmp_path), rng.randrange(1, 4))
    process.work(rng.uniform(0, 0.3))
    assert server.kill().wait() == -signal.SIGKILL
    return process, where, server.port


def test_the_server_is_killed_for_good(start, serve, robbed, whole_served, tmp_path):
    (process, where, port), folder = robbed, folder_of(tmp_path)
    assert process.wait() == 2, process.text()
    done = lines(folder)
    known = f"error: stopped after step {done}, from which the same command goes on: the vLLM server at"
    assert process.sentence().startswith(known)
    saved, notes = newest_complete(folder / "checkpoints")
    assert (saved.name, notes) == (f"checkpoint-{done}", [])
    serve(port)
    goes_on(start(*SERVED, where), folder, whole_served, known=f"going on from {saved}")


def test_the_server_is_killed_and_started_again(serve, robbed, whole_served, tmp_path, rng):
    process, _, port = robbed
    time.sleep(rng.uniform(0, 2))  # of the 15 s for which the run asks again
    serve(port)
    goes_on(process, folder_of(tmp_path), whole_served)
    assert "going on from" not in process.text()


@pytest.mark.skipif(not os.environ.get("VLLM"), reason="VLLM=1 runs it")
@pytest.mark.skipif(not (VLLM_PYTHON.parents[1] / ".ready").is_file(), reason="no vLLM in .venv-vllm: make serve")
def test_the_real_server_is_killed_for_good(tmp_path, lab_policy, repetition):
    """vLLM itself: the run ends at a checkpoint, and goes on with another server."""
    if repetition:
        pytest.skip("once is enough")
    folder, port = folder_of(tmp_path), free_port()
    serve = [sys.executable, "-m", "open_r1_capo.generation.serve", "--model", str(lab_policy), "--port", str(port)]
    arguments = [*SERVED, f"vllm_server_base_url=http://127.0.0.1:{port}", f"vllm_server_timeout={PATIENCE}"]
    for end in (2, 0):
        server = Process(serve, tmp_path / "server.log")
        run = train(command(tmp_path, lab_policy, CHEAP, *arguments), tmp_path / "log", anew=True)
        try:
            if end:
                reached(run, folder, 2)
                for pid in [server.pid, *descendants(server.pid)]:
                    os.kill(pid, signal.SIGKILL)
            assert run.wait() == end, run.text()
        finally:
            run.kill().wait()
            for pid in descendants(server.pid):
                os.kill(pid, signal.SIGTERM)
            server.kill(signal.SIGTERM).wait()
        if end:
            assert f"stopped after step {lines(folder)}, from which the same command goes on" in run.sentence()
            assert newest_complete(folder / "checkpoints")[0].name == f"checkpoint-{lines(folder)}"
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics(folder))


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
    what = "the disk is full" if root else r"a file would be larger than ulimit -f allows"
    assert (
        process.sentence()
        == f"error: {what}: make room, then the same command goes on from the last complete checkpoint"
    )
    assert "Traceback" not in process.text()
    saved, notes = newest_complete(folder / "checkpoints")
    assert saved.name == "checkpoint-2"
    print(notes, lines(folder))
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == list(range(1, lines(folder) + 1))
    if root:
        disk(16 * one)
    goes_on(start(root=root or tmp_path), folder, whole, known=f"going on from {saved}")


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
    assert f"going on from {last.with_name('checkpoint-4')}" in process.text()


def test_every_checkpoint_is_damaged(start, unfinished, whole, rng):
    for folder in sorted((unfinished / "checkpoints").glob("checkpoint-*")):
        hurt(folder, rng.choice(list(WAYS)), rng)
    process = start()
    goes_on(process, unfinished, whole, known="; going on from the beginning")
    assert process.text().count(" is not usable: ") == 3


def test_the_last_line_of_the_metrics_is_cut_off(start, unfinished, whole, rng):
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-6")
    path = unfinished / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    kept = rng.choice([4, 5])
    path.write_bytes(b"".join(rows[:kept]) + rows[kept][: rng.randrange(1, len(rows[kept]) - 1)])
    goes_on(start(), unfinished, whole, known="going on from")


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


def test_reward_workers_are_killed(finished, tmp_path, lab_policy, rng, anew):
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
