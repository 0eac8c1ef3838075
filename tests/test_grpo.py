"""The entry point as a user meets it: a run from end to end, killed and resumed, and every kind of bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from open_r1_capo import grpo
from open_r1_capo.runs.checkpoints import find_damage, newest_complete, seal
from open_r1_capo.training import run as training_run
from open_r1_capo.training import run_trainer

FAST = [
    "max_steps=6", "save_steps=2", "completions_per_step=32", "num_generations=4", "max_completion_length=16",
    "evaluation.problems=0", "learning_rate=1e-3", "capo.max_policy_shift=1e-2",
]  # fmt: skip


def command(root, policy, *overrides, recipe="capo_aggressive"):
    arguments = ["--config-name", recipe, f"output_root={root}", *FAST, f"model_name_or_path={policy}", *overrides]
    if recipe.startswith("grpo"):
        arguments = [a for a in arguments if not a.startswith("capo.max_policy_shift")]
    return arguments


def run(*arguments, expect=0, **kwargs):
    """Run the entry point as a process; returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", "open_r1_capo.grpo", *arguments], capture_output=True, text=True, timeout=300, **kwargs
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def refused(capsys, *arguments):
    """The one sentence of a refused call."""
    assert grpo.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    return error


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lab_policy):
    """The folder of an uninterrupted run."""
    root = tmp_path_factory.mktemp("outputs")
    out = run(*command(root, lab_policy))
    return root / "capo_aggressive" / "lab" / "seed0", out


def test_a_run_writes_its_folder(finished):
    folder, out = finished
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "report.html", "tokens"} == {
        p.name for p in folder.iterdir()
    }
    rows = metrics(folder)
    assert max(row["capo/policy_shift/max"] for row in rows) > 0
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["completions"] == 192
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["completions"] == 192
    assert summary["rejected_frac"]["max"] == max(row["capo/rejected_frac"] for row in rows)
    config = (folder / "config.yaml").read_text()
    assert "commit:" in config
    assert "trl: 1.16.0" in config
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"https?://", page)
    assert "capo_aggressive on lab, seed 0: 6 steps, 192 completions" in out
    assert str(folder / "report.html") in out
    assert "step 6/6" in out


def test_a_checkpoint_is_an_ordinary_folder(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "checkpoints" / "checkpoint-6"
    AutoModelForCausalLM.from_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]  # all that vLLM may load
    AutoTokenizer.from_pretrained(folder)
    assert find_damage(folder) is None


def test_a_finished_run_is_not_run_again(finished, capsys, lab_policy, monkeypatch):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert grpo.main(command(folder.parents[2], lab_policy)) == 0
    assert "this run has ended (OVERWRITE=1 runs it again)" in capsys.readouterr().out
    monkeypatch.setattr(training_run.GRPOConfig, "process_index", 1)
    assert grpo.main(command(folder.parents[2], lab_policy)) == 0
    assert capsys.readouterr().out == ""  # one of several processes tells it
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def same_run(folder, reference, last=6):
    ours, theirs = (path / "checkpoints" / f"checkpoint-{last}" for path in (folder, reference))
    for name in ("model.safetensors", "capo/state.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert metrics(folder) == metrics(reference)
    assert token_records(folder) == token_records(reference) != {}


def token_records(folder):
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path, lab_policy):
    """After SIGKILL at random moments, parameters, moments and metrics are the uninterrupted run's."""
    folder, rng = tmp_path / "capo_aggressive" / "lab" / "seed0", random.Random(os.getpid())
    print("killed at random moments of seed", os.getpid())
    arguments = [sys.executable, "-m", "open_r1_capo.grpo", *command(tmp_path, lab_policy)]
    for step in sorted(rng.sample(range(1, 6), 2)):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = folder / "metrics.jsonl"
        while process.poll() is None and (not lines.is_file() or len(lines.read_text().splitlines()) < step):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "summary.json").exists()
    out = run(*command(tmp_path, lab_policy))
    assert "resuming from" in out or newest_complete(folder / "checkpoints")[0] is None
    same_run(folder, finished[0])


