"""The lab policy as a folder: made on first use, kept in the cache of policies, and checked each time.

The folder is an ordinary Hugging Face model (`AutoModelForCausalLM`, `AutoTokenizer`, vLLM).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from open_r1_capo.tasks import cache
from open_r1_capo.tasks.lab import pretrain, task, tokenizer
from open_r1_capo.tasks.lab import settings as lab_settings
from open_r1_capo.tasks.lab.settings import LabSettings

POLICY = cache.Policy("lab policy", manifest="lab.json", megabytes=10)


def cache_key(settings: LabSettings, seed: int) -> str:
    """Name a policy by everything that determines it, the code and the versions of torch and transformers too."""
    modules = (task, tokenizer, pretrain, lab_settings)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    facts = [dataclasses.asdict(settings), seed, sources, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def train(folder: Path, settings: LabSettings, seed: int) -> dict[str, Any]:
    """Pretrain a policy into an empty folder; returns what its manifest says of it."""
    started = time.process_time()
    tok = tokenizer.build_tokenizer(settings.max_length, settings.mixture.filler_tokens)
    pretrain.pretrain(settings, tok, seed).save_pretrained(folder)
    tok.save_pretrained(folder)
    facts = {"seed": seed, "settings": dataclasses.asdict(settings)}
    return facts | {"processor_seconds": round(time.process_time() - started)}


def base_policy(seed: int = 0, cache_dir: Path | None = None, settings: LabSettings | None = None) -> Path:
    """The folder of the pretrained lab policy, trained first (two minutes) where the cache does not have it.

    It is a Hugging Face model folder with tokenizer, and shared: write nothing into it. The cache is `cache_dir`,
    else ``$OPEN_R1_CAPO_CACHE``, else ``~/.cache/open_r1_capo``.

    Raises:
        CacheError: If the cache cannot be written (full disk, no permission, no home).
    """
    settings = settings or LabSettings()
    folder = cache.cache_root(cache_dir) / f"policy-{cache_key(settings, seed)}"
    return POLICY.keep(folder, lambda made: train(made, settings, seed))
