"""Problems of reasoning-gym: drawn, split, looked over, and scored by their tasks in worker processes."""

import re
import sys
from pathlib import Path

import pytest

from open_r1_capo.settings.recipes import RECIPES, compose_recipe
from open_r1_capo.settings.run import read
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.data import DataError, stated_answer
from open_r1_capo.tasks.gym import problems as gym
from open_r1_capo.tasks.gym.scores import GymVerifier
from open_r1_capo.tasks.rewards import accuracy_reward, score_reward
from open_r1_capo.tasks.source import problem_source

TASKS = sorted(path.stem for path in (RECIPES / "task").glob("*.yaml") if "reasoning_gym" in path.read_text())
SUMS = {"max_terms": 2, "max_digits": 2}


def composed(*overrides):
    return read(compose_recipe("grpo_aggressive", list(overrides)))[0]


@pytest.fixture
def installed():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (the extra `gym`)")


@pytest.fixture(scope="module")
def workers():
    pool = GymVerifier(workers=1)
    yield pool
    pool.close()


# ------------------------------------------------------------------ problems


@pytest.mark.parametrize(("task", "options"), [("chain_sum", SUMS), ("gsm_symbolic", {}), ("word_sorting", {})])
def test_train_and_held_out_problems_share_no_text(installed, task, options):
    test = [row["problem"] for row in gym.draw(task, options, "test", 100)]
    assert len(set(test)) == 100
    for seed in range(3):
        train = {row["problem"] for row in gym.draw(task, options, "train", 300, seed)}
        assert len(train) > 50
        assert not train & set(test)


def test_problems_follow_from_the_seed(installed):
    first = gym.draw("chain_sum", SUMS, "train", 20, seed=1)
    assert first == gym.draw("chain_sum", SUMS, "train", 50, seed=1)[:20]
    following = gym.draw("chain_sum", SUMS, "train", 20, seed=2)
    assert {row["problem"] for row in first[1:]}.isdisjoint({row["problem"] for row in following[:-1]} - {""})


def test_options_reach_the_task_and_rows_lead_back_to_their_problems(installed):
    for row in gym.draw("chain_sum", {"min_terms": 4, "max_terms": 4, "allow_negation": True}, "train", 20):
        _, entry = gym.find(row["entry"])
        assert (entry["question"], entry["answer"]) == (row["problem"], row["answer"])
        assert entry["metadata"]["num_terms"] == 4


def test_too_few_different_problems(installed):
    options = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    with pytest.raises(
        DataError, match=r"chain_sum has only \d test problems .* 50 were asked for: widen the options"
    ):
        gym.draw("chain_sum", options, "test", 50)


def test_worked_solutions_end_in_the_right_answer(installed):
    rows = gym.worked("gsm_symbolic", {}, 50)
    held_out = {row["problem"] for row in gym.draw("gsm_symbolic", {}, "test", 100)}
    references = {row["problem"]: row["entry"] for row in gym.draw("gsm_symbolic", {}, "train", 100)}
    for row in rows:
        assert row["problem"] not in held_out
        assert len(row["solution"].splitlines()) > 1
        data, entry = gym.find(references[row["problem"]])
        assert data.score_answer(stated_answer(row["solution"]), entry) == 1
    with pytest.raises(DataError, match="chain_sum has no worked solutions; reasoning_gym/gsm_symbolic has"):
        gym.worked("chain_sum", {}, 1)


# ------------------------------------------------------------------ settings