def test_planned_steps_resume_with_their_calibration(tmp_path, lab_policy):
    extra = ["capo.step_policy_shift=1e-5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*command(whole, lab_policy, *extra, recipe="grpo_planned"))
    run(*command(parts, lab_policy, *extra, recipe="grpo_planned"))
    folder = parts / "grpo_planned" / "lab" / "seed0"
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "checkpoint-6" / "complete.json").unlink()  # as if cut off while being written
    out = run(*command(parts, lab_policy, *extra, recipe="grpo_planned"))
    assert "checkpoint-6 is not usable: it was cut off while being written; resuming from" in out
    same_run(folder, whole / "grpo_planned" / "lab" / "seed0")
    assert max(row["capo/measured_kl"] for row in metrics(folder)) > 0
    assert min(row["capo/step_scale"] for row in metrics(folder)) < 1


@pytest.mark.parametrize("name", ["model.safetensors", "capo/state.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, lab_policy, name):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    shutil.copytree(finished[0], folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    broken = folder / "checkpoints" / "checkpoint-4" / name
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 0xFF
    broken.write_bytes(content)
    found, notes = newest_complete(folder / "checkpoints")
    assert found.name == "checkpoint-2"
    assert f"{name} has changed or is cut off" in notes[0]


# --- bad input: one sentence, exit code 2, nothing written -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name", "cap"], "there is no recipe 'cap'; the recipes are capo_aggressive"),
        (["learning_rte=1"], "did you mean learning_rate?"),
        (["capo.max_policy_shift=0"], "max_policy_shift must be greater than 0"),
        (["completions_per_step=90"], "must be a multiple of"),
        (
            ["model_name_or_path=nobody/nothing"],
            "put a copy of it on this machine and set model_name_or_path=<folder>",
        ),
        (["data.name=nobody/nothing"], "data.path="),
        (["data.path=does/not/exist.jsonl"], "does/not/exist.jsonl"),
        (["reward_funcs=[acuracy]"], "unknown reward acuracy"),
    ],
)
def test_bad_input_writes_nothing(capsys, tmp_path, lab_policy, arguments, message):
    base = [
        a for a in command(tmp_path / "out", lab_policy) if not any(a.startswith(x.split("=")[0]) for x in arguments)
    ]
    if arguments[0] == "--config-name":
        base = base[2:]
    assert message in refused(capsys, *base, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_scale_says_what_runs_here(capsys, tmp_path):
    error = refused(
        capsys, "--config-name", "drcapo_aggressive", "scale=qwen2.5-math-7b", f"output_root={tmp_path}/out"
    )
    assert "`make train RECIPE=drcapo_aggressive SCALE=lab` runs" in error
    assert "use_cpu=true bf16=false tries this one" in error


def test_a_folder_of_other_settings_is_kept(finished, capsys, lab_policy):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    error = refused(capsys, *command(folder.parents[2], lab_policy, "temperature=0.7"))
    assert "belongs to a run with other settings (temperature; temperature was 0.9, now 0.7)" in error
    assert "OVERWRITE=1" in error
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else_is_kept(capsys, tmp_path, lab_policy):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    for more in ([], ["overwrite=true"]):
        assert "holds files of something else" in refused(capsys, *command(tmp_path, lab_policy, *more))
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("refusal", ["eval_strategy=steps", "report_to=nothing", "reward_weights=[1,2]"])
def test_an_overwritten_run_is_kept_until_the_new_one_stands(capsys, finished, tmp_path, lab_policy, refusal):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    shutil.copytree(finished[0], folder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    refused(capsys, *command(tmp_path, lab_policy, "overwrite=true", refusal))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwriting(finished, tmp_path, lab_policy):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    shutil.copytree(finished[0], folder)
    assert grpo.main(command(tmp_path, lab_policy, "overwrite=true", "max_steps=2")) == 0
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert [path.name for path in folder.parent.iterdir()] == ["seed0"]


def test_two_processes_cannot_share_a_folder(finished, tmp_path, lab_policy):
    from open_r1_capo.runs.folder import RunFolder, RunFolderError

    folder = tmp_path / "seed0"
    shutil.copytree(finished[0], folder)
    settings = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    settings.pop("environment")
    first, second = (RunFolder(folder).claim(settings, overwrite=False) for _ in range(2))
    with first, pytest.raises(RunFolderError, match="another process"):
        second.__enter__()


@pytest.mark.parametrize("content", ["a: 1\n", "{", ""])
def test_a_foreign_config_is_kept(capsys, tmp_path, lab_policy, content):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(content)
    assert "holds files of something else" in refused(capsys, *command(tmp_path, lab_policy, "overwrite=true"))
    assert (folder / "config.yaml").read_text() == content


def test_a_model_that_is_not_there(capsys, tmp_path):
    error = refused(capsys, *command(tmp_path / "out", "models/mine/none"))
    assert "the model models/mine/none cannot be loaded (there is no such folder)" in error


def test_prompts_that_are_all_too_long(capsys, tmp_path, lab_policy):
    error = refused(capsys, *command(tmp_path / "out", lab_policy, "data.max_prompt_tokens=2"))
    assert "no prompt has at most data.max_prompt_tokens=2 tokens" in error


def test_a_full_disk(capsys, tmp_path, lab_policy, monkeypatch):
    """The second checkpoint does not fit: one sentence, and the first stays what the run goes on from."""
    save = run_trainer.save_state

    def full(folder, *rest):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        save(folder, *rest)

    monkeypatch.setattr(run_trainer, "save_state", full)
    assert grpo.main(command(tmp_path, lab_policy)) == 2
    assert "error: the disk is full: free some space, then run the same command" in capsys.readouterr().err
    assert newest_complete(tmp_path / "capo_aggressive" / "lab" / "seed0" / "checkpoints")[0].name == "checkpoint-2"


def test_an_unwritable_output_folder(capsys, tmp_path, lab_policy):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refused(capsys, *command(tmp_path / "file", lab_policy))


def test_a_checkpoint_of_another_optimizer_model(capsys, finished, tmp_path, lab_policy):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    shutil.copytree(finished[0], folder)
    (folder / "summary.json").unlink()
    last = folder / "checkpoints" / "checkpoint-6"
    shutil.copytree(folder / "checkpoints" / "checkpoint-4", last, dirs_exist_ok=True)
    (last / "capo/state.safetensors").write_bytes(b"not a tensor file")
    seal(last)
    assert grpo.main(command(tmp_path, lab_policy)) == 2
    assert "cannot be read as CAPO's state" in capsys.readouterr().err


def test_interrupted(capsys, monkeypatch):
    def stop(settings, preemption):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "train", stop)
    assert grpo.main([]) == 130
    assert "run the same command to resume from the last checkpoint" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(settings, preemption):
        raise ZeroDivisionError

    monkeypatch.setattr(training_run, "train", broken)
    with pytest.raises(ZeroDivisionError):
        grpo.main([])


def test_problems_from_a_local_file(tmp_path, lab_policy):
    """A user's own JSONL instead of the lab's problems."""
    rows = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(40)]
    Path(tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(*command(tmp_path / "out", lab_policy, f"data.path={tmp_path}/mine.jsonl", "max_steps=1"))
    assert "training reward" in out


def test_wandb_offline_stays_inside_the_folder(tmp_path, lab_policy):
    """Without a key the run is recorded offline, beside the metrics."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    run(*command(tmp_path, lab_policy, "report_to=wandb", "max_steps=2"), env=environment, cwd=tmp_path)
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"capo_aggressive"}
