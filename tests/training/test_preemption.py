"""SIGTERM and SIGUSR1: the running step ends, a checkpoint is written, and the same command goes on exactly."""

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from open_r1_capo import grpo
from open_r1_capo.runs.checkpoints import newest_complete
from open_r1_capo.runs.exit import PREEMPTED
from open_r1_capo.training.preemption import Preempted, Preemption
from open_r1_capo.training.trainer import CAPOTrainer
from test_grpo import command, finished, metrics, same_run  # noqa: F401, `finished` is a fixture


@pytest.fixture
def signalled(monkeypatch):
    """Train in this process, with a signal sent `delay` seconds after the beginning of step `step`."""
    prepare = CAPOTrainer._generate_and_score_completions

    def train(step, delay, sign, *arguments):
        timer = threading.Timer(delay, os.kill, (os.getpid(), sign))

        def start_timer(trainer, inputs):
            if trainer.state.global_step == step - 1:
                timer.start()
            return prepare(trainer, inputs)

        monkeypatch.setattr(CAPOTrainer, "_generate_and_score_completions", start_timer)
        try:
            return grpo.main(list(arguments))
        finally:
            timer.cancel()
            gc.collect()  # the folder's lock, which a process would give back by ending
            monkeypatch.setattr(CAPOTrainer, "_generate_and_score_completions", prepare)

    return train


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_resumes_bit_for_bit(finished, tmp_path, lab_policy, capfd, signalled, sign):  # noqa: F811
    folder, seed = tmp_path / "capo_aggressive" / "lab" / "seed0", random.randrange(10**6)
    print("stopped at random moments of seed", seed)
    rng = random.Random(seed)
    arguments = command(tmp_path, lab_policy, "save_steps=6")  # every checkpoint but the last is the signal's
    for step in (rng.choice([1, 2]), rng.choice([3, 4])):
        assert signalled(step, rng.random() * 0.1, sign, *arguments) == PREEMPTED
        saved, notes = newest_complete(folder / "checkpoints")
        assert not notes
        done = int(saved.name.removeprefix("checkpoint-"))
        error = capfd.readouterr().err
        assert error.splitlines()[-1] == f"stopped by {sign.name} at step {done}; run the same command to resume"
        assert [row["step"] for row in metrics(folder)] == list(range(1, done + 1))
        assert not (folder / "summary.json").exists()
    assert grpo.main(arguments) == 0
    assert f"resuming from {saved}" in capfd.readouterr().err
    same_run(folder, finished[0])


RANK = """
import os, signal, sys, threading
from open_r1_capo import grpo
from open_r1_capo.training.trainer import CAPOTrainer

prepare = CAPOTrainer._generate_and_score_completions
def varied(trainer, inputs):
    if trainer.state.global_step == 1 and os.environ["RANK"] == os.environ.get("SIGNALLED"):
        os.kill(os.getpid(), signal.SIGTERM)
    return prepare(trainer, inputs)
CAPOTrainer._generate_and_score_completions = varied
sys.exit(grpo.main())
"""


def test_one_rank_stops_all(tmp_path, lab_policy):
    """The signal reaches one process of two; both stop after the same step, the node says why, and both go on."""
    (tmp_path / "rank.py").write_text(RANK)

    def ranks(root, signalled=""):
        node = [
            sys.executable,
            "-m",
            "open_r1_capo.cluster.node",
            "--multi_gpu",
            "--num_machines",
            "1",
            "--num_processes",
        ]
        node += ["2", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
        arguments = command(tmp_path / root, lab_policy, "max_steps=3", "save_steps=3")
        environment = os.environ | {"SIGNALLED": signalled}
        return subprocess.run(
            [*node, str(tmp_path / "rank.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
        )

    done = ranks("parts", signalled="1")
    assert done.returncode == PREEMPTED, done.stderr
    assert done.stderr.count("stopped by SIGTERM at step 2; run the same command to resume") == 1
    folder = tmp_path / "parts" / "capo_aggressive" / "lab" / "seed0"
    saved, _ = newest_complete(folder / "checkpoints")
    assert saved.name == "checkpoint-2"
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert len(list(saved.glob("rng_state_*.pth"))) == 2
    for root in ("parts", "whole"):
        done = ranks(root)
        assert done.returncode == 0, done.stderr
    assert metrics(folder) == metrics(tmp_path / "whole" / "capo_aggressive" / "lab" / "seed0")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    with pytest.raises(Preempted, match="stopped by SIGUSR1 at step 2; run the same command to resume"):
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
