"""The planner: what a recipe needs per GPU and how long it takes, before any GPU is asked for.

    make plan RECIPE=capo_aggressive SCALE=qwen2.5-math-7b GPUS=4 GPU=h100

`shapes.py` knows models, `devices.py` machines, `workload.py` reads a recipe; `memory.py` and `timing.py` are formulas
of these alone, `planner.py` asks them what fits and what would, `table.py` prints. No model is loaded.
"""
