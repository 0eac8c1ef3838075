"""How a step's completions are shared: processes × micro-batches × completions of a micro-batch."""

from __future__ import annotations

from open_r1_capo.settings.values import ConfigError

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def split_batch(
    completions: int, processes: int, micro_batch: int | None = None, accumulation: int | None = None
) -> tuple[int, int]:
    """Split the completions of an optimizer step over processes, and each share into micro-batches.

    Of micro-batch (completions of a forward pass) and accumulation (forward passes), one follows from the other; with
    neither given, a share is one micro-batch. Returns both.

    Raises:
        ConfigError: they do not multiply to `completions`; the message names what to change.
    """
    if micro_batch is not None and accumulation is not None and micro_batch * accumulation * processes != completions:
        raise ConfigError(
            f"{ACCUMULATION} ({accumulation}) × {MICRO} ({micro_batch}) × processes ({processes}) is not "
            f"completions_per_step ({completions}): leave one of them out"
        )
    name, value = (MICRO, micro_batch) if accumulation is None else (ACCUMULATION, accumulation)
    value = max(1, completions // processes) if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
    rest = completions % (value * processes)
    if rest:
        raise ConfigError(
            f"completions_per_step ({completions}) must be a multiple of {name} × processes ({value} × {processes})"
        )
    other = completions // (value * processes)
    return (value, other) if name == MICRO else (other, value)


def largest_micro_batch(completions: int, processes: int, limit: int) -> int:
    """The largest micro-batch up to `limit` that divides each process's share; ConfigError if shares are unequal."""
    share, rest = divmod(completions, processes)
    if rest or not share:
        raise ConfigError(
            f"completions_per_step ({completions}) is not a multiple of the {processes} training processes: choose a "
            "number of GPUs that divides it"
        )
    return max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
