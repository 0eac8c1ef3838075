"""Data sets, gold answers, and the one prompt template."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from open_r1_capo.tasks import data
from open_r1_capo.tasks.data import (
    DataError,
    gold_answer,
    load_problems,
    make_prompt,
    prompt_template_hash,
    to_prompts,
)

BENCHMARKS = Path(os.environ.get("CAPO_BENCHMARKS") or Path(__file__).parents[3] / "shared" / "benchmarks")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ("so \\boxed{3} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("so \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("so $\\boxed 7$.", "7"),
        ("so \\fbox{7}", "7"),
        ("so \\boxed{7", ""),
        ("4 + 5 = <<4+5=9>>9\n#### 1,009", "1,009"),
        (27, "27"),
        (["$2$", "$3$"], "$2$, $3$"),
        (None, ""),
        (" 025 ", "025"),
    ],
)
def test_gold_answer(cell, answer):
    assert gold_answer(cell) == answer


def test_boxed_drops_dollars_but_not_the_currency():
    assert data.boxed("$2$, $3$") == "\\boxed{2, 3}"
    assert data.boxed("\\$18") == "\\boxed{\\$18}"
    assert data.boxed(" ") == ""


def test_prompts_have_the_columns_that_the_trainer_reads(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "2", "level": 3}])
    row = to_prompts(load_problems(path=path), "Think.")[0]
    assert row["prompt"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    assert row["prompt"] == make_prompt("1+1?", "Think.")
    assert (row["solution"], row["problem"], row["answer"], row["level"]) == ("\\boxed{2}", "1+1?", "2", "3")


def test_prompt_without_system_turn_and_hash():
    assert make_prompt("p", None) == make_prompt("p", "") == [{"role": "user", "content": "p"}]
    assert prompt_template_hash("a") == prompt_template_hash("a") != prompt_template_hash("b")
    assert len(prompt_template_hash(None)) == 16


def test_columns_are_found_or_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "solution": "so \\boxed{2}", "other": 1}])
    assert load_problems(path=path)[0] == {"problem": "q", "answer": "2"}
    with pytest.raises(
        DataError, match=r"no column problem or .*; its columns are a, b: name .* data.problem_column="
    ):
        load_problems(path=write(tmp_path / "b.jsonl", [{"a": "q", "b": "1"}]))
    with pytest.raises(DataError, match=r"no column gold; its columns are question, solution, other"):
        load_problems(path=path, answer_column="gold")


def test_folder_takes_the_split_and_parquet(tmp_path):
    write(tmp_path / "test.jsonl", [{"problem": "t", "answer": "1"}])
    rows = load_problems(path=write(tmp_path / "x.jsonl", [{"problem": "p", "answer": "1"}]))
    rows.to_parquet(tmp_path / "train-0.parquet")
    rows.to_parquet(tmp_path / "train-1.parquet")
    assert load_problems(path=tmp_path)["problem"] == ["p", "p"]
    assert load_problems(path=tmp_path, split="test")["problem"] == ["t"]
    with pytest.raises(DataError, match=r"no file named dev\*; name one of its files"):
        load_problems(path=tmp_path, split="dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"problem": "p", "answer": "1"}\n{"problem": \n',
            r"a\.jsonl: 1 of 2 lines cannot be used: line 2 is not a JSON object \(Expecting value at col",
        ),
        (
            b'{"problem": "p", "answer": "1"}\n\n[1]\n',
            r"1 of 2 lines cannot be used: line 3 is not a JSON object \(it is a list\)",
        ),
        (b'{"problem": "\xff"}\n', r"line 1 is not a JSON object"),
        (
            b'{"problem": "p", "answer": "1"}\n{"problem": "p"}\n',
            r"1 of 2 rows cannot be used: row 2 has nothing in column answer",
        ),
        (b'{"problem": "p", "solution": "no box"}\n{"problem": "p", "solution": "\\\\boxed{"}\n', None),
        (b"\n", r"holds no problem"),
        (b'{"problem": "p", "answer": ""}\n', r"row 1 has nothing in column answer: mend them, or take them out"),
        (b'{"problem": "p", "solution": "\\\\boxed{"}\n', r"no answer found in column solution"),
        (b"{\n" * 5 + b'{"problem": "p", "answer": "1"}\n', r"5 of 6 lines .* line 1 .*; line 3 .*; and 2 more: mend"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    if message is None:  # a solution without a box counts as the answer itself
        assert load_problems(path=path)["answer"] == ["no box", ""]
        return
    with pytest.raises(DataError, match=message):
        load_problems(path=path)


def test_missing_things_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"data\.path=.*nowhere does not exist"):
        load_problems(path=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither \.jsonl nor \.parquet"):
        load_problems(path=write(tmp_path / "a.csv", []))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="is not a Parquet file"):
        load_problems(path=tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"give data\.name=<name> or data\.path="):
        load_problems()


@pytest.fixture
def nobody():
    """Without the rights of root, for whom every file can be read."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_an_unreadable_file_is_one_sentence(tmp_path, nobody):
    """A file without permission to read, in a folder of another user."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", tempfile.gettempdir())))
    path = write(folder / "a.jsonl", [{"problem": "p", "answer": "1"}])
    try:
        path.chmod(0)
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
            load_problems(path=path)
        folder.chmod(0)
        for there in (path, folder):
            with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
                load_problems(path=there)
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_offline_says_how_to_use_a_local_copy(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"no-one/nothing could not be downloaded .*local copy: data\.path="):
        load_problems("no-one/nothing")


def test_incomplete_math_is_refused(tmp_path):
    write(tmp_path / "math_train.jsonl", [{"problem": "p", "answer": "1", "split": "train"}])
    with pytest.raises(DataError, match="has 1 problems instead of 7500"):
        load_problems("math_train_7500", tmp_path)


def test_math_12000_from_the_hub_leaves_math_500_out(monkeypatch):
    def rows(name, config, split):
        if name == data.MATH_500:
            return [{"problem": "test 0\n"}]
        return [{"problem": f"{split} {i}", "solution": f"\\boxed{{{i}}}"} for i in range(2)]

    monkeypatch.setattr(data, "hub_rows", rows)
    monkeypatch.setitem(data.MATH_SETS, "math_train_12000", 3)
    loaded = load_problems("math_train_12000")
    assert loaded["problem"] == ["train 0", "train 1", "test 1"]
    assert loaded["answer"] == ["0", "1", "1"]


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no folder of benchmarks")
@pytest.mark.parametrize(("name", "rows"), data.MATH_SETS.items())
def test_math_from_a_folder(name, rows):
    loaded = load_problems(name, BENCHMARKS)
    assert len(loaded) == rows
    assert all(loaded["answer"])
