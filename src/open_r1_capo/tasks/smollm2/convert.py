"""A GGUF file of SmolLM2-135M-Instruct becomes an ordinary Hugging Face folder in float32."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from open_r1_capo.runs.exit import UserError
from open_r1_capo.tasks.smollm2.settings import difference

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MEMORY = 2.0  # GiB; 1.3 were measured


class PolicyError(UserError, RuntimeError):
    """The policy cannot be had; the message says what to change."""


def check_machine() -> None:
    """Raise PolicyError if this machine cannot convert: no package `gguf`, or too little free memory."""
    if importlib.util.find_spec("gguf") is None:
        raise PolicyError("the package gguf, which reads the file of smollm2, is missing: run `make install`")
    free = psutil.virtual_memory().available / 2**30
    if free < MEMORY:
        raise PolicyError(
            f"converting smollm2 needs {MEMORY} GiB of memory and {free:.1f} GiB are free: close other programs, or "
            "set smollm2.source to a folder that holds it converted"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file and its tokenizer into an empty folder.

    The file's own special tokens are wrong: as transformers reads them, a completion would end at the token that
    begins a turn, and nothing pads.

    Raises:
        PolicyError: the file is no GGUF, or holds another model; the package `gguf` is missing; too little memory.
    """
    check_machine()
    print(f"smollm2: converting {gguf.name} (a minute, once)", file=sys.stderr, flush=True)
    with _reading(gguf):
        where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        config = AutoConfig.from_pretrained(**where)
        other = difference(config.to_dict())
        if other:
            raise PolicyError(
                f"{gguf} holds another model than SmolLM2-135M-Instruct ({other}): give smollm2.source a file of that"
            )
        weights = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
        tokenizer = AutoTokenizer.from_pretrained(**where)
    for key in ("quantization_config", "_name_or_path"):  # a config that says so could not be saved; a label
        config.__dict__.pop(key, None)
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    tokenizer.model_max_length = config.max_position_embeddings
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config.update(ids)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _reading(gguf: Path) -> Iterator[None]:
    """Turn what transformers and gguf raise at a file that they cannot read into one sentence."""
    try:
        yield
    except PolicyError:
        raise
    except Exception as error:  # of a damaged file anything: the reader takes lengths and types from it
        raise PolicyError(
            f"{gguf} cannot be read as a GGUF file ({' '.join(str(error).split())[:200]}): it is damaged, get it again"
        ) from error
