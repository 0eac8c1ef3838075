"""Rewards under Open-R1's names."""

import pytest

from open_r1_capo.tasks.rewards import (
    accuracy_reward,
    format_reward,
    get_reward_funcs,
    strict_accuracy_reward,
    tag_count_reward,
)


def test_accuracy_reward_takes_conversations_and_strings():
    completions = [[{"role": "assistant", "content": "\\boxed{4}"}], "\\boxed{5}", [], [{"role": "assistant"}]]
    assert accuracy_reward(completions, solution=["4", "4", "4", None], prompts=["?"] * 4) == [1.0, 0.0, 0.0, None]


def test_strict_accuracy_counts_boxed_and_stated_answers_alone():
    """What the authors' calls of math-verify give: only the last three rewards differ between the two."""
    right = [
        "\\boxed{4}",
        "So \\boxed{4}.",
        "The final answer is $4$. I hope it is correct.",
        "**Answer:** $\\frac{8}{2}$",
    ]
    wrong = ["\\boxed{5}", "$4$ is not it, the answer is $5$", ""]
    unstated = ["So the answer is 4.", "Thus $x=4$", "we compute 2+2 = 4"]
    texts = right + wrong + unstated
    solution = ["4"] * len(texts)
    assert strict_accuracy_reward(texts, solution=solution) == [1.0] * 4 + [0.0] * 6
    assert accuracy_reward(texts, solution=solution) == [1.0] * 4 + [0.0] * 3 + [1.0] * 3


def test_strict_accuracy_pays_where_the_gold_answer_cannot_be_parsed():
    assert strict_accuracy_reward(["\\boxed{5}", "nothing"], solution=["", ""]) == [1.0, 1.0]
    assert accuracy_reward(["\\boxed{5}", "nothing"], solution=["", ""]) == [None, None]


@pytest.mark.parametrize("solution", [None, ["4"]])
def test_accuracy_reward_needs_one_solution_a_completion(solution):
    with pytest.raises(ValueError, match="needs `solution` for 2 completions"):
        accuracy_reward(["a", "b"], solution=solution)


@pytest.mark.parametrize(
    ("text", "layout", "tags"),
    [
        ("<think>a</think>\n\\boxed{4}", 1.0, 1.0),
        ("<think>\na\n</think>\n<answer>\n4\n</answer>", 1.0, 1.0),
        ("<think>a</think> 4", 0.0, 0.5),
        ("a \\boxed{4}", 0.0, 0.5),
        ("<think>\\boxed{4}</think>", 0.0, 0.5),
        ("<think>a</think><think>b</think> \\boxed{4}", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_format_and_tag_count(text, layout, tags):
    assert format_reward([text], solution=["4"]) == [layout]
    assert tag_count_reward([[{"role": "assistant", "content": text}]]) == [tags]


def test_names():
    assert get_reward_funcs(["format", "accuracy"]) == [format_reward, accuracy_reward]
    known = "accuracy, strict_accuracy, format, tag_count, score, or <python file>:<function>"
    with pytest.raises(ValueError, match=f"unknown reward accurracy; known: {known}"):
        get_reward_funcs(["accurracy"])
