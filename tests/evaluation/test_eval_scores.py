"""The test sets' gold answers, how answers are scored, and the numbers made of the scores."""

import json
import math
import os
import statistics
from pathlib import Path

import pytest

from open_r1_capo.evaluation import data_check, gold_check, results, scoring, suite
from open_r1_capo.tasks.data import DataError

BENCHMARKS = Path(os.environ.get("CAPO_BENCHMARKS") or Path(__file__).parents[3] / "shared" / "benchmarks")
BY_NAME = {benchmark.name: benchmark for benchmark in suite.OPEN}
QUESTION = {
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
}


@pytest.mark.parametrize(
    ("name", "row", "gold"),
    [
        ("gsm8k", {"question": "q", "answer": "so 2,000+125\n#### 2,125"}, "\\boxed{2125}"),
        ("gsm8k", {"problem": "q", "answer": "1,234,567"}, "\\boxed{1234567}"),
        ("math_500", {"problem": "q", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}, None),
        ("olympiadbench", {"question": "q", "final_answer": ["$1$,$\\frac{1}{2}$"]}, "\\boxed{1,\\frac{1}{2}}"),
        ("olympiadbench", {"problem": "q", "answer": "$\\frac{1}{2 n+2}$"}, "\\boxed{\\frac{1}{2 n+2}}"),
        ("minervamath", {"question": "q", "answer": "4.5e33"}, "\\boxed{4.5 \\times 10^{33}}"),
        ("minervamath", {"problem": "q", "solution": "so \\boxed{-1./3}"}, "\\boxed{-1/3}"),
        ("minervamath", {"problem": "q", "answer": "np.arcsin(10/13)"}, "\\boxed{\\arcsin(10/13)}"),
        ("amc23", {"question": "q", "answer": 27.0}, "\\boxed{27}"),
        ("aime24", {"problem": "q", "answer": "025"}, "\\boxed{25}"),
        ("aime25", {"problem": "q", "answer": "336^\\circ"}, "\\boxed{336}"),
    ],
)
def test_gold_answers(name, row, gold):
    record = suite.record(BY_NAME[name], row, 7)
    gold = gold or f"\\boxed{{{row['answer']}}}"
    assert record == {"id": "7", "problem": "q", "gold": gold, "kind": BY_NAME[name].kind}
    assert suite.record(BY_NAME[name], record, 0) == record


def test_choices_are_ordered_by_the_question_alone():
    lines, letter = suite.choices(QUESTION)
    assert suite.choices(dict(reversed(QUESTION.items()))) == (lines, letter)
    assert f"({letter}) right" in lines.splitlines()
    letters = {suite.choices(QUESTION | {"Question": f"{i}?"})[1] for i in range(40)}
    assert letters == set("ABCD")
    record = suite.record(BY_NAME["gpqa_diamond"], QUESTION, 0)
    assert (record["gold"], record["kind"]) == (letter, "choice")
    assert lines in record["problem"]


def test_select():
    assert suite.select("") == suite.select(None) == suite.OPEN
    assert [b.title for b in suite.OPEN] == [
        *("GSM8K", "MATH500", "OlympiadBench", "MinervaMath", "GPQA-Diamond", "AMC23", "AIME24", "AIME25")
    ]
    assert len(suite.select("", default="lab")) == 8
    assert [b.name for b in suite.select("aime24, gsm8k")] == ["gsm8k", "aime24"]
    assert len(suite.select("open lab")) == 16
    with pytest.raises(DataError, match="unknown task gsm9k; known: open, lab, gsm8k"):
        suite.select("gsm8k,gsm9k")


def test_missing_and_malformed_test_sets(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="the data folder .*nowhere does not exist"):
        suite.records(BY_NAME["gsm8k"], tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file .*gsm8k\.jsonl"):
        suite.records(BY_NAME["gsm8k"], tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"pro\n')
    with pytest.raises(DataError, match=r"gsm8k\.jsonl: 1 of 2 lines cannot be used: line 2"):
        suite.records(BY_NAME["gsm8k"], tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"problem": "p", "answer": "none"}\n')
    with pytest.raises(DataError, match="aime24, row 0: ValueError"):
        suite.records(BY_NAME["aime24"], tmp_path)

    def gated(*_):
        raise DataError("gated")

    monkeypatch.setattr(suite, "hub_rows", gated)
    with pytest.raises(DataError, match=r"GPQA-Diamond is gated .* accept the terms of Idavidrein/gpqa"):
        suite.records(BY_NAME["gpqa_diamond"], tmp_path)


def test_lab_sets_are_fixed_and_held_out():
    benchmark = suite.SUITES["lab"][0]
    rows = suite.records(benchmark)
    assert rows == suite.records(benchmark)
    assert len(rows) == suite.DRAWN_PROBLEMS
    assert rows[0]["gold"].startswith("\\boxed{")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.5 \\times 10^{33}", 4.5e33),
        ("4.5e33", 4.5e33),
        ("-2.2 \\cdot 10^-6", -2.2e-6),
        ("15{,}000 \\mathrm{~km}", 15000),
        ("1,234.5\\text{ ergs}", 1234.5),
        ("-1/3", -1 / 3),
        (".5", 0.5),
        ("$7$.", 7),
        ("10**3", None),
        ("1/0", None),
        ("1e999", None),
        ("\\frac{1}{3}", None),
        ("x", None),
        ("", None),
    ],
)
def test_number(text, value):
    assert scoring.number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "score"),
    [
        ("number", "\\boxed{4.5 \\times 10^{33}}", "\\boxed{4.47e33}", 1.0),
        ("number", "\\boxed{4.5 \\times 10^{33}}", "\\boxed{4.4e33}", 0.0),
        ("number", "\\boxed{1 \\times 10^{-8}}", "\\boxed{2 \\times 10^{-10}}", 0.0),
        ("number", "\\boxed{1 \\times 10^{-8}}", "\\boxed{x}", 0.0),
        ("number", "\\boxed{0}", "\\boxed{0.0}", 1.0),
        ("number", "\\boxed{0.25}", "\\boxed{\\frac{1}{4}}", 1.0),
        ("number", "\\boxed{\\frac{1}{s+a}}", "\\boxed{\\frac{1}{a+s}}", 1.0),
        ("math", "\\boxed{1,\\frac{1}{2}}", "\\boxed{\\frac{1}{2}, 1}", 1.0),
        ("math", "\\boxed{2125}", "\\boxed{2,125}", 1.0),
        ("math", "\\boxed{25}", "\\boxed{025}", 1.0),
        ("math", "", "\\boxed{1}", None),
        ("choice", "B", "\\boxed{\\text{(B)}}", 1.0),
        ("choice", "B", "\\boxed{b.}", 1.0),
        ("choice", "B", "so the answer is (B).", 1.0),
        ("choice", "B", "The answer is A. No, the answer is B", 1.0),
        ("choice", "B", "\\boxed{A} or the answer is B", 0.0),
        ("choice", "B", "B looks good", 0.0),
    ],
)
def test_score(kind, gold, answer, score):
    assert scoring.score([(kind, gold, answer)]) == [score]


