"""Between TRL's trainer and a backend: weights go out, completions come in, and a backend that is gone ends the run.

`CPUGeneration` replaces TRL's `VLLMGeneration` and keeps its walk over the parameters, which gathers the shards of
DeepSpeed and FSDP.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from open_r1_capo.runs.checkpoints import find_damage
from open_r1_capo.training.generation.backend import Backend, Completion, GenerationError, Sampling

Result = TypeVar("Result")

CLOSE = {torch.float32: 0.02, torch.bfloat16: 0.1}  # nats: what rounding explains, with a wide margin


class CPUGeneration(VLLMGeneration):
    """A backend as TRL's trainer sees it; weights are handed over in `folder`."""

    def __init__(self, trainer: Trainer, backend: Backend, folder: Path):
        self.trainer, self.backend, self.folder = trainer, backend, folder
        self.sampling = Sampling(
            trainer.max_completion_length,
            trainer.temperature,
            trainer.top_p,
            trainer.top_k or 0,
            trainer.min_p or 0.0,
            trainer.repetition_penalty,
            tuple(trainer.eos_token_ids),
            dict(trainer.args.generation_kwargs or {}),
        )
        self._checked, self._drawn = False, (-1, 0)
        mode = "server" if backend.shared else "colocate"
        super().__init__(trainer.model, trainer.accelerator, trainer.processing_class, mode=mode)

    def _init_vllm(self) -> None:
        self._together(self.backend.start)

    def sync_weights(self) -> None:
        """Hand the policy's weights to the backend; after the first time, check that it computes what we do."""
        weights = self.folder / f"rank{self.accelerator.process_index}"
        tensors = {}
        for name, parameter in self._iter_named_params():  # every process takes part: shards are gathered
            if self._mine:  # gathered shards are gone after this turn of the loop
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if tensors:
            weights.mkdir(parents=True, exist_ok=True)
            save_file(tensors, weights / "model.part")
            os.replace(weights / "model.part", weights / "model.safetensors")
        with _saving(self.trainer):
            self._together(lambda: self.backend.sync(weights))
            if not self._checked:
                self._check()
                self._checked = True

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[list, list, list, None]:
        """Draw a completion of every prompt (token ids) of this process; TRL's other arguments are not needed.

        Returns prompt ids, completion ids, log-probabilities (completions × tokens × 1, None where unknown), and None.
        """
        del images, num_generations, profiler
        with _saving(self.trainer):
            completions = self._draw(prompts, self.sampling, self._next_seed())
        logps = [[[None if value != value else value] for value in one.logps] for one in completions]
        return prompts, [one.ids for one in completions], logps, None

    @property
    def _mine(self) -> bool:
        """Whether this process speaks with a backend."""
        return self.accelerator.is_main_process or not self.backend.shared

    def _draw(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Completions of this process's prompts, drawn as if one process had all prompts."""
        first = self.accelerator.process_index * len(prompts)
        if not self.backend.shared:
            return self._together(lambda: self.backend.generate(prompts, sampling, seed + first))
        everybody = gather_object(prompts)
        completions = [self._together(lambda: self.backend.generate(everybody, sampling, seed))]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(completions, from_process=0)
        return completions[0][first : first + len(prompts)]

    def _together(self, action: Callable[[], Result]) -> Result | None:
        """Call `action` where there is a backend; if it fails in one process, all of them stop."""
        result = failure = None
        if self._mine:
            try:
                result = action()
            except GenerationError as error:
                failure = str(error)
        failures = [text for text in gather_object([failure]) if text]
        if failures:
            raise GenerationError(failures[0])
        return result

    def _next_seed(self) -> int:
        """The seed of a step's first completion, the same whenever and wherever that step is taken."""
        step = self.trainer.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        return completion_seed(self.trainer.args.seed, *self._drawn)

    def _check(self) -> None:
        """Compare log-probabilities of a short completion of a fixed prompt with the trainer's own.

        Raises:
            GenerationError: they differ by more than rounding.
        """
        vocabulary = self.trainer.model.config.get_text_config().vocab_size
        prompt = [(7 * i + 3) % vocabulary for i in range(8)]
        (drawn,) = self._draw([prompt], Sampling(8, self.trainer.temperature), seed=0)
        ids = torch.tensor([prompt + drawn.ids], device=self.accelerator.device)
        with torch.no_grad():
            logps, *_ = self.trainer._get_per_token_logps_and_entropies(
                self.trainer.model, ids, torch.ones_like(ids), len(drawn.ids)
            )
        difference = float((logps[0].cpu() - torch.tensor(drawn.logps)).abs().mean())
        limit = CLOSE[torch.bfloat16 if self.trainer.args.bf16 else torch.float32]

        def judge() -> None:
            if not difference <= limit:  # NaN is not
                raise GenerationError(
                    f"vLLM and the trainer give the same tokens log-probabilities that differ by {difference:.2g} on "
                    f"average ({limit:g} can be rounding) after it took the trainer's weights: it was started with "
                    "another model, revision or data type"
                )

        self._together(judge)


def completion_seed(seed: int, step: int, call: int) -> int:
    """The seed, below 2**31 - 2**20, of the first completion of a step's call; the i-th has this plus i."""
    digest = hashlib.sha256(f"{seed}/{step}/{call}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 2**20)


@contextlib.contextmanager
def _saving(trainer: Trainer) -> Iterator[None]:
    """If the backend fails inside, save the last complete step before raising."""
    try:
        yield
    except GenerationError as error:
        step = trainer.state.global_step
        if step == 0:
            raise
        save_step(trainer)
        raise GenerationError(f"stopped after step {step}, from which the same command resumes: {error}") from None


def save_step(trainer: Trainer) -> None:
    """Write a checkpoint of the last complete optimizer step, unless there is one; every process must call it."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    there = [find_damage(folder) is None]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(there, from_process=0)
    if not there[0]:
        trainer._save_checkpoint(trainer.model, None)


class _Closing(TrainerCallback):
    """Closes the backend when training ends, or at the latest when the process exits."""

    def __init__(self, backend: Backend, folder: Path):
        self.backend, self.folder = backend, folder
        atexit.register(self.close)

    def close(self) -> None:
        self.backend.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()


def attach(trainer: Trainer, backend: Backend) -> None:
    """Start a backend, and let a trainer that was built with `use_vllm=False` generate with it until training ends.

    Raises:
        GenerationError: the backend cannot be used.
    """
    run = Path(trainer.args.output_dir).resolve().parent
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() and not backend.shared else None
    # a server may be on another node: hand over by the run's disk, otherwise by memory
    folder = run / "weights" if backend.shared else Path(tempfile.mkdtemp(prefix="open-r1-capo-", dir=root))
    closing = _Closing(backend, folder)
    try:
        trainer.vllm_generation = CPUGeneration(trainer, backend, folder)
    except GenerationError:
        closing.close()
        raise
    trainer._last_loaded_step = -1
    trainer.use_vllm = trainer.args.use_vllm = True
    trainer.add_callback(closing)
