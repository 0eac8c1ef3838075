"""A reward function of the user's own: loaded from a file, called with what it names, and checked."""

import pytest

from open_r1_capo.tasks.own_reward import RewardError
from open_r1_capo.tasks.rewards import accuracy_reward, get_reward_funcs


@pytest.fixture
def file(tmp_path):
    def make(text):
        path = tmp_path / "größe (1).py"
        path.write_text(text)
        return str(path)

    return make


def test_it_is_called_with_what_it_names(file):
    path = file("def short(completions, answer):\n    return [len(c) + len(a) for c, a in zip(completions, answer)]\n")
    known, short = get_reward_funcs(["accuracy", f"{path}:short"])
    assert known is accuracy_reward
    assert short.__name__ == "short"  # TRL logs a reward by its function's name
    assert short(completions=["a", "bb"], answer=["1", "22"], prompts=["p", "q"], log_extra=None) == [2.0, 4.0]


def test_it_may_take_everything_and_leave_one_out(file):
    path = file("def everything(completions, **others):\n    return [None, len(others)]\n")
    (everything,) = get_reward_funcs([f"{path}:everything"])
    assert everything(completions=["a", "b"], answer=["1", "2"], prompts=["p", "q"]) == [None, 2.0]


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("def reward(completions): return [1]\n", "reward", r"must return a list of 2 numbers.*returned \[1\]"),
        ("def reward(completions): return 1\n", "reward", "must return a list of 2 numbers.*returned 1"),
        ("def reward(completions): return ['a', 'b']\n", "reward", "must return a list of 2 numbers"),
        ("def reward(completions): return [1]\n", "rewrad", "has no function 'rewrad'; it has reward"),
        ("def reward(completions) return [1]\n", "reward", "line 1 cannot be run: SyntaxError"),
        ("import nothing_of_that_name\n", "reward", "cannot be run: ModuleNotFoundError: No module named"),
    ],
)
def test_what_is_wrong_with_it(file, text, name, sentence):
    with pytest.raises(RewardError, match=sentence):
        get_reward_funcs([f"{file(text)}:{name}"])[0](completions=["a", "b"])


def test_a_missing_file():
    with pytest.raises(RewardError, match="there is no file nowhere.py: a reward is written <python file>:<function>"):
        get_reward_funcs(["nowhere.py:reward"])
