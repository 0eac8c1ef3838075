"""A Slurm job's commands: who trains and who serves, on which GPUs, with flags that the pinned programs accept."""

import json
import math
import shlex
import socket
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command as validate
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments

from open_r1_capo.cluster import launch
from open_r1_capo.cluster.allocation import PORTS, Allocation, LaunchError, LaunchOptions, resolve
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import ConfigError
from open_r1_capo.training import build as building

ROOT = Path(__file__).resolve().parents[2]
SEVEN = [
    "grpo_conservative", "grpo_aggressive", "drgrpo_aggressive", "reinforce_aggressive", "capo_aggressive",
    "drcapo_aggressive", "reincapo_aggressive",
]  # fmt: skip
NO_GPU = {"needs_gpu": False, "bf16": False}


def allocation(nodes=1, gpus=4, cpus=32):
    names = tuple(f"n{number + 1}" for number in range(nodes))
    return Allocation(names, tuple(f"10.0.0.{number + 1}" for number in range(nodes)), gpus, cpus)


def resolved(options="", where=None, seed=0):
    asked = launch.parser().parse_args(shlex.split(options))
    options = LaunchOptions(**{one.name: getattr(asked, one.name) for one in fields(LaunchOptions)})
    return resolve(options, where or allocation(), seed)


def value(command, flag):
    return command[command.index(flag) + 1]


def overrides(step):
    return list(step.command[step.command.index("--config-name") + 2 :])


# --- where what runs -------------------------------------------------------------------------------------------------


def test_one_node_trains_and_generates_in_the_same_processes():
    (step,) = resolved()
    assert (step.name, step.nodes, step.gpus, step.cpus) == ("trainer", ("n1",), 4, 32)
    assert value(step.command, "--num_processes") == "4"
    assert overrides(step) == ["scale=qwen2.5-math-7b", "seed=0"]


def test_part_of_a_node_serves():
    server, trainer = resolved("--generation vllm_server --server-gpus 1")
    assert (server.nodes, server.gpus, server.cpus) == (("n1",), 1, 8)
    assert (trainer.nodes, trainer.gpus, trainer.cpus) == (("n1",), 3, 24)
    assert server.environment == {"VLLM_SERVER_DEV_MODE": "1"}
    port = value(server.command, "--port")
    assert f"vllm_server_base_url=http://10.0.0.1:{port}" in overrides(trainer)
    assert "per_device_train_batch_size=8" in overrides(trainer)  # 96 = 3 × 4 × 8; the scale's 12 does not divide 32
    ports = [port, value(trainer.command, "--main_process_port")]
    assert len({*ports, *(item.split("=")[1] for item in overrides(trainer) if "group_port" in item)}) == 3


def test_the_last_nodes_serve():
    first, second, trainer = resolved(
        "--recipe grpo_conservative --generation vllm_server --server-nodes 2 --tp 2", allocation(4, 8, 64)
    )
    assert trainer.nodes == ("n1", "n2")
    assert value(trainer.command, "--main_process_ip") == "10.0.0.1"
    assert value(trainer.command, "--num_machines") == "2"
    assert value(trainer.command, "--num_processes") == "16"
    assert [first.nodes, second.nodes] == [("n3",), ("n4",)]
    for step in (first, second):
        assert value(step.command, "--tensor-parallel-size") == "2"
        assert value(step.command, "--data-parallel-size") == "8"
        assert value(step.command, "--data-parallel-size-local") == "4"
        assert value(step.command, "--data-parallel-address") == "10.0.0.3"
    assert "--headless" not in first.command
    assert value(second.command, "--data-parallel-start-rank") == "4"
    assert "http://10.0.0.3:" in " ".join(overrides(trainer))


def test_a_server_alone():
    (step,) = resolved("--serve --tp 2")
    assert (step.name, step.gpus, value(step.command, "--data-parallel-size")) == ("server", 4, "2")


def test_a_server_elsewhere_is_not_started():
    (step,) = resolved("--generation vllm_server --args vllm_server_base_url=http://other:8000")
    assert step.name == "trainer"
    assert [item for item in overrides(step) if "base_url" in item] == ["vllm_server_base_url=http://other:8000"]


