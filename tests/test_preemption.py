"""SIGTERM and SIGUSR1: the running step ends, a checkpoint is written, and the same command goes on exactly."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from open_r1_capo.checkpoint import newest_complete
from open_r1_capo.preemption import PREEMPTED, Preempted, Preemption
from test_grpo import command, finished, metrics, run, same_run  # noqa: F401, `finished` is a fixture


def start(*arguments, ranks=1):
    launcher = ["-m"] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "-m"]
    return subprocess.Popen(
        [sys.executable, *launcher, "open_r1_capo.grpo", *arguments], stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(process, path, number):
    while process.poll() is None and (not path.is_file() or len(path.read_text().splitlines()) < number):
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_resumes_bit_for_bit(finished, tmp_path, lab_policy, sign):  # noqa: F811
    folder, rng = tmp_path / "capo_aggressive" / "lab" / "seed0", random.Random(os.getpid())
    print("stopped at random moments of seed", os.getpid())
    arguments = command(tmp_path, lab_policy, "save_steps=6")  # every checkpoint but the last is the signal's
    for step in sorted(rng.sample(range(1, 5), 2)):
        process = start(*arguments)
        wait_for_lines(process, folder / "metrics.jsonl", step)
        time.sleep(rng.random() * 0.05)
        process.send_signal(sign)
        _, error = process.communicate(timeout=120)
        assert process.returncode == PREEMPTED, error
        saved, notes = newest_complete(folder / "checkpoints")
        assert not notes
        done = int(saved.name.removeprefix("checkpoint-"))
        assert error.splitlines()[-1] == f"stopped by {sign.name} at step {done}; the same command goes on"
        assert [row["step"] for row in metrics(folder)] == list(range(1, done + 1))
        assert not (folder / "summary.json").exists()
    assert f"going on from {saved}" in run(*arguments)
    same_run(folder, finished[0])


def test_one_rank_stops_all(tmp_path, lab_policy):
    """The signal reaches one process of two; both stop after the same step."""
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    process = start(*command(tmp_path, lab_policy, "max_steps=40"), ranks=2)
    wait_for_lines(process, folder / "metrics.jsonl", 1)
    pids = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    assert len(pids) == 2
    os.kill(int(pids[1]), signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    saved, _ = newest_complete(folder / "checkpoints")
    done = int(saved.name.removeprefix("checkpoint-"))
    assert done < 40
    assert f"stopped by SIGTERM at step {done}" in error
    assert [row["step"] for row in metrics(folder)] == list(range(1, done + 1))
    assert len(list(saved.glob("rng_state_*.pth"))) == 2
    assert error.count(f"exitcode  : {PREEMPTED} ") == 2, error


# --- the class alone -------------------------------------------------------------------------------------------------

ARGS = SimpleNamespace(steps_per_generation=2, num_iterations=2, gradient_accumulation_steps=2)


def after(preemption, step, args=ARGS):
    control = TrainerControl()
    preemption.on_step_end(args, TrainerState(global_step=step, max_steps=9), control)
    return control.should_save, control.should_training_stop


@pytest.fixture
def preemption():
    one = Preemption()
    one.accelerator = SimpleNamespace(device="cpu", reduce=lambda tensor, kind: tensor)
    return one


def test_without_a_signal_nothing_happens(preemption):
    assert after(preemption, 2) == (False, False)
    preemption.check()


def test_completions_are_used_up_first(preemption):
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert after(preemption, 1) == (False, False)
    preemption.check()
    assert after(preemption, 2) == (True, True)
    with pytest.raises(Preempted, match="stopped by SIGUSR1 at step 2; the same command goes on"):
        preemption.check()


def test_the_last_step_ends_the_run_as_usual(preemption):
    preemption.received[0] = 1
    assert after(preemption, 9) == (False, False)
    preemption.check()


def test_another_ranks_signal_counts(preemption):
    preemption.accelerator.reduce = lambda tensor, kind: tensor + torch.tensor([1, 0])
    assert after(preemption, 2) == (True, True)
    assert "SIGTERM" in str(preemption.stopped)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption().listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def listen():
        with Preemption().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
