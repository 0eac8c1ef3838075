"""vLLM's commands: `make serve`, the interpreter that has vLLM, and how arguments become flags."""

import json
import socket
from pathlib import Path

import pytest

from open_r1_capo.cluster import serve, vllm
from open_r1_capo.cluster.vllm import ServerError, free_port, gpu_memory, serve_command, vllm_command


def value(command, flag):
    return command[command.index(flag) + 1]


def test_arguments_become_flags():
    words = serve_command(
        "python", vllm.COMMAND_LINE, "m", max_num=2, eager=True, chunks=False, left_out=None, a={"b": 1}
    )
    assert words[:5] == ["python", "-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert words[5:] == ["--max-num", "2", "--eager", "--no-chunks", "--a", '{"b": 1}']


def test_a_model_is_spread_over_the_gpus(tiny_policy):
    words = vllm_command("python", tiny_policy, 8000, [1 << 40] * 2, 64, host="0.0.0.0")
    assert (value(words, "--host"), value(words, "--port"), value(words, "--max-model-len")) == (
        "0.0.0.0",
        "8000",
        "64",
    )
    assert (value(words, "--tensor-parallel-size"), value(words, "--data-parallel-size")) == ("1", "2")
    assert "--enforce-eager" not in words
    on_cpu = vllm_command("python", tiny_policy, 8000, [], None)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(on_cpu)
    assert json.loads(value(on_cpu, "--override-generation-config"))["repetition_penalty"] == 1


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("1", 1), ("", 0)])
def test_visible_gpus_are_counted(monkeypatch, tmp_path, visible, count):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 81559\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory() == [81559 << 20] * count


def test_no_vllm_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "VLLM_PYTHON", tmp_path / "bin" / "python")
    with pytest.raises(ServerError, match=r"no vLLM in .venv-vllm: make serve installs it"):
        vllm.vllm_python()


def test_serve_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "gpu_memory", list)

    def refused(*arguments):
        assert serve.main(["--model", str(tmp_path), *arguments]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use): set PORT=" in refused("--port", str(taken.getsockname()[1]))
    assert "TP × DP is 4, but this machine has 0 GPUs" in refused("--tp", "2", "--dp", "2")
    assert "TP and DP must be at least 1" in refused("--tp", "0")
    assert "PORT must be between" in refused("--port", "70000")
    monkeypatch.setattr(serve, "vllm_python", lambda: Path("/python"))
    assert f"the model {tmp_path} cannot be loaded" in refused("--port", str(free_port()))


def test_serve_starts_a_server_that_takes_weights(tiny_policy, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "gpu_memory", list)
    monkeypatch.setattr(serve, "vllm_python", lambda: Path("/python"))
    monkeypatch.setattr(serve.os, "execve", lambda *call: started.append(call))
    port = str(free_port())
    serve.main(["--model", str(tiny_policy), "--port", port, "--host", "127.0.0.1"])
    ((python, words, environment),) = started
    assert (str(python), words[words.index("--port") + 1]) == ("/python", port)
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_serve_on_gpus(tiny_policy, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "gpu_memory", lambda: [1 << 40] * 4)
    monkeypatch.setattr(serve, "vllm_python", lambda: Path("/python"))
    monkeypatch.setattr(serve.os, "execve", lambda *call: started.append(call))
    serve.main(["--model", str(tiny_policy), "--port", str(free_port()), "--tp", "2", "--dp", "1"])
    ((_, words, environment),) = started
    assert (value(words, "--tensor-parallel-size"), value(words, "--data-parallel-size")) == ("2", "1")
    assert value(words, "--weight-transfer-config") == '{"backend": "nccl"}'
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
