"""A running Slurm job and its nodes, with programs that stand in for Slurm's: signals, exit codes, logs."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from open_r1_capo.cluster import job, node
from open_r1_capo.runs.exit import PREEMPTED

# --- a running job, with programs that stand in for Slurm's ----------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`srun` runs the last word as a shell script; `scontrol` and `squeue` answer from files."""
    programs = {
        "srun": 'exec bash -c "${@: -1}"',
        "squeue": f"cat {tmp_path}/state",
        "scontrol": f'echo "$@" >> {tmp_path}/requeued; exit $(cat {tmp_path}/code)',
    }
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "REPEAT", 0.3)
    monkeypatch.setattr(job, "GRACE", 0.5)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "code").write_text("0")
    before = [signal.getsignal(number) for number in job.SIGNALS]
    yield tmp_path
    for number, handler in zip(job.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def step(name, script):
    return job.SrunStep(name, ("n1",), 1, 4, (script,))


POLITE = f"trap 'kill $!; exit {PREEMPTED}' USR1; sleep 30 & wait"
DEAF = f"trap 'n=1$n; [ $n = 11 ] && kill $! && exit {PREEMPTED}' USR1; sleep 30 & while true; do wait; done"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_trainers_code_is_the_jobs(slurm, code):
    assert job.run_job([step("server", "sleep 30"), step("trainer", f"exit {code}")], 7) == code
    assert not (slurm / "requeued").exists()


@pytest.mark.parametrize("sign", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("script", [POLITE, DEAF], ids=["at once", "the second time"])
def test_a_signal_reaches_the_trainer_and_the_job_is_requeued(slurm, capfd, sign, script):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), sign))
    timer.start()
    assert job.run_job([step("server", "sleep 30"), step("trainer", script)], 7) == PREEMPTED
    assert (slurm / "requeued").read_text() == "requeue 7\n"
    assert "job 7 is requeued and will resume" in capfd.readouterr().err


def test_a_cancelled_job_is_not_requeued(slurm, capfd):
    (slurm / "state").write_text("CANCELLED\n")
    assert job.run_job([step("trainer", f"exit {PREEMPTED}")], 7) == PREEMPTED
    assert not (slurm / "requeued").exists()
    assert "job 7 is cancelled: not requeued, submit it again" in capfd.readouterr().err


def test_a_job_that_cannot_be_requeued(slurm, capfd):
    (slurm / "code").write_text("1")
    assert job.run_job([step("trainer", f"exit {PREEMPTED}")], 7) == PREEMPTED
    assert "cannot be requeued" in capfd.readouterr().err


def test_a_server_that_ends_shows_its_last_lines(slurm, capfd):
    script = "for i in $(seq 40); do echo line $i; done; exit 3"
    assert job.run_job([step("server", script), step("trainer", "sleep 30")], 7) == 1
    error = capfd.readouterr().err
    assert "the server has ended with code 3; the last lines of outputs/slurm/server-7.log" in error
    assert "line 40" in error
    assert "line 25\n" not in error


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (PREEMPTED, PREEMPTED), (5, 1)])
def test_a_trainer_that_ends_by_itself_after_its_server(slurm, code, expected):
    assert job.run_job([step("server", "exit 3"), step("trainer", f"sleep 0.4; exit {code}")], 7) == expected


def test_nothing_is_left_running(slurm):
    start = time.monotonic()
    job.run_job([step("server", "echo $$ > pid; exec sleep 60"), step("trainer", "sleep 0.3")], 7)
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((slurm / "pid").read_text()), 0)


# --- a node ----------------------------------------------------------------------------------------------------------


def launch_node(tmp_path, script, *options):
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "open_r1_capo.cluster.node", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", *options, str(tmp_path / "script.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


HEEDLESS = "import os, signal, sys; os.kill(os.getppid(), signal.SIGTERM); os.kill(os.getppid(), signal.SIGUSR1); "


@pytest.mark.parametrize("code", [PREEMPTED, 3])
def test_a_node_ends_with_its_trainers_code(tmp_path, code):
    """Signals to the launcher change nothing; the trainers' code is not lost in it."""
    options = ("--cpu", "--num_processes", "1") if code == 3 else ("--multi_gpu", "--num_processes", "2")
    done = launch_node(tmp_path, f"{HEEDLESS}sys.exit({code})", *options)
    assert done.returncode == code, done.stderr


def test_a_killed_trainer_is_no_polite_end():
    assert node._code(-9) == 137
    assert node._code(2) == 2
