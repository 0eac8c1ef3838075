"""Failure drills (`make test-faults`) of processes: the trainer, one of its ranks, its server is killed.

In all of them the same command afterwards ends as the uninterrupted run does: metrics, token records, parameters and
CAPO's moments, bit for bit. docs/reliability.md is the list for users.
"""

import os
import shutil
import signal
import sys
import time

import pytest
from processes import (
    ANEW,
    CHEAP,
    PATIENCE,
    Process,
    Ranks,
    Server,
    cpu_seconds,
    descendants,
    folder_of,
    free_port,
    goes_on,
    lines,
    reached,
    train,
    until,
)
from test_preemption import signalled, test_a_stopped_run_resumes_bit_for_bit  # SIGTERM and SIGUSR1 in mid-step

from open_r1_capo.cluster.vllm import VLLM_PYTHON
from open_r1_capo.runs.checkpoints import find_damage, newest_complete
from test_grpo import command, finished, metrics, same_run

__all__ = ["finished", "signalled", "test_a_stopped_run_resumes_bit_for_bit"]

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
    goes_on(again, folder, whole, known=f"resuming from {saved}" if saved else "")


def test_the_trainer_is_killed_while_it_writes_a_checkpoint(start, whole, tmp_path, rng):
    folder = folder_of(tmp_path)
    for _ in range(20):  # it may be faster than we see
        process, files = start(), rng.randrange(1, 12)
        torn = stopped_in_a_checkpoint(process, folder / "checkpoints", files)
        process.kill().wait()
        if torn:
            break
        shutil.rmtree(folder)
    assert find_damage(torn) == "it was cut off while being written"
    saved, _ = newest_complete(folder / "checkpoints")
    known = f"{torn} is not usable: it was cut off while being written; resuming from {saved or 'the beginning'}"
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
        assert set(codes) <= {1, 137, -signal.SIGKILL}, ranks.log.read_text()  # what torchrun saw first, or each
        saved, _ = newest_complete(folder / "checkpoints")
        alone = start(*TWO)
        assert alone.wait() == 2
        assert alone.sentence().startswith(f"error: {saved} was written by 2 processes, and this launch has 1: they")
        ranks = Ranks(arguments, tmp_path / "ranks.log", anew)
        assert set(ranks.wait()) == {0}, ranks.log.read_text()
        assert f"resuming from {saved}" in ranks.log.read_text()
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
    reached(process, folder_of(tmp_path), rng.randrange(1, 3))
    process.work(rng.uniform(0, 0.2)).kill(signal.SIGSTOP)
    assert lines(folder_of(tmp_path)) <= 4, "too late: no step would ask the server any more"
    assert server.kill().wait() == -signal.SIGKILL
    process.kill(signal.SIGCONT)
    return process, where, server.port


def test_the_server_is_killed_for_good(start, serve, robbed, whole_served, tmp_path):
    (process, where, port), folder = robbed, folder_of(tmp_path)
    assert process.wait() == 2, process.text()
    done = lines(folder)
    known = f"error: stopped after step {done}, from which the same command resumes: the vLLM server at"
    assert process.sentence().startswith(known)
    saved, notes = newest_complete(folder / "checkpoints")
    assert (saved.name, notes) == (f"checkpoint-{done}", [])
    serve(port)
    goes_on(start(*SERVED, where), folder, whole_served, known=f"resuming from {saved}")


def test_the_server_is_killed_and_started_again(serve, robbed, whole_served, tmp_path, rng):
    process, _, port = robbed
    time.sleep(rng.uniform(0, 2))  # of the 15 s for which the run asks again
    serve(port)
    goes_on(process, folder_of(tmp_path), whole_served)
    assert "resuming from" not in process.text()


@pytest.mark.skipif(not os.environ.get("VLLM"), reason="VLLM=1 runs it")
@pytest.mark.skipif(not (VLLM_PYTHON.parents[1] / ".ready").is_file(), reason="no vLLM in .venv-vllm: make serve")
def test_the_real_server_is_killed_for_good(tmp_path, lab_policy, repetition):
    """vLLM itself: the run ends at a checkpoint, and goes on with another server."""
    if repetition:
        pytest.skip("once is enough")
    folder, port = folder_of(tmp_path), free_port()
    serve = [sys.executable, "-m", "open_r1_capo.cluster.serve", "--model", str(lab_policy), "--port", str(port)]
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
            assert f"stopped after step {lines(folder)}, from which the same command resumes" in run.sentence()
            assert newest_complete(folder / "checkpoints")[0].name == f"checkpoint-{lines(folder)}"
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics(folder))
