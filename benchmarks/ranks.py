"""Two ranks against one, under every file of recipes/accelerate_configs, on CPUs with gloo.

    .venv/bin/python benchmarks/ranks.py                 # all of them: a quarter of an hour on two cores
    .venv/bin/python benchmarks/ranks.py --accelerator fsdp --case float32

Prints a Markdown table of the largest differences after three steps, and stores it with `--save`.
ZeRO needs DeepSpeed: `make ranks` puts it into an environment of its own, since accelerate imports it wherever it is
found, three seconds a process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
ACCELERATORS = ("ddp", "zero2", "zero3", "fsdp")
MASK = {"mode": "mask", "max_policy_shift": 6.6, "max_objective_shift": 1.0, "top_k": 20, "measure_kl": 1.0}
SMALL = 1e-3  # a KL of float32 log-probabilities is known to some 1e-7
CASES = {  # what is changed in `training` and in `capo`
    "float32": ({}, {}),
    "float32, checkpointing": ({"gradient_checkpointing": True}, {}),
    "float32, planned": ({}, {"step_policy_shift": 1e-3, "absent_rows": "decay"}),
    "bfloat16, checkpointing": ({"gradient_checkpointing": True, "bf16": True}, {}),
}


def interpreter(accelerator: str) -> Path | None:
    """The Python that can run an accelerator; None if there is no DeepSpeed for ZeRO.

    Args:
        accelerator: names a file of recipes/accelerate_configs.

    Returns:
        This one, or that of `.venv-deepspeed`.
    """
    if not accelerator.startswith("zero") or importlib.util.find_spec("deepspeed"):
        return Path(sys.executable)
    other = ROOT / ".venv-deepspeed" / "bin" / "python"
    return other if (other.parents[1] / ".ready").is_file() else None


def policy(folder: Path, tied: bool = False) -> Path:
    """Save the lab's untrained policy.

    Args:
        folder: gets the model and its tokenizer.
        tied: the head is the embedding, as in Qwen2.5-Math-1.5B.

    Returns:
        The folder.
    """
    from open_r1_capo.tasks.lab.pretrain import build_model
    from open_r1_capo.tasks.lab.settings import LabSettings
    from open_r1_capo.tasks.lab.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(64)
    model = build_model(LabSettings(), tokenizer, seed=0)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(
    accelerator: str | None, ranks: int, model: Path, out: Path, cases: Mapping[str, tuple[dict, dict]]
) -> dict[str, list[dict[str, Any]]]:
    """Train `rank_worker.py`, one start for all cases.

    Args:
        accelerator: a file of recipes/accelerate_configs; None is one plain process.
        ranks: processes, which divide 8.
        model: from `policy`.
        out: an empty folder.
        cases: what is changed in `training` (GRPOConfig) and in `capo` (CAPOConfig), by name.

    Returns:
        Of each case what each rank wrote.

    Raises:
        RuntimeError: a rank failed; the message ends with what it said.
    """
    plain = {"bf16": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 2}
    plain["per_device_train_batch_size"] = 8 // ranks
    settings = {name: {"training": plain | more, "capo": MASK | capo} for name, (more, capo) in cases.items()}
    command: list[Any] = [interpreter(accelerator or "")]
    if accelerator:
        command += ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{accelerator}.yaml"]
        command += ["--num_processes", ranks, "--main_process_port", 0, "--mixed_precision", "no"]
    command += [Path(__file__).with_name("rank_worker.py"), model, out, json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{accelerator or 'one process'} failed: {(done.stdout + done.stderr)[-4000:]}")
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(ranks)] for name in cases}


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of b's largest value."""
    return float((a - b).abs().max() / b.abs().max())


