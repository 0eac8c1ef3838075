"""A vLLM engine beside a training process on the CPU, in a child process with the interpreter that has vLLM.

vLLM for the CPU cannot share an environment with the trainer; its engine ends with the trainer, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_r1_capo.cluster.vllm import die_with_parent, stop, tail, vllm_environment
from open_r1_capo.training.generation.backend import Backend, Completion, GenerationError, Sampling, Unavailable, retry

WORKER = Path(__file__).with_name("worker.py")
STARTUP = 600.0  # seconds that loading the model may take
CALL_SECONDS = 1800.0
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # the trainer's


class VLLMChild(Backend):
    """One vLLM engine in a child process (`command` runs `worker.py`), started again if it dies."""

    def __init__(
        self, command: Sequence[str], engine: dict[str, Any], log: Path, sleep: Callable[[float], None] = time.sleep
    ):
        self.command, self.engine, self.log, self.sleep = list(command), engine, log, sleep
        self.process: subprocess.Popen | None = None
        self.weights: Path | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def start(self) -> None:
        """Start the engine and load the model; raises GenerationError with the end of its log if that fails."""
        try:
            self._launch()
        except (OSError, Unavailable) as error:
            self.close()
            raise GenerationError(f"vLLM did not start ({error}); the end of {self.log}:\n{tail(self.log)}") from None

    def sync(self, folder: Path) -> None:
        """As `Backend.sync`."""
        self.weights = folder.resolve() / "model.safetensors"
        self._patiently("sync", weights=str(self.weights))

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """As `Backend.generate`."""
        drawn = self._patiently("generate", prompts=prompts, sampling=sampling.request(), seed=seed)
        return [Completion(ids, [math.nan if value is None else value for value in logps]) for ids, logps in drawn]

    def close(self) -> None:
        """End the engine."""
        if self.process:
            self.process.stdin.close()
            stop(self.process)
            self.process.stdout.close()
            self.process = None

    def _patiently(self, do: str, **arguments: Any) -> Any:
        try:
            return retry(lambda: self._ask(do, CALL_SECONDS, **arguments), self._recover, sleep=self.sleep)
        except Unavailable as error:
            raise GenerationError(
                f"the vLLM engine beside the trainer is gone ({error}); the end of {self.log}:\n{tail(self.log)}"
            ) from None

    def _recover(self) -> None:
        """Start a dead engine again, with the weights that the last one had."""
        if self.process and self.process.poll() is None:
            return
        self.close()
        self._launch()
        if self.weights:
            self._ask("sync", CALL_SECONDS, weights=str(self.weights))

    def _launch(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in vllm_environment(on_cpu=True).items() if name not in RANKS}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self._answers), daemon=True).start()
        self._ask("start", STARTUP, engine=self.engine)

    def _ask(self, do: str, seconds: float, **arguments: Any) -> Any:
        """Send a request to the engine and wait for its answer."""
        if self.process is None:
            raise Unavailable("it is not running")
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + os.linesep)
            self.process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except (OSError, ValueError):
            line = ""
        except queue.Empty:
            stop(self.process)  # a late answer must not be taken for the next one's
            raise Unavailable(f"no answer within {seconds:.0f} s") from None
        if not line:
            code = self.process.wait()
            raise Unavailable(f"it ended with exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer["result"]


def _read(stream: Any, answers: queue.Queue[str]) -> None:
    """Pass lines on; an empty one says that there will be no more."""
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in stream:
            answers.put(line)
    answers.put("")