def test_a_recipe_names_a_task_and_its_options(installed):
    run = composed("data.name=reasoning_gym/chain_sum", "data.options.max_terms=2", "reward_funcs=[score]")
    assert run.data.options == {"max_terms": 2}


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_of_recipes_have_their_held_out_problems(installed, name):
    run = composed(f"task={name}")
    wanted = run.evaluation.problems
    assert len(problem_source(run.data.name).held_out(run.data, wanted)) == wanted > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=reasoning_gym/chain_sm"], "data.name=reasoning_gym/chain_sm: .* did you mean chain_sum?"),
        (["data.name=reasoning_gym"], "no such task; there are complex_arithmetic"),
        (["data.options.max_trms=2"], "data.options.max_trms: .* did you mean max_terms?"),
        (["data.options.max_terms=1"], "the task chain_sum refuses .*max_terms must be >= min_terms"),
        (["data.options.max_terms=two"], "data.options.max_terms must be a whole number, got 'two'"),
        (["data.options.max_terms=true"], "data.options.max_terms must be a whole number, got True"),
        (["data.options.allow_negation=1"], "data.options.allow_negation must be true or false, got 1"),
        (["data.options.seed=1"], "data.options.seed follows from the run"),
        (["data.options=2"], "data.options takes values by name: write data.options.<key>=<value>"),
        (["data.name=reasoning_gym/gsm_symbolic", "data.options.difficulty=2"], "refuses .*out of range"),
        (["data.variant=story"], "data.variant has no effect with data.name=reasoning_gym/chain_sum"),
        (["data.name=lab", "data.options.max_terms=2"], "data.options.max_terms has no effect with data.name=lab"),
        (["data.name=reasoning_gym/chain_sm", "data.path=mine.jsonl"], "data.name=.* did you mean chain_sum?"),
        (["evaluation.suite=3"], "evaluation.suite needs named test sets"),
        (
            ["data.name=lab", "reward_funcs=[score]"],
            r"reward_funcs=\[score\] needs problems of data.name=reasoning_gym",
        ),
    ],
)
def test_bad_settings(installed, overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed("data.name=reasoning_gym/chain_sum", *overrides)


def test_without_the_package_one_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"data.name=reasoning_gym/… needs .*pip install 'reasoning-gym=="):
        composed("data.name=reasoning_gym/chain_sum")
    assert f'"{gym.PACKAGE}"' in (Path(__file__).parents[2] / "setup.py").read_text()


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>3</answer> or <answer> 4 </answer>. Answer: 5", "4"),
        (r"\boxed{3}, no, \boxed{\frac{1}{2}}. Answer: 5", r"\frac{1}{2}"),
        ("2+2=4\nAnswer: 5\nanswer: **4**\nThat is all.", "4"),
        (" 4\n", "4"),
        ("<answer>4", "<answer>4"),
        ("", ""),
    ],
)
def test_the_stated_answer(text, answer):
    assert stated_answer(text) == answer


def test_the_tasks_score_is_the_reward_and_accuracy_is_whether_it_is_right(installed):
    rows = gym.draw("chain_sum", SUMS, "train", 3)
    entries = [row["entry"] for row in rows]
    texts = [f"So it is \\boxed{{{rows[0]['answer']}}}.", f"Answer: {rows[1]['answer']}0", "I do not know."]
    completions = [texts[0], [{"role": "assistant", "content": texts[1]}], texts[2]]
    digits = len(rows[1]["answer"])
    assert score_reward(completions, entries) == pytest.approx([1.0, digits / (digits + 1), 0.0])  # its partial credit
    assert accuracy_reward(completions, solution=["?"] * 3, entry=entries) == [1.0, 0.0, 0.0]
    assert accuracy_reward(["4"], entry=['{"task": "gone", "options": {}, "seed": 0, "index": 0}']) == [None]


def test_answers_that_are_programs_do_no_harm(installed, workers, tmp_path):
    """Some tasks evaluate the answer: it gets neither files nor programs, and only so much time."""
    (row,) = gym.draw("spiral_matrix", {}, "train", 1)
    target = tmp_path / "written"
    programs = [
        f"[open({str(target)!r}, 'w').write('x')]",
        f"[__import__('os').system('touch {target}')]",
        f"[__import__('subprocess').run(['touch', {str(target)!r}])]",
        f"[__import__('pathlib').Path({str(target)!r}).mkdir()]",
    ]
    pairs = [(row["entry"], f"<answer>{text}</answer>") for text in [*programs, f"[{row['answer']}]"]]
    assert all(score < 1 for score in workers.verify(pairs[:-1]))
    assert not target.exists()
    assert workers.verify([(row["entry"], row["answer"])]) == [1.0]
    impatient = GymVerifier(workers=1, timeout=0.5)
    try:
        assert impatient.verify([(row["entry"], "<answer>[9**9**9**9]</answer>")]) == [0.0]
    finally:
        impatient.close()


def test_of_a_number_the_last_one_stated_counts(installed, workers):
    (row,) = gym.draw("chain_sum", SUMS | {"min_digits": 2}, "train", 1)
    right = int(row["answer"])
    texts = [f"1 + 1 is {right} apples.", f"{right + 4}-4={right}", f"Answer: {right} or {right + 1}"]
    assert workers.verify([(row["entry"], text) for text in texts]) == [1.0, 1.0, 0.0]
    assert (workers.verify([(row["entry"], f"-{abs(right)}")]) == [1.0]) == (right <= 0)


@pytest.mark.parametrize("task", ["gsm_symbolic", "number_sorting", "countdown", "word_sorting", "simple_equations"])
def test_each_gold_answer_scores_1(installed, workers, task):
    rows = gym.draw(task, {}, "test", 5)
    assert workers.verify([(row["entry"], f"Answer: {row['answer']}") for row in rows]) == [1.0] * 5
    assert not [row for row in rows if re.search("entry|seed", row["problem"])]
