"""Model shapes: the sizes of a model's matrices, and what follows from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_r1_capo.capacity import CapacityError
from open_r1_capo.tasks.source import policy_source


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family: RMS norms, grouped attention, a gated feed-forward layer."""

    name: str
    layers: int  # L
    hidden: int  # D, the width of the residual stream
    intermediate: int  # I, the width inside the feed-forward layer
    heads: int  # of the queries
    kv_heads: int
    head_dim: int
    vocabulary: int  # V, rows of the LM head
    tied: bool = False  # the LM head is the embedding
    qkv_bias: bool = True  # query, key and value have biases (Qwen2)
    qk_norm: bool = False  # query and key are normalised (Qwen3)

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; the values' too."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer that multiply a token: q and o (D × queries each), k and v (D × keys), three D × I."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def head_matrix(self) -> int:
        """Weights of the LM head, D × V."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters: layers, norms, biases, the embedding, and the head unless it is the embedding."""
        layer = self.layer_matrices + 2 * self.hidden
        layer += (self.queries + 2 * self.keys) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return self.layers * layer + self.hidden + self.head_matrix * (1 if self.tied else 2)

    def kv_bytes(self, element: int) -> int:
        """Bytes of keys and values that one token of context takes: 2 · L · keys · `element`."""
        return 2 * self.layers * self.keys * element


def _qwen(size: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> ModelShape:
    """A Qwen2.5: up to 3B the head is tied; from 7B on the vocabulary is padded further."""
    small = size in ("0.5b", "1.5b", "3b")
    sizes = (layers, hidden, intermediate, heads, kv_heads, hidden // heads, 151936 if small else 152064)
    return ModelShape(f"Qwen2.5-{size.upper()}", *sizes, tied=small)


# Qwen2.5 technical report (arXiv 2412.15115) and config.json; Qwen2.5-Math (arXiv 2409.12122) has the same shapes
KNOWN = {
    "0.5b": _qwen("0.5b", 24, 896, 4864, 14, 2),
    "1.5b": _qwen("1.5b", 28, 1536, 8960, 12, 2),
    "3b": _qwen("3b", 36, 2048, 11008, 16, 2),
    "7b": _qwen("7b", 28, 3584, 18944, 28, 4),
    "14b": _qwen("14b", 48, 5120, 13824, 40, 8),
    "32b": _qwen("32b", 64, 5120, 27648, 40, 8),
}
FAMILY = {  # model_type: (biases of q, k and v; norms of q and k; a tied head where the config does not say)
    "qwen2": (True, False, False),
    "qwen3": (False, True, False),
    "llama": (False, False, False),
    "mistral": (False, False, False),
}


def find_shape(model: str, settings: Any = None) -> ModelShape:
    """The shape of a policy, by its config or by its name; settings as for `tasks.source.PolicySource.config`.

    Raises:
        CapacityError: no usable config.json, an architecture that the formulas do not describe, or an unknown name.
    """
    name = Path(model).name
    try:
        config = policy_source(model).config(model, settings)
        if config is not None:
            return from_config(config, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CapacityError(f"{model}/config.json does not say the model's shape ({error!r}): fix the file") from None
    if Path(model).is_dir():
        raise CapacityError(f"{model} has no config.json, which says the model's shape: name a model's folder")
    match = re.fullmatch(r"qwen2\.5-(?:math-|coder-)?([\d.]+b)(?:-instruct)?", name.lower())
    if match and match[1] in KNOWN:
        return KNOWN[match[1]]
    known = ", ".join(shape.name for shape in KNOWN.values())
    raise CapacityError(f"the shape of {model} is not known here ({known} are): set model_name_or_path=<local folder>")


def from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a Hugging Face config describes.

    Raises:
        CapacityError: an architecture that the formulas do not describe.
        KeyError: a size is missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILY:
        known = ", ".join(FAMILY)
        raise CapacityError(f"the formulas know the architectures {known}, and {name} is {kind!r}: choose another")
    bias, norm, tied = FAMILY[kind]
    heads = config["num_attention_heads"]
    return ModelShape(
        name=name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", tied),
        qkv_bias=bias,
        qk_norm=norm,
    )
