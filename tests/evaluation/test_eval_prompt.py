"""The user's turn and the length of an evaluation, from the command line or from the run."""

import json
import shutil
from types import SimpleNamespace

import pytest

from open_r1_capo.evaluation import EvalError, backends, evaluate, model, suite
from open_r1_capo.tasks.data import prompt_template_hash


def options(**changes):
    return SimpleNamespace(**{"prompt": None, "max_length": None} | changes)


def test_problems_become_the_users_turn(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"problem": "1+{1}", "answer": "2"}\n')
    chosen = suite.select("gsm8k")
    evaluate.prepare_data(chosen, tmp_path, tmp_path / "plain")
    evaluate.prepare_data(chosen, tmp_path, tmp_path / "asked", "Solve {problem}!")
    read = [json.loads((tmp_path / name / "gsm8k" / "test.jsonl").read_text()) for name in ("plain", "asked")]
    assert [row.pop("problem") for row in read] == ["1+{1}", "Solve 1+{1}!"]
    assert read[0] == read[1]
    assert prompt_template_hash("", "Solve {problem}!") != prompt_template_hash("") == prompt_template_hash(None)


def test_a_run_says_how_its_models_are_asked(tiny_policy, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    shutil.copytree(tiny_policy, checkpoint)
    asked = {"prompt": "Solve {problem}", "max_length": 64}
    settings = {"recipe": "grpo", "model_name_or_path": "owner/name", "system_prompt": "Think.", "evaluation": asked}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))
    of_run, base = model.resolve(str(checkpoint)), model.resolve(str(tiny_policy), settings)
    for found in (of_run, base):
        assert (found.system_prompt, found.user_prompt) == ("", "Solve {problem}")
        assert found.context == evaluate.longest(found) == 64
    plain = model.resolve(str(tiny_policy), settings | {"evaluation": {}})
    assert (plain.system_prompt, plain.user_prompt) == ("Think.", "{problem}")
    own = json.loads((tiny_policy / "config.json").read_text())["max_position_embeddings"]
    assert plain.context == own
    assert evaluate.longest(plain) < own


def test_the_command_line_has_the_last_word(tiny_policy, tmp_path):
    policy = model.resolve(str(tiny_policy))
    assert evaluate.as_asked(policy, options()) == policy
    (tmp_path / "p").write_text("Q: {problem}\n")
    found = evaluate.as_asked(policy, options(prompt=str(tmp_path / "p"), max_length=50))
    assert (found.system_prompt, found.user_prompt, found.context) == ("", "Q: {problem}", 50)
    parameters = json.loads(backends.model_yaml(backends.Job(found, backends.Sampling(), tmp_path, tmp_path), port=1))
    assert parameters["model_parameters"]["system_prompt"] is None
    assert parameters["model_parameters"]["max_model_length"] == 50
    (tmp_path / "p").write_text("Q")
    with pytest.raises(EvalError, match=r"the prompt in .*p must hold \{problem\}"):
        evaluate.as_asked(policy, options(prompt=str(tmp_path / "p")))