def compare(ranks: Sequence[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """Several ranks beside one.

    Args:
        ranks: from `run`.
        one: the only one of another run.

    Returns:
        What `selections` says; `first_moment`, `second_moment`, the largest difference of CAPO's moments, of their
        largest value; `parameters`, that of the parameters after the last step, in their own unit, without the
        attention's key biases: no logit depends on them, so their gradient is rounding, of which Adam makes whole
        steps; `metrics`, the largest relative one and its name; `agree`, whether all ranks hold the same CAPO state
        and parameters, bit for bit; `held`, bytes of a rank.

    Raises:
        RuntimeError: they have not seen the same tokens.
    """
    first = ranks[0]
    union = torch.unique(torch.cat([first["state"]["token_ids"], one["state"]["token_ids"]]))
    state, reference = (on_rows(union, run["state"]) for run in (first, one))
    differences = [
        float((first["parameters"][name] - value).abs().max())
        for name, value in one["parameters"].items()
        if not name.endswith("k_proj.bias")
    ]
    return {
        **selections(ranks, one),
        "first_moment": relative(state["first_moment"], reference["first_moment"]),
        "second_moment": relative(state["second_moment"], reference["second_moment"]),
        "parameters": max(differences),
        "metrics": max(metric_differences(first["metrics"], one["metrics"])),
        "held": first["held"],
        "agree": all(same(first[what], rank[what]) for rank in ranks for what in ("state", "parameters")),
    }


def selections(ranks: Sequence[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """What several ranks and one decided of the same tokens.

    Args:
        ranks: from `run`.
        one: the only one of another run.

    Returns:
        `tokens`; `rejected`, of each step; `masks`, how many tokens have another weight; `shifts`, the largest
        difference of a token's m_F or m_H, in units of its bound: tokens nearer to the bound may change sides.

    Raises:
        RuntimeError: they have not seen the same tokens.
    """
    seen = {name: columns for rank in ranks for name, columns in rank["seen"].items()}
    if seen.keys() != one["seen"].keys():
        raise RuntimeError("the ranks have not seen the tokens that the one process saw")
    found, reference = (torch.cat([torch.tensor(run[name]) for name in seen], 1) for run in (seen, one["seen"]))
    steps = torch.tensor([int(name.split()[0]) for name in seen for _ in seen[name][0]])
    bounds = torch.tensor([MASK["max_policy_shift"], MASK["max_objective_shift"]])
    return {
        "tokens": len(steps),
        "rejected": [int((reference[0, steps == step] == 0).sum()) for step in steps.unique()],
        "masks": int((found[0] != reference[0]).sum()),
        "shifts": float(((found[1:] - reference[1:]).abs() / bounds[:, None]).max()),
    }


def on_rows(ids: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """CAPO's moments on some rows of the vocabulary, 0 where a row has never been touched.

    Args:
        ids: (R,) sorted, all rows of the state among them.
        state: of the optimizer model.

    Returns:
        `first_moment` and `second_moment`, (R, D).
    """
    place = torch.searchsorted(ids, state["token_ids"])
    names = ("first_moment", "second_moment")
    return {n: state[n].new_zeros(len(ids), state[n].shape[1]).index_copy(0, place, state[n]) for n in names}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return all(torch.equal(value, b[name]) for name, value in a.items() if isinstance(value, Tensor))


def metric_differences(
    rows: Sequence[dict[str, float]], others: Sequence[dict[str, float]]
) -> list[tuple[float, str]]:
    """How far what is logged differs.

    Args:
        rows: metrics of each step.
        others: those of another run.

    Returns:
        Each difference with its metric's name, of the value or of `SMALL`. TRL's own means over ranks of means
        (`entropy`) are left out, and the rank correlation: the order of KLs near 0 is rounding.
    """
    found = []
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() & other.keys():
            if name == "capo/kl_spearman":
                continue
            if name.startswith("capo/") or name in ("loss", "grad_norm", "learning_rate", "accepted_tokens"):
                found.append((abs(row[name] - other[name]) / max(abs(other[name]), SMALL), name))
    return found


def planned(accelerator: str, count: int, bf16: bool, found: dict[str, int]) -> str:
    """What a rank holds beside what `make plan` says of it.

    Args:
        accelerator: names a file of recipes/accelerate_configs.
        count: parameters of the model.
        bf16: whether it is trained in mixed precision.
        found: bytes of `weights` and `optimizer`.

    Returns:
        A row of a table.
    """
    from open_r1_capo.capacity.memory import states

    weights, _, optimizer = states(count, accelerator, 2, 2 if bf16 else 4)
    said = {"weights": weights, "optimizer": optimizer}
    cells = [f"{found[name] / count:.2f} | {said[name] / count:.2f}" for name in said]
    return f"| {accelerator} | {'bfloat16' if bf16 else 'float32'} | {' | '.join(cells)} |"


PLANNED = "\n| | | weights, bytes a parameter | planned | optimizer | planned |\n|---|---|---|---|---|---|"
HEAD = "| | case | masks that differ | shifts | P | Q | parameters | metrics | ranks agree |\n" + "|---" * 9 + "|"


def line(accelerator: str, case: str, found: dict[str, Any]) -> str:
    """A row of the table, from `compare`."""
    size, name = found["metrics"]
    masks = f"{found['masks']} of {found['tokens']} ({' + '.join(map(str, found['rejected']))} rejected)"
    numbers = " | ".join(f"{found[name]:.1e}" for name in ("shifts", "first_moment", "second_moment", "parameters"))
    return (
        f"| {accelerator} | {case} | {masks} | {numbers} | {size:.1e} ({name}) | {'yes' if found['agree'] else 'no'} |"
    )


def main() -> int:
    """Run the accelerators.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", action="append", choices=ACCELERATORS, help="by default all")
    parser.add_argument("--case", action="append", choices=CASES, help="by default all")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/ranks.json")
    options = parser.parse_args()
    table, memory = [], {}
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        model = policy(Path(scratch) / "policy")
        cases = {name: CASES[name] for name in options.case or CASES}
        exact = {name: case for name, case in cases.items() if not case[0].get("bf16")}
        # in bfloat16 each of them rounds something else, so that one rank of the same is the reference
        rounded = {name: case for name, case in cases.items() if name not in exact}
        references = run(None, 1, model, folder(scratch), exact) if exact else {}
        for accelerator in options.accelerator or ACCELERATORS:
            if interpreter(accelerator) is None:
                print(f"| {accelerator} | no DeepSpeed: make ranks installs it |")
                continue
            alone = references | (run(accelerator, 1, model, folder(scratch), rounded) if rounded else {})
            for case, ranks in run(accelerator, 2, model, folder(scratch), cases).items():
                found = compare(ranks, alone[case][0])
                count = sum(value.numel() for value in ranks[0]["parameters"].values())
                bf16 = bool(cases[case][0].get("bf16"))
                memory[accelerator, bf16] = planned(accelerator, count, bf16, found["held"])
                table.append({"accelerator": accelerator, "case": case, **found})
                print(line(accelerator, case, found), flush=True)
    print("\n".join([PLANNED, *memory.values()]))
    if options.save:
        from common import save

        save("ranks", {"table": table})
    return 0


def folder(scratch: str) -> Path:
    """A new folder in `scratch`."""
    return Path(tempfile.mkdtemp(dir=scratch))


if __name__ == "__main__":
    sys.exit(main())