def test_the_lab_is_one_process_without_gpus():
    (step,) = resolved("--scale lab", allocation(2))
    assert (step.nodes, step.gpus, value(step.command, "--num_processes")) == (("n1",), 0, "1")
    assert "--cpu" in step.command
    assert value(step.command, "--mixed_precision") == "no"


def test_the_lab_on_two_nodes():
    (step,) = resolved("--scale lab --accelerator ddp", allocation(2, 1))
    assert (step.nodes, value(step.command, "--num_processes")) == (("n1", "n2"), "2")


def test_colocated_tensor_parallelism():
    assert "vllm_tensor_parallel_size=2" in overrides(resolved("--tp 2")[0])


def test_steps_of_srun():
    words = resolved("", allocation(2, 8))[0].srun()
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n2", "--gres=gpu:8", "--exact", "--mem=0"} <= set(words)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(96, 24, 4, None), (96, 24, 8, 12), (96, 24, 16, 6), (1152, 24, 16, None), (1152, 24, 12, None),
     (96, 24, 3, 16), (96, 24, 96, 1), (96, None, 2, None)],
)  # fmt: skip
def test_the_micro_batch_fits_the_processes(batch, micro, processes, expected):
    (step,) = resolved(
        f"--accelerator ddp --args 'completions_per_step={batch} per_device_train_batch_size={micro or 'null'}'",
        allocation(1, processes),
    )
    *_, last = overrides(step)
    assert last == f"per_device_train_batch_size={expected or micro or 'null'}"


# --- seeds and submission --------------------------------------------------------------------------------------------


def test_the_seed():
    assert launch.seed_of(None, {}) == 0
    assert launch.seed_of("3", {"SLURM_JOB_ID": "7"}) == 3
    assert launch.seed_of("2-4", {}) == 2
    assert launch.seed_of("2-4", {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}) == 4
    assert launch.seed_of(None, {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}) == 4


def test_a_dry_run_prints_the_submission_and_the_commands(capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launch.main(["--seed", "0-4", "--nodes", "2", "--gpus-per-node", "8", "--dry-run"]) == 0
    submit, trainer = capsys.readouterr().out.splitlines()
    words = shlex.split(submit)
    assert words[0] == "sbatch"
    assert {"--nodes=2", "--gres=gpu:8", "--array=0-4"} <= set(words)
    assert words[words.index("slurm/train.slurm") :][1:] == ["--seed", "0-4", "--nodes", "2", "--gpus-per-node", "8"]
    assert shlex.split(trainer) == resolved("", Allocation(("node1", "node2"), ("node1", "node2"), 8))[0].srun()
    assert launch.main(["--seed", "3", "--wait", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert words.index("--wait") < words.index("slurm/train.slurm")
    assert words[words.index("slurm/train.slurm") :][1:] == ["--seed", "3"]


# --- what the pinned programs accept ---------------------------------------------------------------------------------

SHAPES = [("", 1, 4), ("--generation vllm_server", 1, 4), ("", 2, 8), ("--generation vllm_server", 2, 8)]


@pytest.mark.parametrize(("options", "nodes", "gpus"), SHAPES)
@pytest.mark.parametrize("recipe", SEVEN)
def test_the_papers_recipes_are_accepted(recipe, options, nodes, gpus, monkeypatch):
    """accelerate's parser takes the command, and TRL the settings, with the paper's batch."""
    *_, step = resolved(f"--recipe {recipe} {options}", allocation(nodes, gpus))
    arguments = step.command[step.command.index("open_r1_capo.cluster.node") + 1 :]
    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.training_script == "src/open_r1_capo/grpo.py"
    assert parsed.training_script_args[:2] == ["--config-name", recipe]
    world = int(parsed.num_processes)
    monkeypatch.setattr(building, "world_size", lambda: world)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: world))
    run, args = building.build(compose_recipe(recipe, parsed.training_script_args[2:]) | NO_GPU)
    micro = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert math.prod(micro) * world == run.completions_per_step == (1152 if recipe == "grpo_conservative" else 96)
    assert args.generation_batch_size == run.completions_per_step
    assert args.vllm_mode == ("server" if options else "colocate")


@pytest.mark.parametrize("accelerator", launch.ACCELERATORS)
def test_accelerate_reads_the_configurations(accelerator, monkeypatch):
    monkeypatch.chdir(ROOT)
    (step,) = resolved(f"--accelerator {accelerator}", allocation(2, 8))
    arguments = step.command[step.command.index("open_r1_capo.cluster.node") + 1 :]
    args, *_ = validate(launch_command_parser().parse_args(arguments))
    assert (args.num_machines, args.num_processes, args.rdzv_backend) == (2, 16, "static")
    chosen = {"ddp": "multi_gpu", "fsdp": "use_fsdp"}.get(accelerator, "use_deepspeed")
    assert getattr(args, chosen), accelerator
    content = yaml.safe_load((ROOT / "recipes" / "accelerate_configs" / f"{accelerator}.yaml").read_text())
    for group in ("fsdp_config", "deepspeed_config"):
        known = vars(args).keys() | {"deepspeed_multinode_launcher"}
        assert set(content.get(group, {})) <= known


VLLM = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser())
for command in json.load(sys.stdin):
    parsed = parser.parse_args(command)
    print(parsed.data_parallel_size, parsed.tensor_parallel_size, parsed.port)
