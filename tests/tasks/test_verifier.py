"""The verifier: verdicts, order, hard timeouts, and workers that die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from open_r1_capo.tasks import verifier as module
from open_r1_capo.tasks.verifier import Verifier, essence

BENCHMARKS = Path(os.environ.get("CAPO_BENCHMARKS") or Path(__file__).parents[3] / "shared" / "benchmarks")

HOSTILE = [
    "x" * 1_000_000,
    "7 " * 500_000,
    "\\boxed{" * 150_000,
    "\\boxed{10^{10^{10}}}",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{1000000000!}",
    "\\boxed{" + "\\frac{1}{" * 3000 + "1" + "}" * 3000 + "}",
    "\\boxed{" + "(" * 5000 + "}",
    "\\boxed{\\frac{1}{2",
    "\\boxed{}}}}{{{",
    "import os\nos.system('echo 7')\n",
    "\0" * 1000,
    "\\boxed{\0\0}",
    "😀" * 100_000,
    "\ud800",
    "",
    "$" * 10_000,
    "\\boxed{\\sum_{n=1}^{10^9} \\frac{1}{n^2}}",
]


@pytest.fixture(scope="module")
def verifier():
    pool = Verifier(workers=2, timeout=1.0)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("4", "so it is \\boxed{4}", True),
        ("4", "\\boxed{3} cannot be right because 3 is odd. So it is \\boxed{4}", True),
        ("3, 4", "\\boxed{3} and \\boxed{4}", True),
        ("4", "\\boxed{5}, although 4 came first", False),
        ("\\frac{1}{2}", "The answer is 0.5.", True),
        ("\\frac{1}{2}", "$x = \\frac{2}{4}$", True),
        ("1/2", "\\boxed{\\dfrac12}", True),
        ("\\frac{1}{2}", "\\boxed{1}", False),
        ("1,234", "\\boxed{1234}", True),
        ("$2$, $3$", "\\boxed{2, 3}", True),
        ("(1, 2)", "\\boxed{(2, 1)}", False),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
        ("\\text{Evelyn}", "\\boxed{\\text{Carla}}", False),
        ("so the answer is $7$", "\\boxed{7}", True),
        ("4", "no idea", False),
        ("4", "", False),
        ("", "\\boxed{4}", None),
        ("\\boxed{}", "\\boxed{4}", None),
    ],
)
def test_verdict(verifier, gold, answer, verdict):
    assert verifier.verify([(gold, answer)]) == [verdict]


def test_order_number_and_duplicates(verifier):
    pairs = [(str(i % 5), f"step {i}: \\boxed{{{i % 7}}}") for i in range(105)] + [("", "\\boxed{1}")]
    before = verifier.counts["verified"]
    assert verifier.verify(pairs) == [i % 5 == i % 7 for i in range(105)] + [None]
    assert verifier.counts["verified"] - before <= 36
    assert verifier.verify([]) == []


def test_repeated_pairs_cost_next_to_nothing(verifier):
    pairs = [(str(i), f"3+4={i}, so \\boxed{{{i}}}") for i in range(96)]
    verifier.verify(pairs)
    started = time.perf_counter()
    assert verifier.verify([(gold, f"other words, {answer}") for gold, answer in pairs]) == [True] * 96
    assert time.perf_counter() - started < 0.1


def test_hostile_answers_cost_at_most_the_timeout_and_score_zero(verifier):
    started = time.perf_counter()
    pairs = [("4", answer) for answer in HOSTILE]
    pairs.insert(9, ("4", "\\boxed{4}"))
    verdicts = verifier.verify(pairs)
    assert verdicts.pop(9) is True
    assert verdicts == [False] * len(HOSTILE)
    # a killed worker's successor takes about a second to start; 20 s leaves room for a busy machine
    assert time.perf_counter() - started < len(HOSTILE) * verifier.timeout + 20
    assert verifier.verify([("8", "\\boxed{8}"), ("8", "\\boxed{9}")]) == [True, False]


def test_gold_answer_that_cannot_be_read_in_time_gives_none(verifier):
    nested = "\\frac{1}{" * 3000 + "1" + "}" * 3000
    assert verifier.verify([(nested, "\\boxed{3}"), ("3", "\\boxed{3}")]) == [None, True]


def test_killed_workers_change_no_verdict():
    pool = Verifier(workers=2, timeout=30)  # of wall time: a successor may start slowly
    pairs = [(f"\\frac{{{i}}}{{7}}", f"\\boxed{{\\frac{{{2 * i + i % 2}}}{{14}}}}") for i in range(300)]
    expected = [i % 2 == 0 for i in range(300)]
    killed = []

    def kill():
        for _ in range(200):
            for worker in list(pool._workers):
                if worker.ready and worker.job and len(killed) < 3:
                    os.kill(worker.process.pid, signal.SIGKILL)
                    killed.append(worker.process.pid)
                    break
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert pool.verify(pairs) == expected
    assert killed
    assert pool.counts["restarts"] >= 1
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)  # an idle one
    assert pool.verify([("5", "\\boxed{5}"), ("6", "\\boxed{5}")]) == [True, False]
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_interrupted_batch_leaves_no_stale_verdict(verifier, monkeypatch):
    def interrupt(self, worker, verdicts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "_hear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            verifier.verify([("101", "\\boxed{101}"), ("102", "\\boxed{102}")])
    assert verifier.verify([("103", "\\boxed{1}"), ("104", "\\boxed{104}")]) == [False, True]


def test_works_off_the_main_thread(verifier):
    found = []
    thread = threading.Thread(target=lambda: found.extend(verifier.verify([("11", "\\boxed{11}")])))
    thread.start()
    thread.join()
    assert found == [True]


def test_forked_child_starts_its_own_workers(verifier):
    verifier.verify([("12", "\\boxed{12}")])
    child = os.fork()
    if child == 0:
        os._exit(0 if verifier.verify([("13", "\\boxed{13}")]) == [True] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifier.verify([("14", "\\boxed{14}")]) == [True]


def test_workers_that_do_not_start_are_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = Verifier(workers=1)
    with pytest.raises(RuntimeError, match="do not start"):
        pool.verify([("1", "\\boxed{1}")])


def test_neither_the_module_nor_a_worker_imports_torch():
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1], run_name='worker')['_judge']('4', '4');"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, module.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("a \\boxed{\\frac{1}{2}} b", "\\boxed{\\frac{1}{2}}"),
        ("$x=\\boxed{5}$.", "\\boxed{5}"),
        ("\\boxed{4} or \\boxed{5}", None),
        ("\\boxed{5} \\%", None),
        ("\\boxed{5} and {x}", None),
        ("\\boxed{5}. The final answer is $6$.", None),
        ("\\boxed{5", None),
        ("no box", None),
    ],
)
def test_essence(answer, short):
    assert essence(answer) == (short or answer)


def test_essence_of_a_long_answer_holds_its_last_box():
    assert essence("a" * 1_000_000 + " \\boxed{7} " + "b" * 1000) == "\\boxed{7}"
    assert essence("\\boxed{7} " + "b" * 1_000_000) == "\\boxed{7}"
    assert len(essence("\\boxed{1} \\boxed{7} " + "b}" * 1_000_000)) == module.WINDOW


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no folder of benchmarks")
def test_essence_keeps_the_extraction_of_math_solutions():
    with (BENCHMARKS / "math_train.jsonl").open() as lines:
        solutions = [json.loads(line)["solution"] for _, line in zip(range(300), lines, strict=False)]
    for solution in solutions:
        assert str(module._extract(essence(solution))) == str(module._extract(solution)), solution
