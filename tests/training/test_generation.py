"""The generation backends against stand-ins of vLLM that sample exactly: what is sent, retried, refused, resumed."""

import argparse
import gc
import importlib.util
import itertools
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from open_r1_capo import grpo
from open_r1_capo.cluster.vllm import answers, free_port
from open_r1_capo.runs.checkpoints import newest_complete
from open_r1_capo.training.generation import adapter, backend, choice
from open_r1_capo.training.generation.backend import GenerationError, Sampling, Unavailable, retry
from open_r1_capo.training.generation.colocate import WORKER, VLLMChild
from open_r1_capo.training.generation.server import VLLMServers
from test_grpo import command, metrics, same_run

STAND_INS = Path(__file__).parents[1] / "stand_ins"
spec = importlib.util.spec_from_file_location("stand_in_vllm", STAND_INS / "vllm.py")
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)

SAMPLING = Sampling(6, temperature=0.9)
PROMPTS = [[5, 6, 7]] * 3 + [[8, 9]] * 3
NEAR = "sampling/sampling_logp_difference"


@pytest.fixture
def servers(tiny_policy):
    """Start stand-in servers: `servers(count, **options)`."""
    started = []

    def start(model=tiny_policy, **options):
        started.append(stand_in.Server(model, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def child(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    engine = {"model": str(tiny_policy)}
    one = VLLMChild([sys.executable, str(WORKER)], engine, tmp_path / "log", sleep=lambda seconds: None)
    yield one
    one.close()


@pytest.fixture
def other_weights(tiny_policy, tmp_path):
    """The tiny policy with every weight doubled, as `sync` wants it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def client(*urls, model="", timeout=0.2):
    return VLLMServers(list(urls), str(model), timeout, sleep=lambda seconds: None)


def logps_of(folder, prompt, ids, temperature=0.9):
    """What transformers says of a completion."""
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([prompt + ids])).logits
    law = (logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return law.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


# --- the backends ----------------------------------------------------------------------------------------------------


def test_every_backend_draws_the_same_completions(tiny_policy, servers, child, other_weights):
    """One server, two of them, and the child agree on every token, before and after new weights."""
    one, two = servers(), servers()
    backends = [client(one.url, model=tiny_policy), client(one.url, two.url, model=tiny_policy), child]
    for every in backends:
        every.start()
    before = [every.generate(PROMPTS, SAMPLING, seed=11) for every in backends]
    assert before[0] == before[1] == before[2]
    assert len({tuple(found.ids) for found in before[0]}) == len(PROMPTS)  # equal prompts, different seeds
    for every in backends:
        every.sync(other_weights)
    after = [every.generate(PROMPTS, SAMPLING, seed=11) for every in backends]
    assert after[0] == after[1] == after[2] != before[0]
    for folder, found in ((tiny_policy, before[0]), (other_weights, after[0])):
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = logps_of(folder, prompt, completion.ids)
            assert completion.logps == pytest.approx(expected, abs=1e-5)
    assert client_requests(two) == 2  # one of the two prompts, twice


def client_requests(server):
    return sum(path == "/v1/completions" for path, _ in server.requests)


def test_a_completion_depends_on_its_own_seed_alone(tiny_policy, servers):
    one = client(servers().url, model=tiny_policy)
    one.start()
    whole = one.generate(PROMPTS, SAMPLING, seed=7)
    assert [found.ids for found in one.generate(PROMPTS[2:], SAMPLING, seed=9)] == [found.ids for found in whole[2:]]


def test_a_failing_request_is_repeated(tiny_policy, servers, other_weights):
    server = servers()
    one = client(server.url, model=tiny_policy)
    one.start()
    one.sync(other_weights)
    expected = one.generate(PROMPTS, SAMPLING, seed=3)
    server.broken = len(backend.WAITS)
    assert one.generate(PROMPTS[:3], SAMPLING, seed=3) == expected[:3]
    server.broken = 3 * len(backend.WAITS)
    with pytest.raises(GenerationError, match=rf"server at {server.url} is gone .*the engine died"):
        one.generate(PROMPTS, SAMPLING, seed=3)


def test_a_restarted_server_gets_the_weights_again(tiny_policy, servers, other_weights):
    """It comes back with the base weights, between two attempts."""
    server = servers()
    one = client(server.url, model=tiny_policy)
    one.start()
    one.sync(other_weights)
    expected = one.generate(PROMPTS[:3], SAMPLING, seed=3)
    server.close()
    assert not answers(f"{server.url}/health")
    revived = []
    one.sleep = lambda seconds: revived or revived.append(servers(port=server.http.server_port))
    assert one.generate(PROMPTS[:3], SAMPLING, seed=3) == expected
    assert len(revived) == 1


@pytest.mark.parametrize("asked", [0, 1])
def test_a_restart_that_no_request_notices(tiny_policy, servers, other_weights, asked):
    """Between the weights and the first request, or between two requests: the base weights would answer."""
    server = servers()
    one = client(server.url, model=tiny_policy)
    one.start()
    one.sync(other_weights)
    expected = one.generate(PROMPTS, SAMPLING, seed=3)
    complete, calls = one._complete, itertools.count()

    def restarted(url, body):
        if next(calls) == asked:
            server.close()
            servers(port=server.http.server_port)
        return complete(url, body)

    one._complete = restarted
    one._each = lambda calls: [one._patiently(*call) for call in calls]  # in order
    assert one.generate(PROMPTS, SAMPLING, seed=3) == expected


def test_a_dead_child_is_started_again(child, other_weights):
    child.start()
    child.sync(other_weights)
    expected = child.generate(PROMPTS, SAMPLING, seed=3)
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.generate(PROMPTS, SAMPLING, seed=3) == expected


def test_a_child_that_cannot_load_shows_its_log(child):
    child.engine = {"model": "/nowhere"}
    with pytest.raises(GenerationError, match=r"(?s)vLLM did not start .*nowhere.*the end of .*log:\n.*loading"):
        child.start()
    assert child.process is None
    child.command = ["/nowhere/python"]
    with pytest.raises(GenerationError, match=r"vLLM did not start .*No such file"):
        child.start()


def test_back_off_doubles_and_is_bounded():
    waits, calls, recoveries = [], itertools.count(), itertools.count()

    def fails():
        next(calls)
        raise Unavailable("no")

    with pytest.raises(Unavailable):
        retry(fails, lambda: next(recoveries), sleep=waits.append)
    assert next(calls) == 5
    assert next(recoveries) == 4
    assert waits == [1, 2, 4, 8]


def test_an_unknown_log_probability_is_nan(tiny_policy, servers, monkeypatch):
    server = servers()
    answer = server.answer

    def without(path, body):
        code, data = answer(path, body)
        if path == "/v1/completions":
            data["choices"][0]["logprobs"]["token_logprobs"][1] = None
        return code, data

    monkeypatch.setattr(server, "answer", without)
    one = client(server.url, model=tiny_policy)
    one.start()
    (found,) = one.generate([[5, 6]], SAMPLING, seed=0)
    assert [math.isnan(value) for value in found.logps] == [False, True, False, False, False, False]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_servers_that_cannot_be_used(tiny_policy, servers):
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(GenerationError, match=f"no vLLM server answers at {nobody} after 0 s: start one with make"):
        client(nobody, model=tiny_policy).start()
    other = servers(root="/models/other")
    with pytest.raises(GenerationError, match=r"serves /models/other, not .*policy: stop it and run make serve"):
        client(other.url, model=tiny_policy).start()
    closed = client(servers(development=False).url, model=tiny_policy)
    closed.start()
    with pytest.raises(GenerationError, match="takes no new weights: start it with make serve"):
        closed.sync(tiny_policy)


def test_a_hub_models_snapshot_is_that_model(servers, tiny_policy):
    there = servers(root="/cache/models--Qwen--Qwen2.5-Math-7B/snapshots/abc")
    client(there.url, model="Qwen/Qwen2.5-Math-7B").start()
    with pytest.raises(GenerationError, match="not Qwen/Qwen2.5-Math-1.5B"):
        client(there.url, model="Qwen/Qwen2.5-Math-1.5B").start()


@pytest.fixture
def settings():
    values = {"use_vllm": True, "vllm_mode": "server", "use_cpu": True, "vllm_server_host": "0.0.0.0"}
    values |= {"vllm_server_port": 8000, "vllm_server_base_url": None, "vllm_server_timeout": 1.0, "process_index": 0}
    values |= {"vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "bf16": False}
    return argparse.Namespace(**values)


def test_the_backend_follows_the_recipe_and_the_machine(settings, tmp_path, tiny_policy, monkeypatch):
    found = choice.backend_for(settings, "m", tmp_path)
    assert found.urls == ["http://127.0.0.1:8000"]
    settings.vllm_server_base_url = "http://a:1/, http://b:2"
    assert choice.backend_for(settings, "m", tmp_path).urls == ["http://a:1", "http://b:2"]
    settings.use_cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(GenerationError, match="weights are sent to one vLLM server"):
        choice.backend_for(settings, "m", tmp_path)
    settings.vllm_server_base_url = "localhost:8000"
    with pytest.raises(GenerationError, match="must be addresses such as .* got 'localhost:8000'"):
        choice.backend_for(settings, "m", tmp_path)
    settings.vllm_mode = "colocate"
    assert choice.backend_for(settings, "m", tmp_path) is None  # TRL's own
    settings.use_cpu = True
    monkeypatch.setattr(choice, "vllm_python", lambda: Path("/python"))
    assert choice.backend_for(settings, str(tiny_policy), tmp_path).engine["dtype"] == "float32"
    settings.use_vllm = False
    assert choice.backend_for(settings, "m", tmp_path) is None


# --- whole runs ------------------------------------------------------------------------------------------------------


def by_server(root, policy, server, *overrides):
    return command(
        root, policy, "generation=vllm_server", f"vllm_server_base_url={server.url}", "vllm_server_timeout=1",
        "max_completion_length=8", "save_steps=6", *overrides,
    )  # fmt: skip


def by_child(root, policy, *overrides):
    return command(root, policy, "generation=vllm_colocate", "max_completion_length=8", "save_steps=6", *overrides)


@pytest.fixture
def no_waiting(monkeypatch):
    patient = VLLMServers.__init__

    def hasty(self, urls, model, timeout, sleep=None):
        patient(self, urls, model, timeout, sleep=lambda seconds: None)

    monkeypatch.setattr(VLLMServers, "__init__", hasty)


def test_a_run_through_a_server_ends_at_a_checkpoint_and_goes_on(lab_policy, tmp_path, servers, capsys, no_waiting):
    """The server dies for good within step 4; what the same command makes later is the uninterrupted run."""
    server = servers(lab_policy)
    assert grpo.main(by_server(tmp_path / "whole", lab_policy, server)) == 0
    whole = tmp_path / "whole" / "capo_aggressive" / "lab" / "seed0"
    rows = metrics(whole)
    assert all(0 < row[f"{NEAR}/max"] < 1e-4 and 0 < row[f"{NEAR}/mean"] < 1e-5 for row in rows)
    assert not (whole / "weights").exists()

    gc.collect()
    server.requests.clear()
    answer = server.answer

    def mortal(path, body):
        syncs = sum(past == "/collective_rpc" for past, _ in server.requests)
        return (500, {"error": "dead"}) if path == "/v1/completions" and syncs >= 4 else answer(path, body)

    server.answer = mortal
    assert grpo.main(by_server(tmp_path, lab_policy, server)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: stopped after step 3, from which the same command resumes: the vLLM server at")
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    assert newest_complete(folder / "checkpoints")[0].name == "checkpoint-3"
    server.answer = answer
    gc.collect()
    assert grpo.main(by_server(tmp_path, lab_policy, server)) == 0
    same_run(folder, whole)


def test_a_run_through_a_child_is_the_servers(lab_policy, tmp_path, servers, monkeypatch, no_waiting):
    """And TRL's importance sampling correction works with it."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setattr(choice, "vllm_python", lambda: Path(sys.executable))
    folders = [tmp_path / name / "capo_aggressive" / "lab" / "seed0" for name in ("a", "b", "c")]
    assert grpo.main(by_server(tmp_path / "a", lab_policy, servers(lab_policy), "max_steps=2")) == 0
    assert grpo.main(by_child(tmp_path / "b", lab_policy, "max_steps=2")) == 0
    assert metrics(folders[0]) == metrics(folders[1])
    corrected = by_child(tmp_path / "c", lab_policy, "max_steps=2", "vllm_importance_sampling_correction=true")
    assert grpo.main(corrected) == 0
    for row in metrics(folders[2]):
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert 0 < row[f"{NEAR}/max"] < 1e-4


def test_a_server_that_keeps_its_weights_is_found_out(lab_policy, tmp_path, servers, capsys, tiny_policy, no_waiting):
    server = servers(tiny_policy, root=lab_policy)
    server.llm.collective_rpc = lambda method, kwargs: None
    assert grpo.main(by_server(tmp_path, lab_policy, server)) == 2
    assert "log-probabilities that differ by" in capsys.readouterr().err


def test_an_absent_server_leaves_no_folder(lab_policy, tmp_path, capsys, servers):
    server = servers()
    server.close()
    assert grpo.main(by_server(tmp_path, lab_policy, server, "vllm_server_timeout=0.1")) == 2
    assert "no vLLM server answers at" in capsys.readouterr().err
    assert not (tmp_path / "capo_aggressive" / "lab" / "seed0" / "config.yaml").exists()


def test_seeds_differ_by_run_step_and_call():
    found = {adapter.completion_seed(*key) for key in itertools.product(range(3), range(50), range(2))}
    assert len(found) == 300
    assert all(0 <= seed < 2**31 - 2**20 for seed in found)
