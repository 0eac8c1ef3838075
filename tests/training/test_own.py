"""A user's own model, data and reward."""

import json
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from open_r1_capo import grpo
from open_r1_capo.training import build
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
