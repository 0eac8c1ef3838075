"""The vLLM server's life: its command, how it ends, and what is said when it does not come up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_r1_capo.cluster import vllm

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
    port, child = vllm.free_port(), tmp_path / "child"
    return [sys.executable, "-c", SERVER, str(port), str(child)], f"http://127.0.0.1:{port}/health", child


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_server_is_gone_whatever_happens(tmp_path, error):
    command, url, child = fake_server(tmp_path)
    try:
        with vllm.serve(command, url, tmp_path / "log", startup=30) as process:
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
        "import sys, time, json; from pathlib import Path; from open_r1_capo.cluster import vllm\n"
        "from open_r1_capo.evaluation import __main__ as command_line\n"
        "def evaluate(*_):\n"
        "    command, url, log, pid = json.loads(sys.argv[1])\n"
        "    with vllm.serve(command, url, Path(log)) as process:\n"
        "        Path(pid).write_text(str(process.pid)); time.sleep(600)\n"
        "command_line.resolve, command_line.evaluate = (lambda name: None), evaluate\n"
        "sys.exit(command_line.main(['--model', 'x']))"
    )
    pid = tmp_path / "pid"
    arguments = json.dumps([command, url, str(tmp_path / "log"), str(pid)])
    process = subprocess.Popen([sys.executable, "-c", program, arguments], stderr=subprocess.PIPE)
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
    with pytest.raises(vllm.ServerError, match=r"was ready for lack of memory .*OutOfMemoryError: CUDA") as raised:
        vllm.serve(dying, nowhere, log).__enter__()
    assert "CUDA out of memory" in str(raised.value)
    waiting = [sys.executable, "-u", "-c", "import time; print('loading'); time.sleep(600)"]
    with pytest.raises(vllm.ServerError, match=r"was not ready after 2 s; the end of .*log:\nloading"):
        vllm.serve(waiting, nowhere, log, startup=2).__enter__()


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
    assert vllm.parallelism(memory, weights, heads) == sizes


def test_vllm_command(tiny_policy):
    command = vllm.vllm_command("python", tiny_policy, 8000, [], None)
    assert command[command.index("--dtype") + 1] == "float32"
    assert json.loads(command[command.index("--override-generation-config") + 1])["top_k"] == 0
    assert "--tensor-parallel-size" in vllm.vllm_command("python", tiny_policy, 8000, [1 << 34] * 2, None)
