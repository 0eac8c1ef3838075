"""How commands end, and what they import before they do anything."""

import subprocess
import sys

import pytest

from open_r1_capo.runs.checkpoints import CheckpointError
from open_r1_capo.runs.exit import BAD_INPUT, INTERRUPTED, PREEMPTED, UserError, run_cli
from open_r1_capo.runs.folder import RunFolderError
from open_r1_capo.runs.run import RunError


@pytest.mark.parametrize("result", [None, 0, PREEMPTED])
def test_a_command_that_ends_gives_its_own_code(result, capsys):
    assert run_cli(lambda: result) == (result or 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [UserError, RunError, RunFolderError, CheckpointError])
def test_what_the_user_can_put_right_is_one_sentence(kind, capsys):
    def command():
        raise kind("the folder is full: make room")

    assert run_cli(command) == BAD_INPUT
    assert capsys.readouterr().err == "error: the folder is full: make room\n"


def test_an_interrupt_says_what_it_leaves(capsys):
    def command():
        raise KeyboardInterrupt

    assert run_cli(command, "stopped; run the same command to resume") == INTERRUPTED
    assert capsys.readouterr().err == "\nstopped; run the same command to resume\n"


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)


def test_a_run_is_read_without_what_trains_it():
    """OmegaConf is for the writer, torch for neither."""
    heavy = {"torch", "transformers", "trl", "numpy", "hydra", "omegaconf"}
    for modules, loaded in (("checkpoints, exit, outcomes, records, run, summary", set()), ("folder", {"omegaconf"})):
        program = f"import sys; from open_r1_capo.runs import {modules}; print(sorted(sys.modules.keys() & {heavy}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == f"{sorted(loaded)}\n"