def test_score_keeps_the_order_of_mixed_kinds():
    items = [("choice", "A", "\\boxed{A}"), ("math", "\\boxed{2}", "\\boxed{3}")]
    items.append(("number", "\\boxed{5}", "\\boxed{5}"))
    assert scoring.score(items * 3) == [1.0, 0.0, 1.0] * 3


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no folder of benchmarks")
@pytest.mark.parametrize(
    ("name", "first", "wrong", "right"),
    [
        ("gsm8k", 250, set(), set()),
        # 5 accepts another problem's x=5
        ("math_500", 100, set(), {"test/algebra/1837.json"}),
        ("olympiadbench", 100, set(), set()),
        # the source writes this answer as numpy code
        ("minervamath", 80, {"minervamath-5"}, set()),
        ("amc23", None, set(), set()),
        ("aime24", None, set(), set()),
        ("aime25", None, set(), set()),
    ],
)
def test_gold_answers_score_one_and_swapped_ones_zero(name, first, wrong, right):
    rows = suite.records(BY_NAME[name], BENCHMARKS)[:first]
    originals = gold_check.original_answers(BY_NAME[name], str(BENCHMARKS))[: len(rows)]
    found_wrong, found_right = gold_check.check(rows, originals)
    assert {identity for identity, *_ in found_wrong} == wrong
    assert {identity for identity, *_ in found_right} == right


def test_standard_errors():
    means = [1.0, 0.5, 0.0, 0.75]
    assert results.problem_error(means) == pytest.approx(statistics.stdev(means) / 2)
    within = [statistics.variance(answers) / 4 for answers in ([1] * 4, [1, 1, 0, 0], [0] * 4, [1, 1, 1, 0])]
    assert results.sample_error(means, 4) == pytest.approx(math.sqrt(sum(within)) / 4)
    assert results.sample_error(means, 1) is None
    assert results.problem_error([1.0]) is None


def test_summary_leaves_unparsable_problems_out():
    problems = [{"accuracy": a, "tokens": t} for a, t in ((1.0, [10, 20]), (None, [5, 5]), (0.5, [20, 20]))]
    row = results.summarise(problems, samples=2, max_tokens=20)
    assert (row["accuracy"], row["n"], row["excluded"], row["samples"]) == (0.75, 2, 1, 2)
    assert (row["tokens"], row["cut_off"]) == (80, 0.5)


def example(missing=()):
    problems = [{"accuracy": a, "tokens": [3]} for a in (0.0, 1.0, 1.0)]
    rows = {name: {"title": name.upper()} | results.summarise(problems, 1, 9) for name in ("a", "b")}
    return {
        "model": {"name": "m", "fingerprint": "f"},
        "settings": {"limit": None},
        "data": {"sha256": {"a": "0"}},
        "versions": {"vllm": "0"},
        "commit": "c",
        "tasks": rows,
        "test": results.test_mean(rows, missing),
    }


def test_mean_over_what_there_is(tmp_path):
    found = example(missing=["GPQA-Diamond"])
    error = results.problem_error([0.0, 1.0, 1.0])
    assert found["test"] == {
        "accuracy": pytest.approx(2 / 3),
        "stderr": pytest.approx(error / math.sqrt(2)),
        "over": 2,
        "missing": ["GPQA-Diamond"],
    }
    results.write(found, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["test"]["over"] == 2
    text = (tmp_path / "results.md").read_text()
    assert "| A | 66.7 | 33.3 | – | 3 | 1 | 3 | 0.0 |" in text
    assert "TEST is the mean over 2 test sets; missing: GPQA-Diamond." in text
    assert '"commit": "c"' in text


def test_overlap_by_both_measures():
    train = [{"problem": "What is $1+1$?"}, {"problem": "Find  x.\n"}]
    test = [{"problem": "What is $1-1$?"}, {"problem": "Find x."}]
    assert data_check.overlap(train, test, data_check.normalise) == [(train[1], test[1])]
    assert len(data_check.overlap(train, test, data_check.letters)) == 2


@pytest.mark.parametrize(
    ("names", "said"), [([], "holds no test set"), (["gsm8k"], "does not exist"), (["gsm9k"], "unknown task gsm9k")]
)
def test_gold_answers_that_are_not_there(tmp_path, capsys, names, said):
    assert gold_check.main([str(tmp_path / "nowhere"), *names]) == 2
    assert said in capsys.readouterr().err
