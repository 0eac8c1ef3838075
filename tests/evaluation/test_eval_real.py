"""`make eval` for real, through vLLM and through transformers; minutes, so only with CAPO_EVAL_TESTS=1."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not os.environ.get("CAPO_EVAL_TESTS"), reason="minutes: set CAPO_EVAL_TESTS=1")


def servers():
    """Command lines of the vLLM servers of this machine that serve one of our policies."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "openai.api_server" in command and str(ROOT / ".venv-vllm") in command:
            found.append(process.parent.name)
    return found


def evaluate(policy, out, *settings):
    command = ["make", "eval", f"MODEL={policy}", f"OUT={out}", "TASKS=lab_base,lab_story", "SAMPLES=8", *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_both_backends_agree_and_no_server_stays(lab_policy, tmp_path):
    rows = []
    for backend in ("vllm", "transformers"):
        done = evaluate(lab_policy, tmp_path / backend, f"BACKEND={backend}")
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((tmp_path / backend / "results.json").read_text())["tasks"])
    for name, row in rows[0].items():
        other = rows[1][name]
        # four standard errors: two comparisons that are wrong once in ten thousand runs
        error = (row["stderr_samples"] ** 2 + other["stderr_samples"] ** 2) ** 0.5
        assert abs(row["accuracy"] - other["accuracy"]) <= 4 * error + 1e-9
    assert servers() == []


def test_interrupted_evaluation_stops_its_server_and_resumes(lab_policy, tmp_path):
    out = tmp_path / "out"
    command = [
        "make",
        "eval",
        f"MODEL={lab_policy}",
        f"OUT={out}",
        "TASKS=lab_base,lab_story",
        "SAMPLES=8",
        "BACKEND=vllm",
    ]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(out.glob("samples/*/answers.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers()
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
    assert process.wait(timeout=120) != 0
    assert servers() == []
    answered = next(out.glob("samples/*/answers.jsonl")).read_text().count("\n")
    assert 0 < answered < 400
    assert evaluate(lab_policy, out, "BACKEND=vllm").returncode == 0
    log = next(out.glob("samples/*/server.log")).read_text()
    assert log.count("POST /v1/chat/completions") <= 400 - answered + 1
