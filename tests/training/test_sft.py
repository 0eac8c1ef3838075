"""A cold start: from a recipe to an ordinary folder, found again, measured before and after."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_r1_capo import sft
from open_r1_capo.settings.sft import compose_sft
from open_r1_capo.tasks.data import DataError, load_solutions, split_of
from open_r1_capo.tasks.lab import task
from open_r1_capo.training import sft as training_sft

FAST = [
    "use_cpu=true",
    "bf16=false",
    "per_device_train_batch_size=16",
    "max_completion_length=16",
    "learning_rate=3e-3",
]


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    """Sums of two numbers from 0 to 29 with worked solutions, as a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"What is {a}+{b}?", "solution": f"{a}+{b}={a + b}, \\boxed{{{a + b}}}"}
        for a in range(30)
        for b in range(1, 10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tiny_policy, solutions, tmp_path, capsys):
    """Run the command line; returns its exit code, output and errors."""

    def call(*overrides):
        common = [f"model_name_or_path={tiny_policy}", f"data.path={solutions}", f"output_root={tmp_path / 'sft'}"]
        code = sft.main([*common, *FAST, *overrides])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_cold_start_lowers_the_loss_and_leaves_an_ordinary_folder(make, tiny_policy, tmp_path):
    code, out, err = make("num_train_epochs=2", "logging_steps=1", "evaluation.problems=8")
    assert code == 0
    (folder,) = (tmp_path / "sft").iterdir()  # no scratch folder either
    assert f"model_name_or_path={folder}" in out
    facts = json.loads((folder / "sft.json").read_text())
    assert facts["before"]["n"] == facts["after"]["n"] == 8
    assert facts["solutions"] > 200
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "3+5=8, \\boxed{8}"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [AutoModelForCausalLM.from_pretrained(p)(ids, labels=ids).loss for p in (tiny_policy, folder)]
    assert losses[1] < 0.7 * losses[0]
    assert "loss" in err


def test_the_same_command_finds_its_result_and_a_changed_one_does_not(make, tmp_path, monkeypatch):
    short = ["max_steps=1", "evaluation.problems=0"]
    assert make(*short)[0] == 0
    (folder,) = (tmp_path / "sft").iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    code, out, _ = make(*short)
    assert (code, (folder / "model.safetensors").stat().st_mtime_ns) == (0, before)
    assert str(folder) in out
    assert make(*short, "overwrite=true")[0] == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns > before
    assert make(*short, "seed=1")[0] == 0
    assert len(list((tmp_path / "sft").iterdir())) == 2


def test_the_key_covers_the_policy_and_the_solutions(tiny_policy, tmp_path):
    settings = compose_sft("gsm_symbolic", [])
    rows = [{"problem": "1+1", "solution": "2"}]
    key = training_sft.result_key(settings, str(tiny_policy), rows)
    copy = shutil.copytree(tiny_policy, tmp_path / "copy")
    assert training_sft.result_key(settings, str(copy), rows) == key
    assert training_sft.result_key(settings, str(copy), [*rows, *rows]) != key
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert training_sft.result_key(settings, str(copy), rows) != key


def test_only_the_solution_carries_loss(tiny_policy, tiny_tokenizer, solutions, tmp_path):
    settings = compose_sft("gsm_symbolic", [f"model_name_or_path={tiny_policy}", f"data.path={solutions}", *FAST])
    config, values = training_sft.read_sft(settings)
    row = {"problem": "What is 3+5?", "solution": "3+5=8, \\boxed{8}"}
    trainer = training_sft.build(config, values, str(tiny_policy), tiny_tokenizer, [row], tmp_path)
    (batch,) = trainer.get_train_dataloader()
    labels = batch["labels"][0]
    assert tiny_tokenizer.decode(labels[labels != -100]) == row["solution"] + tiny_tokenizer.eos_token
    assert tiny_tokenizer.decode(batch["input_ids"][0]).startswith("<|user|>What is 3+5?<|assistant|>")


def test_a_file_is_split_by_its_problems(solutions):
    rows = load_solutions(path=solutions)
    test = [row for row in rows if split_of(row["problem"]) == "test"]
    assert 0.1 < len(test) / len(rows) < 0.3
    assert all(row["solution"].endswith(task.boxed(row["answer"])) for row in rows)


@pytest.mark.parametrize(
    ("solution", "answer"), [("3+5=8\n#### 8", "8"), ("So \\boxed{8}.", "8"), ("3+5=8\nAnswer: 8", "8"), ("8", "8")]
)
def test_the_answer_in_a_worked_solution(tmp_path, solution, answer):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"question": "What is 3+5?", "completion": solution}))
    assert load_solutions(path=path) == [{"problem": "What is 3+5?", "solution": solution, "answer": answer}]


def test_a_cell_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "solution": "b"}\n{"prompt": [{"role": "user"}], "solution": "b"}\n')
    with pytest.raises(DataError, match="bad.jsonl, row 2: column prompt is empty, or not text"):
        load_solutions(path=path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lerning_rate=1"], "no setting 'lerning_rate'; did you mean learning_rate?"),
        (["learning_rate=fast"], "learning_rate must be a number"),
        (["max_length=0"], "max_length must be at least 1"),
        (["learning_rate=0"], "learning_rate must be greater than 0"),
        (["lr_scheduler_type=square"], "trainer cannot be built"),
        (["evaluation.samples=0"], "samples must be at least 1"),
        (["temperature=0"], "temperature must be greater than 0"),
        (["capo.mode=mask"], "no setting 'capo'"),
        (["method=grpo"], "cannot be composed"),
        (["task=nothing"], "no task 'nothing'; there are"),
        (["data.path=gone.jsonl"], "gone.jsonl does not exist"),
        (["data.path=null", "data.name=lab"], "data.name=lab has no worked solutions"),
        (["model_name_or_path=null"], "model_name_or_path is not set"),
        (["model_name_or_path=gone/policy"], "gone/policy cannot be loaded"),
        (["--config-name", "nothing"], "no cold start 'nothing'; there are gsm_symbolic"),
    ],
)
def test_bad_input_is_one_sentence(make, overrides, message, tmp_path):
    code, _, err = make(*overrides)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "sft").exists()
