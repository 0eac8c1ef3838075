"""Whether a run's checkpoints fit onto the disk, said before the run starts and not when one is cut off."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from trl import GRPOConfig

GIB = 2**30


def checkpoint_bytes(model: nn.Module, optim: str, moments: bool) -> int:
    """Bytes of one checkpoint of a model in float32.

    Its weights, of LoRA the adapters alone; Adam's two moments of what is trained; and with `moments` CAPO's two of
    the LM head, at most.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    saved = trained if hasattr(model, "peft_config") else sum(size for size, _ in sizes)
    head = model.get_output_embeddings()
    capo = 8 * head.in_features * head.out_features if moments and head.weight.requires_grad else 0
    return 4 * saved + (8 * trained if "adam" in optim else 0) + capo


def too_small(model: nn.Module, args: GRPOConfig, moments: bool, folder: Path) -> str | None:
    """A sentence if the run's checkpoints take more than is free where its folder is; None if they fit."""
    if args.save_strategy == "no":
        return None
    count = max(1, int(args.max_steps // args.save_steps))
    kept = min(count, (args.save_total_limit or count) + 1)  # an older one goes once the new one is complete
    size, free = checkpoint_bytes(model, args.optim, moments), shutil.disk_usage(folder).free
    if kept * size <= free:
        return None
    return (
        f"warning: this run writes {count} checkpoints of about {size / GIB:.2f} GiB, {kept} of them at once, and "
        f"{free / GIB:.2f} GiB are free at {folder}: set save_total_limit=2, a larger save_steps or save_strategy=no"
    )