"""


@pytest.mark.skipif(
    not (ROOT / ".venv-vllm" / ".ready").is_file(), reason="no .venv-vllm: make eval MODEL=lab builds it"
)
def test_vllm_accepts_the_servers_commands():
    first, second, _ = resolved("--generation vllm_server --server-nodes 2 --tp 2", allocation(4, 8))
    (alone,) = resolved("--serve")
    commands = [step.command[step.command.index("serve") + 1 :] for step in (first, second, alone)]
    done = subprocess.run(
        [ROOT / ".venv-vllm/bin/python", "-c", VLLM], input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[:2] for line in done.stdout.splitlines()[-3:]] == [["8", "2"], ["8", "2"], ["4", "1"]]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ("--bogus", None, "unrecognized arguments: --bogus"),
        ("--nodes 0", None, "'0' is not a whole number above 0"),
        ("--accelerator zero9", None, "invalid choice: 'zero9'"),
        ("--server-gpus 1 --server-nodes 1", None, "not allowed with"),
        ("--server-gpus 1", None, "--server-gpus has no effect here: it needs --generation vllm_server"),
        ("--dp 2", None, "--dp has no effect here"),
        ("--generation vllm_server --server-gpus 4", None, "leaves none of the 4 GPUs to train on"),
        ("--generation vllm_server --server-nodes 2", allocation(2), "leaves none of the 2 nodes to train on"),
        ("--generation vllm_server --server-gpus 2", allocation(2), "with several nodes use --server-nodes"),
        ("--generation vllm_server --tp 2", None, "--tp 2 does not fill the server's 1 × 1 GPUs"),
        ("--serve --dp 3", None, "--tp 1 --dp 3 does not fill the server's 1 × 4 GPUs"),
        ("", allocation(1, 5), r"completions_per_step \(96\) is not a multiple of the 5 training processes"),
        ("", allocation(1, 0), "the job has no GPUs"),
        ("--recipe nope", None, "there is no recipe 'nope'"),
        ("--args learning_rte=1", None, "did you mean learning_rate"),
        (
            '--args "system_prompt=\'"',
            None,
            "--args cannot be split into words .No closing quotation.: system_prompt='",
        ),
    ],
)
def test_bad_options(options, where, message):
    with pytest.raises((LaunchError, ConfigError), match=message):
        resolved(options, where)


@pytest.mark.parametrize("seed", ["x", "1-", "-1", "1..2"])
def test_bad_seeds(seed):
    with pytest.raises(LaunchError, match="must be a number"):
        launch.seed_of(seed, {})


def test_a_seed_in_an_array():
    with pytest.raises(LaunchError, match="the seed of an array's job is its number, 4: leave --seed 3 out"):
        launch.seed_of("3", {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"})


def test_one_sentence_and_code_2(capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launch.main(["--gpus-per-node", "5", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: completions_per_step")
    assert len(error.splitlines()) == 1


def test_taken_ports_are_passed_over():
    with socket.socket() as taken:
        taken.bind(("", 0))
        first = taken.getsockname()[1]
        found = launch.free_ports(first - 1)
    assert first not in range(found, found + PORTS)
