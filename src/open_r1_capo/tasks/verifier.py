"""Is an answer mathematically the gold answer? math-verify in worker processes, with a hard time limit.

math-verify interrupts itself with signals, which fail off the main thread and cannot stop a long C call. Here it
runs in worker processes without any timer, and the parent kills a worker that overruns. A worker is this file run
as a script, not a `multiprocessing` child: spawning would import the trainer's `__main__`, and torch with it. So this
file imports nothing of the package, and its interpreter needs math-verify alone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TIMEOUT = 5.0  # seconds one answer may take, math-verify's own default
STARTUP = 120.0  # seconds a worker may take to import sympy on a busy machine
MEMORY = 4 << 30  # bytes of address space of a worker: 10^10^10 must not take the machine down
WINDOW = 16_384  # characters of an answer that are read
ATTEMPTS = 3  # fresh workers that one answer may bring down before it scores 0
CACHE = 65_536  # verdicts remembered between calls, 100 bytes each

# --- what math-verify is asked ---------------------------------------------------------------------------------------


def box_end(text: str, start: int) -> int:
    """The index after the brace that closes the first one from `start` on, or -1 if none does."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index + 1
    return -1


def essence(answer: str) -> str:
    r"""Shorten an answer to the part that decides its verdict, at most WINDOW characters.

    An answer with one `\boxed{…}` and nothing after it that math-verify could read as part of it becomes that box
    alone, so that completions which differ only in their reasoning are verified once. A very long answer is cut to
    the window that holds its last box, or else to its end.
    """
    box = answer.rfind("\\boxed")
    if len(answer) > WINDOW:
        start = len(answer) - WINDOW
        answer = answer[start:] if box < 0 or box >= start else answer[box : box + WINDOW]
        box = answer.rfind("\\boxed")
    if box < 0 or not answer.startswith("{", box + 6) or answer.find("\\boxed") != box or "\\fbox" in answer:
        return answer
    end = box_end(answer, box)
    content, rest = answer[box + 7 : end - 1], answer[end:]
    if end < 0 or not content.strip() or "$" in content or re.search(r"[}%]|percent|pct", rest, re.IGNORECASE):
        return answer
    return answer if re.search("final answer is", answer, re.IGNORECASE) else answer[box:end]


def _gold_text(solution: str) -> str:
    """Box a bare gold answer; text with delimiters or of several plain words (a sentence) stays as it is."""
    # math-verify reads an undelimited fraction as the number in its numerator
    delimited = any(mark in solution for mark in ("\\boxed", "$", "\\(", "\\["))
    prose = re.search(r"(?<![\\{\w])[A-Za-z]{2,}(\s+[A-Za-z]{2,}){2,}", solution)
    return solution if delimited or prose or not solution.strip() else f"\\boxed{{{solution.strip()}}}"


def _extract(text: str, strict: bool = False) -> list:
    """Extract from `text` the box if it has one, else a stated answer, else (but not if `strict`) the last expression.

    If `strict`, a stated answer counts only as LaTeX between dollar signs.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not strict)
    targets = (latex,) if strict else (latex, ExprExtractionConfig())
    # first match: a box that cannot be parsed is not rescued by some other number of the completion
    return parse(text, targets, extraction_mode="first_match", parsing_timeout=None)


_extract_gold = functools.lru_cache(maxsize=4096)(_extract)


def _judge(gold: str, answer: str | None, strict: bool = False) -> bool | None:
    """Compare in this process; None if the gold answer cannot be parsed. Without an answer, only that is asked."""
    from math_verify import verify

    golds = _extract_gold(gold)
    if not golds:
        return None
    return answer is None or bool(verify(golds, _extract(answer, strict), timeout_seconds=None))


def _warm_up() -> None:
    """Import sympy and build the grammar."""
    _judge("\\boxed{\\frac{1}{2}}", "$0.5$")


# --- worker processes ------------------------------------------------------------------------------------------------


def serve(timeout: float, judge: Callable[[str, str | None], float | None], warm_up: Callable[[], object]) -> None:
    """Answer one JSON line [gold, answer] after the other by `judge`, until the parent closes the connection."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a stray print must not look like a verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    warm_up()
    replies.write(b'"ready"\n')
    for line in requests:
        # a worker whose parent was killed in mid-answer would otherwise go on for ever
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 2 * timeout) + 2, resource.RLIM_INFINITY))
        try:
            verdict = judge(*json.loads(line))
        except Exception:  # MemoryError and RecursionError in corners that no library guards
            verdict = False
        replies.write(json.dumps(verdict).encode() + b"\n")


@dataclass
class _Job:
    """One pair to judge: where its verdict goes, and the time and the workers it may still use up."""

    index: int
    gold: str
    answer: str | None  # None: can the gold answer be parsed at all?
    seconds: float
    attempts: int = ATTEMPTS


class _Worker:
    """One worker process, the connection to it, and the job it is at."""

    def __init__(self, command: Sequence[str]) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONSAFEPATH": "1"},  # else data.py beside this file would shadow others
                start_new_session=True,  # Ctrl-C is the parent's business
            )
        self.replies = self.socket.makefile("rb")
        self.ready, self.job = False, None
        self.deadline = time.monotonic() + STARTUP

    def send(self, job: _Job) -> None:
        self.job, self.deadline = job, time.monotonic() + job.seconds
        self.socket.settimeout(max(job.seconds, 0.001))
        self.socket.sendall(json.dumps([job.gold, job.answer]).encode() + b"\n")

    def receive(self) -> object:
        """Return the worker's next message; raise OSError if it died."""
        if not (line := self.replies.readline()):
            raise ConnectionError("the worker died")
        return json.loads(line)

    def close(self) -> str:
        """Kill the process and return the last line it wrote to stderr."""
        self.process.kill()
        self.replies.close()
        self.socket.close()
        with self.process.stderr as stream:
            last = stream.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
        self.process.wait()
        return last


