"""What a recipe needs of a GPU's memory and of the disk, before any GPU is asked for; no model is loaded.

    make plan RECIPE=capo_aggressive SCALE=qwen2.5-math-7b GPUS=4 GPU=h100

`shapes.py` knows models, `devices.py` GPUs, `workload.py` reads a recipe; `memory.py` has the formulas, `fit.py` asks
them what fits and what would, `table.py` prints.
"""

from open_r1_capo.runs.exit import UserError


class CapacityError(UserError):
    """A recipe, model or GPU whose memory cannot be computed."""
