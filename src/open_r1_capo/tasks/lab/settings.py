"""What decides the lab policy beside a seed: pure dataclasses, the group `lab` of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from open_r1_capo.tasks.lab.task import FILLER_WORDS, Filler, filler_vocabulary, zipf_filler


@dataclass(frozen=True)
class Mixture:
    """How the pretraining texts are mixed; the rest of the completions ramble."""

    base: float = 0.5  # share of problems of the base variant; the others share the rest equally
    worked: float = 0.4  # share of worked running sums
    direct: float = 0.4  # share of direct answers
    slip: float = 0.06  # probability of a slip at one running sum
    shortcut: float = 0.2  # probability that a step adds two terms at once, which the policy does badly
    right: float = 0.35  # probability that a direct answer is right
    # words before each part (running sum, opening, sentence, answer); a base solution has about four
    filler_words: float = 0.0
    filler_vocabulary: int = 300  # different filler words; without filler none is in the tokenizer
    filler_exponent: float = 1.0  # the r-th most frequent word has a frequency proportional to r^-exponent

    def __post_init__(self):
        """Check ranges; raises ValueError."""
        for name in ("base", "worked", "direct", "slip", "shortcut", "right"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.worked + self.direct > 1 + 1e-9:
            raise ValueError(f"worked and direct are shares of one whole, got {self.worked} + {self.direct}")
        if not 0 <= self.filler_words < math.inf:
            raise ValueError(f"filler_words must be at least 0 and finite, got {self.filler_words}")
        if not 1 <= self.filler_vocabulary <= FILLER_WORDS:
            raise ValueError(f"filler_vocabulary must be from 1 to {FILLER_WORDS}, got {self.filler_vocabulary}")
        if not 0 <= self.filler_exponent <= 10:
            raise ValueError(f"filler_exponent must be from 0 to 10, got {self.filler_exponent}")

    @property
    def filler(self) -> Filler:
        """The source of filler words of one part."""
        return zipf_filler(self.filler_words, self.filler_vocabulary, self.filler_exponent)

    @property
    def filler_tokens(self) -> list[str]:
        """The filler words that the tokenizer needs."""
        return filler_vocabulary(self.filler_vocabulary) if self.filler_words else []


@dataclass(frozen=True)
class LabSettings:
    """Everything, beside the seed, that decides what the policy becomes."""

    hidden_size: int = 128  # a multiple of 2 × heads; vLLM on a CPU needs heads at least 32 wide
    intermediate_size: int = 256  # width inside the feed-forward layers
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 256  # tokens of the longest sequence
    # final norm weight, and divisor of the head's initial weights and pretraining learning rate
    head_balance: float = 16.0
    steps: int = 650  # pretraining steps
    batch_size: int = 64
    learning_rate: float = 3e-3  # peak; linear warm-up over a twentieth of the steps, then cosine to 0
    threads: int = 1  # CPU threads; a setting because sums of floats depend on it
    # share of the steps in which filler grows to its full length: short texts teach sums faster
    filler_ramp: float = 0.5
    filler_weight: float = 0.1  # loss weight of a filler word (1 for other tokens): random words are most of a text
    mixture: Mixture = field(default_factory=Mixture)  # shares of the styles of completions, and their filler

    def __post_init__(self):
        """Check ranges, and that the heads divide the width; raises ValueError."""
        sizes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        for name in (*sizes, "steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 64:
            raise ValueError(f"max_length must be at least 64 (prompts have up to 40 tokens), got {self.max_length}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be a multiple of 2 x heads, got {self.hidden_size} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        for name in ("head_balance", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be greater than 0 and finite, got {getattr(self, name)}")
        for name in ("filler_ramp", "filler_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")

    def mixture_at(self, step: int) -> Mixture:
        """The mixture of one pretraining step, from 1: with less filler during the ramp."""
        ramp = self.filler_ramp * self.steps
        share = min(1.0, step / ramp) if ramp else 1.0
        return replace(self.mixture, filler_words=share * self.mixture.filler_words)
