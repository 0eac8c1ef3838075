"""A user's own model, data and reward."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from open_r1_capo import grpo
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.training import build, disk, machine
from test_grpo import command, metrics, refused


def bare(folder, policy, **changes):
    """A copy of a policy whose tokenizer has no chat template, and other settings."""
    shutil.copytree(policy, folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def plain_tokenizers(monkeypatch):
    """Qwen2's own class adds tokens where the settings name none."""
    monkeypatch.setattr(build, "AutoTokenizer", PreTrainedTokenizerFast)


def test_a_model_without_a_chat_template_or_a_pad_token(capsys, tmp_path, lab_policy, plain_tokenizers):
    model = bare(tmp_path / "bare", lab_policy, pad_token=None)
    assert grpo.main(command(tmp_path / "out", model, "max_steps=2")) == 0
    said = capsys.readouterr().err
    assert "has no chat template: prompts are the turns' texts, an empty line after each" in said
    assert "has no pad token: its end-of-text token <|end|> pads" in said
    saved = tmp_path / "out" / "capo_aggressive" / "lab" / "seed0" / "checkpoints" / "checkpoint-2"
    assert (
        "turn['content']" in PreTrainedTokenizerFast.from_pretrained(saved).chat_template
    )  # an evaluation asks the same way


def test_a_tokenizer_of_another_model(capsys, tmp_path, lab_policy):
    """Qwen2's class adds a pad token of its own."""
    model = bare(tmp_path / "bare", lab_policy, pad_token=None)
    assert grpo.main(command(tmp_path / "out", model)) == 2
    assert "the token <|endoftext|> of the tokenizer is not in the model's vocabulary of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_end_of_text(capsys, tmp_path, lab_policy, plain_tokenizers):
    model = bare(tmp_path / "bare", lab_policy, eos_token=None)
    assert "has no end-of-text token (eos_token)" in refused(capsys, *command(tmp_path / "out", model))


def test_a_reward_of_ones_own(capsys, tmp_path, lab_policy):
    file = tmp_path / "mine.py"
    file.write_text("def even(completions, answer):\n    return [len(c[0]['content']) % 2 for c in completions]\n")
    arguments = command(tmp_path / "out", lab_policy, "max_steps=2")
    assert grpo.main([*arguments, f"reward={file}:even"]) == 0
    row = metrics(tmp_path / "out" / "capo_aggressive" / "lab" / "seed0")[0]
    assert 0 < row["rewards/even/mean"] < 1
    capsys.readouterr()
    assert "has no function 'odd'; it has even" in refused(capsys, *arguments, f"reward={file}:odd")
    file.write_text("def even(completions):\n    return [1]\n")
    assert grpo.main([*arguments, f"reward={file}:even", "overwrite=true"]) == 2
    assert "mine.py:even must return a list of" in capsys.readouterr().err


# --- SCALE=own: what follows from the machine ---


def own(model, *more):
    return compose_recipe("grpo_budget", ["scale=own", f"model_name_or_path={model}", *more])


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_model_and_a_file_are_enough(capsys, tmp_path, lab_policy, problems):
    """On a CPU; all choices are said before the first step, and the same command goes on with them."""
    arguments = [
        "--config-name",
        "grpo_budget",
        "scale=own",
        f"model_name_or_path={lab_policy}",
        f"data.path={problems}",
    ]
    arguments += ["max_steps=2", "save_steps=1", "max_completion_length=8", f"output_root={tmp_path}/out"]
    assert grpo.main(arguments) == 0
    said = capsys.readouterr().err
    chosen = said.partition("step 1/")[0]
    for part in ("device         CPU, as there is no GPU  (use_cpu=false)", "micro-batch    32, about 0.", "9 of",
                 "column question with the answers in column answer", "KL budget of 0.30% of the entropy",
                 "reward=<python file>:<function>"):  # fmt: skip
        assert part in chosen, part
    folder = tmp_path / "out" / "grpo_budget" / "own" / "seed0"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    with pytest.MonkeyPatch.context() as patch:
        little = type("Memory", (), {"available": 2**28, "total": 2**34})
        patch.setattr(machine.psutil, "virtual_memory", lambda: little)
        assert machine.fit(own(lab_policy), 1).settings["per_device_train_batch_size"] < 32
        assert grpo.main(arguments) == 0
    assert "resuming from" in capsys.readouterr().err
    assert [row["step"] for row in metrics(folder)] == [1, 2]


def test_the_micro_batch_fits_the_memory(lab_policy, monkeypatch):
    """It is the largest that the formulas of `make plan` say fits, and nothing smaller than one is tried."""
    sizes = {}
    for gib in (0.02, 0.25, 0.5, 4):
        memory = type("Memory", (), {"available": gib * 2**30, "total": 2**34})
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda memory=memory: memory)
        try:
            sizes[gib] = machine.fit(own(lab_policy), 1).settings["per_device_train_batch_size"]
        except ConfigError as error:
            sizes[gib] = str(error)
    assert "one completion at a time needs about" in sizes[0.02]
    assert sizes[0.25] <= sizes[0.5] <= sizes[4] == 32
    assert sizes[0.25] < 32