class Verifier:
    """A pool of worker processes that compares answers with gold answers, each within a hard time limit.

    A subclass judges something else: `program` is what a worker runs, which calls `serve`, and `job` what it is sent.

    An answer that takes longer than `timeout` seconds scores 0. The workers start with the first call, in `python`,
    an interpreter that has math-verify. `counts` has verified, cached, timeouts, restarts and unparseable.
    """

    program: Sequence[str] = (__file__,)

    def __init__(self, workers: int | None = None, timeout: float = TIMEOUT, python: str | None = None) -> None:
        self.python = python or sys.executable
        self.size = workers or min(4, os.cpu_count() or 1)
        self.timeout = timeout
        self.counts: Counter[str] = Counter()
        self._workers: list[_Worker] = []
        self._waiting: deque[_Job] = deque()
        self._cache: OrderedDict[bytes, float | None] = OrderedDict()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._failed_starts = 0
        atexit.register(self.close)

    def job(self, gold: str, answer: str) -> tuple[str, str]:
        """What of a pair decides its verdict; equal jobs are judged once."""
        return _gold_text(gold), essence(answer)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Judge (gold, answer) pairs; equal pairs are judged once, also across calls.

        A verdict is None where the gold answer cannot be parsed. Raises RuntimeError if the workers do not start.
        """
        jobs = [self.job(gold, answer) for gold, answer in pairs]
        keys = [hashlib.blake2b(json.dumps(job).encode(), digest_size=16).digest() for job in jobs]
        with self._lock:
            todo = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._cache}
            verdicts = dict(zip(todo, self._run(list(todo.values())), strict=True))
            results = [verdicts[key] if key in verdicts else self._cache[key] for key in keys]
            self._cache.update(zip(keys, results, strict=True))
            while len(self._cache) > CACHE:
                self._cache.popitem(last=False)
        self.counts.update(verified=len(todo), cached=len(jobs) - len(todo), unparseable=results.count(None))
        return results

    def close(self) -> None:
        """Kill the workers; the next call starts new ones. Does nothing in a forked child."""
        if os.getpid() == self._owner:
            for worker in list(self._workers):
                self._discard(worker)

    def _run(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        """Judge distinct pairs in the workers."""
        if os.getpid() != self._owner:  # a forked child must not share the parent's connections
            self._workers, self._owner = [], os.getpid()
        verdicts: list[float | None] = [None] * len(pairs)
        self._waiting = deque(_Job(index, *pair, self.timeout) for index, pair in enumerate(pairs))
        try:
            while self._waiting or any(worker.job for worker in self._workers):
                self._assign()
                for worker in self._due():
                    self._hear(worker, verdicts)
        finally:
            for worker in [worker for worker in self._workers if worker.job]:
                self._discard(worker)  # left by an exception: its verdict would be taken for the next job's
        return verdicts

    def _assign(self) -> None:
        """Start missing workers and give every idle one a job."""
        at_work = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self.size, len(self._waiting) + at_work):
            self._workers.append(_Worker([self.python, *self.program, str(self.timeout)]))
        for worker in [worker for worker in self._workers if worker.ready and not worker.job]:
            if self._waiting:
                with contextlib.suppress(OSError):  # it died while idle: _hear finds out
                    worker.send(self._waiting.popleft())

    def _due(self) -> list[_Worker]:
        """Wait for messages and deadlines; return the workers that have one."""
        busy = [worker for worker in self._workers if worker.job or not worker.ready]
        seconds = min(worker.deadline for worker in busy) - time.monotonic()
        heard, _, _ = select.select([worker.socket for worker in busy], [], [], max(0.0, seconds))
        return [worker for worker in busy if worker.socket in heard or time.monotonic() >= worker.deadline]

    def _hear(self, worker: _Worker, verdicts: list[float | None]) -> None:
        """Take a worker's message; replace it if it died or overran, and try its job again in the time left."""
        job = worker.job
        try:
            if time.monotonic() >= worker.deadline:
                raise TimeoutError
            message = worker.receive()
        except OSError:
            self._replace(worker, verdicts)
        else:
            if job:  # of a pair that failed, only the gold answer was asked about
                verdicts[job.index] = message if job.answer is not None else (False if message else None)
                worker.job = None
            worker.ready, self._failed_starts = True, 0

    def _replace(self, worker: _Worker, verdicts: list[float | None]) -> None:
        job, left = worker.job, worker.deadline - time.monotonic()
        reason = self._discard(worker)
        self.counts["restarts"] += 1
        if not job:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise RuntimeError(f"the workers of the accuracy reward do not start: {reason or 'no message'}")
        elif left > 0 and job.attempts > 1:
            self._waiting.appendleft(replace(job, seconds=left, attempts=job.attempts - 1))
        elif job.answer is not None:  # was it this answer, or can the gold answer not be read?
            self.counts["timeouts"] += 1
            self._waiting.append(replace(job, answer=None, seconds=self.timeout))
        else:
            verdicts[job.index] = None

    def _discard(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.close()


class StrictVerifier(Verifier):
    """A `Verifier` for which an answer that is neither boxed nor stated as the answer is wrong."""

    program = (__file__, "strict")


strict_verifier = functools.cache(StrictVerifier)
default_verifier = functools.cache(Verifier)  # the pool of this process, started by its first answer


if __name__ == "__main__":
    serve(float(sys.argv[-1]), functools.partial(_judge, strict="strict" in sys.argv), _warm_up)
