"""Processes to injure: runs, their ranks, and a stand-in of a generation server.

A run is `python -m open_r1_capo.grpo …`. Its repetitions are forked from the tests' process instead, which has
imported everything: a process like any other from `main` on, without five seconds of importing torch and its friends.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from open_r1_capo import grpo
from open_r1_capo.runs.folder import RunFolder
from test_grpo import same_run

HERE = Path(__file__).resolve().parent
PATIENCE = 900.0  # seconds for anything that takes seconds on an idle machine
ANEW = not os.environ.get("FORKED")  # the first time, runs are started by a new interpreter
CHEAP = "reward_funcs=[tag_count]"  # needs no worker processes, and varies as well
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A process with its output in a file.

    Args:
        start: a command line, or a function to fork.
        log: the file.
        **environment: changes of it.
    """

    def __init__(self, start, log, **environment):
        self.log, self.code = Path(log), None
        with self.log.open("ab") as output:
            self.before = output.tell()
            self.pid = (
                self._fork(start, output, environment) if callable(start) else self._run(start, output, environment)
            )

    def _run(self, command, output, environment):
        self.popen = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        return self.popen.pid

    def _fork(self, function, output, environment):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            os.environ.update(environment)
            for state in (AcceleratorState, PartialState):  # of whatever this process has trained
                state._shared_state.clear()
            code = function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)

    def ended(self):
        """Whether it has; `code` then is what a shell would call minus the signal, or the exit code."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds=PATIENCE):
        """Its exit code."""
        until(self.ended, seconds)
        return self.code

    def kill(self, number=signal.SIGKILL):
        if not self.ended():
            os.kill(self.pid, number)
        return self

    def text(self):
        """What this process has written so far."""
        with self.log.open("rb") as file:
            file.seek(self.before)
            return file.read().decode(errors="replace")

    def sentence(self):
        """The last line it wrote."""
        return self.text().strip().splitlines()[-1]

    def work(self, seconds):
        """Wait until it has computed for some seconds, however busy the machine is, or has ended."""
        start = cpu_seconds(self.pid)
        until(lambda: self.ended() or cpu_seconds(self.pid) - start >= seconds)
        return self


def until(condition, seconds=PATIENCE, pause=0.002):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)


def cpu_seconds(pid):
    """What a living or ended, but not reaped process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / TICKS


def descendants(pid):
    """Processes that a process has started, and those started by them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def train(arguments, log, anew, injury=None):
    """Start a run.

    Args:
        arguments: of the command.
        log: where its output goes.
        anew: by a new interpreter, or forked.
        injury: an expression to evaluate first, such as `nan_gradients({3})`; its names are those of `injuries.py`.
    """
    if not anew:

        def forked():
            if injury:
                inflict(injury)
            return grpo.main(list(arguments))

        return Process(forked, log)
    if injury is None:
        return Process([sys.executable, "-m", "open_r1_capo.grpo", *arguments], log)
    paths = [str(HERE), str(HERE.parent)]
    script = f"import sys; sys.path[:0] = {paths}; import processes; processes.inflict({injury!r}); "
    return Process([sys.executable, "-c", script + "sys.exit(processes.grpo.main())", *arguments], log)


def inflict(injury):
    """Carry out an injury in this process."""
    eval(injury, {"nan_gradients": nan_gradients, "for_ever": range(2, 1000)})


def nan_gradients(steps):
    """Make one number of the gradient NaN in the backward pass of some steps, counted from 1."""
    from open_r1_capo.training.trainer import CAPOTrainer

    whole = CAPOTrainer.training_step

    def injured(trainer, model, *rest):
        loss = whole(trainer, model, *rest)
        if trainer.state.global_step + 1 in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[-1] = float("nan")
        return loss

    CAPOTrainer.training_step = injured


class Ranks:
    """Two gloo ranks of a run: by the node's launcher, or forked with what torchrun would set."""

    def __init__(self, arguments, log, anew):
        self.log, port = Path(log), str(free_port())
        if anew:
            node = [sys.executable, "-m", "open_r1_capo.cluster.node", "--multi_gpu", "--num_machines", "1"]
            node += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
            node += ["--main_process_port", port, grpo.__file__]
            self.processes = [Process([*node, *arguments], log)]
        else:
            common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.processes = [
                Process(lambda: grpo.main(list(arguments)), log, RANK=rank, LOCAL_RANK=rank, **common)
                for rank in ("0", "1")
            ]
        self.anew = anew

    def pid(self, rank):
        """Of a rank that is training."""
        if not self.anew:
            return self.processes[rank].pid
        under = descendants(self.processes[0].pid)
        (found,) = [
            pid for pid in under if grpo.__file__ in command_line(pid) and f"RANK={rank}" in environment_of(pid)
        ]
        return found

    def ended(self):
        return all([process.ended() for process in self.processes])

    def wait(self, seconds=PATIENCE):
        """The exit codes: of the launcher, or of each rank."""
        until(self.ended, seconds)
        return [process.code for process in self.processes]

    def close(self):
        for process in self.processes:
            for pid in [process.pid, *descendants(process.pid)] if not process.ended() else []:
                os.kill(pid, signal.SIGKILL)
            process.wait()


class Server(Process):
    """The stand-in of vLLM's server as a process of its own."""

    def __init__(self, model, log, port=None):
        self.port = port or free_port()
        super().__init__(lambda: serve(model, self.port), log)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


def serve(model, port):
    spec = importlib.util.spec_from_file_location("stand_in_vllm", HERE.parent / "stand_ins" / "vllm.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    stand_in.Server(model, port)
    threading.Event().wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- what they leave behind ------------------------------------------------------------------------------------------


def folder_of(root):
    return root / "capo_aggressive" / "lab" / "seed0"


def lines(folder):
    return len(RunFolder(folder).metrics())


def reached(process, folder, step):
    """Wait until a run has logged a step, or has ended."""
    until(lambda: process.ended() or lines(folder) >= step)
    assert not process.ended(), process.text()


def goes_on(process, folder, reference, *, known=""):
    """The same command finishes the run as if nothing had happened."""
    assert process.wait() == 0, process.text()
    assert known in process.text()
    same_run(folder, reference)