def test_what_is_set_stays(lab_policy):
    settings = machine.fit(own(lab_policy, "per_device_train_batch_size=2", "use_cpu=true", "bf16=true"), 1).settings
    assert (settings["per_device_train_batch_size"], settings["bf16"]) == (2, True)
    steps = machine.fit(own(lab_policy, "gradient_accumulation_steps=16"), 1).settings
    assert "per_device_train_batch_size" not in steps
    lab = compose_recipe("grpo_budget", [])
    assert machine.fit(lab, 1).settings is lab


def test_a_gpu_is_used_where_there_is_one(lab_policy, monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", lambda: (24 * 2**30, 24 * 2**30))
    settings = machine.fit(own(lab_policy), 1).settings
    assert not settings["use_cpu"]
    assert settings["bf16"] and settings["gradient_checkpointing"]


def test_a_model_of_unknown_memory(tmp_path, lab_policy):
    folder = tmp_path / "odd"
    shutil.copytree(lab_policy, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    settings, memory = machine.fit(own(folder), 1)
    assert settings["per_device_train_batch_size"] == machine.CAREFUL
    assert "memory not computed" in memory


def test_a_missing_model_or_file(capsys, tmp_path, lab_policy):
    out = f"output_root={tmp_path}/out"
    assert "model_name_or_path is not set: add model_name_or_path=<folder or hub id>" in refused(
        capsys, "--config-name", "grpo_budget", "scale=own", out
    )
    error = refused(capsys, "--config-name", "grpo_budget", "scale=own", f"model_name_or_path={lab_policy}", out)
    assert "no data set: give data.name=<name> or data.path=<file or folder>" in error


# --- paths, disks, folders ---


@pytest.mark.parametrize(
    "name", ["übung.jsonl", "a,b.jsonl", "a(1).jsonl", "it's.jsonl", "a=b.jsonl", "[x].jsonl", "a b.jsonl"]
)
def test_paths_are_taken_as_they_are(tmp_path, problems, name):
    """Hydra's grammar has meanings for these signs, which no path intends."""
    (tmp_path / name).write_bytes(problems.read_bytes())
    for path in (f"{tmp_path}/{name}", f'"{tmp_path}/{name}"'):
        settings = compose_recipe("grpo_budget", [f"data.path={path}", f"output_root={tmp_path}/{name}"])
        assert settings["data"]["path"] == settings["output_root"] == f"{tmp_path}/{name}"
    assert compose_recipe("grpo_budget", [f"reward={name}.py:f"])["reward_funcs"] == f"{name}.py:f"


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "homes/me")
    settings = compose_recipe("grpo_budget", ["data.path=~/x.jsonl", "model_name_or_path=~/m", "output_root=null"])
    assert (settings["data"]["path"], settings["model_name_or_path"]) == ("homes/me/x.jsonl", "homes/me/m")
    assert settings["output_root"] is None


def test_other_values_say_that_they_want_quotes():
    with pytest.raises(ConfigError, match="run_name=größe cannot be read .*quotes: run_name='größe'"):
        compose_recipe("grpo_budget", ["run_name=größe"])


def test_checkpoints_that_do_not_fit_are_said_before(capsys, tmp_path, lab_policy, problems, monkeypatch):
    usage = type("Usage", (), {"free": 2 * 2**20})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    assert grpo.main(command(tmp_path / "out", lab_policy)) == 0
    said = capsys.readouterr().err
    assert "warning: this run writes 3 checkpoints of about 0.00" in said
    assert "save_total_limit=2" in said
    usage.free = 2**40
    assert grpo.main(command(tmp_path / "other", lab_policy, "max_steps=2")) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_size_of_a_checkpoint(tmp_path, lab_policy):
    """Within a tenth of what is written."""
    assert grpo.main(command(tmp_path, lab_policy, "max_steps=2")) == 0
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0" / "checkpoints" / "checkpoint-2"
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    policy = AutoModelForCausalLM.from_pretrained(lab_policy)
    assert disk.checkpoint_bytes(policy, "adamw_torch", moments=True) == pytest.approx(written, rel=0.1)
    assert disk.checkpoint_bytes(policy, "sgd", moments=False) < written / 2


def test_a_run_without_a_step_gives_its_folder_away(capsys, tmp_path, lab_policy):
    arguments = command(tmp_path, lab_policy, "max_steps=2")
    assert grpo.main(arguments) == 0
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    error = refused_after(capsys, *arguments, "capo.max_policy_shift=1e-3", "temperature=0.7")
    assert "(capo.max_policy_shift, temperature; capo.max_policy_shift was 0.01, now 0.001)" in error
    assert "variant=<name>" in error
    for path in (folder / "checkpoints", folder / "tokens"):
        shutil.rmtree(path)
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert grpo.main([*arguments, "temperature=0.7"]) == 0


def refused_after(capsys, *arguments):
    capsys.readouterr()
    return refused(capsys, *arguments)
