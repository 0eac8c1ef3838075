"""Where the policy `smollm2` comes from: the group `smollm2` of a recipe, and the model's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHAPE: dict[str, Any] = {  # the fields of the model's config that fix its size
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class SmolLM2Settings:
    """Which copy of the model a run starts from: the hub's is in full precision, the package's rounded to 4 bits."""

    # `hub`, `package`, a model folder or .gguf file; `auto`: what is here already, else the hub's, else the package's
    source: str = "auto"
    sha256: str | None = None  # of the file with the weights; null takes any, and the run records which it was

    def __post_init__(self):
        """Check the digest; raises ValueError."""
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 hex digits, got {self.sha256!r}")


def difference(config: Mapping[str, Any]) -> str | None:
    """The first field in which a config is another model's, as `hidden_size 768 instead of 576`; None if none is."""
    heads = config.get("num_attention_heads") or 1
    defaults = {"head_dim": (config.get("hidden_size") or 0) // heads, "tie_word_embeddings": False}
    for name, wanted in SHAPE.items():
        found = config.get(name)
        found = defaults.get(name) if found is None else found
        if found != wanted:
            return f"{name} {found} instead of {wanted}"
    return None
