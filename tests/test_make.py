"""What make takes on its command line: a variable that no rule reads is refused, not dropped; no means no."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from test_repo import commands, outside_make

ROOT = Path(__file__).resolve().parents[1]
MAKEFILES = [ROOT / "Makefile", ROOT / "eval" / "eval.mk", ROOT / "benchmarks" / "bench.mk"]
INNER = {
    "BIN",
    "CPU_WHEELS",
    "CUDA",
    "CURDIR",
    "EVAL_FLAGS",
    "MAKEFILE_LIST",
    "PIP",
    "PYTHON",
    "STAMP",
    "TORCH",
    "VENV",
    "YES",
}
TRAIN = "RECIPE, SCALE, SEED, ARGS, OVERWRITE"


def dry(*words):
    """What make would do with these words."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, env=outside_make())
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("verb", ["train", "sft"])
@pytest.mark.parametrize("value", ["0", "false", "no", ""])
def test_no_overwriting_where_it_is_denied(verb, value):
    code, out, _ = dry(verb, f"OVERWRITE={value}")
    assert code == 0
    assert "overwrite=true" not in out


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_overwriting_where_it_is_asked_for(value):
    assert "overwrite=true" in dry("train", f"OVERWRITE={value}")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "learning_rate=1e-3"], 'read learning_rate: a setting is written ARGS="learning_rate=1e-3"'),
        (["train", "learning_rate=1e-3", "capo.top_k=5"], 'ARGS="capo.top_k=5 learning_rate=1e-3"'),
        (["train", "recipe=capo_budget"], "train does not read recipe: write RECIPE=capo_budget"),
        (["train", "STEPS=10"], f"train does not read STEPS: it takes {TRAIN}"),
        (["train", "NAME=fig2"], f"train does not read NAME: it takes {TRAIN}"),
        (["plan", "OVERWRITE=1"], "plan does not read OVERWRITE: it takes RECIPE, SCALE"),
        (["quality", "ARGS=src"], "quality does not read ARGS: it takes no variable"),
        (["train", "OVERWRITE=maybe"], "OVERWRITE=maybe is neither 1 (yes) nor 0 (no)"),
        (["train", "grpo_budget"], "there is no verb grpo_budget"),
    ],
)  # fmt: skip
def test_what_no_rule_reads_is_refused(words, sentence):
    code, out, err = dry(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_an_own_model_is_trained_within_a_budget():
    assert "--config-name grpo_budget scale=own" in dry("train", "SCALE=own")[1]
    assert "--config-name capo_budget scale=own" in dry("train", "SCALE=own", "RECIPE=capo_budget")[1]


@pytest.mark.parametrize("line", sorted({line for _, line in commands() if re.match("make [^|;]*$", line)}))
def test_documented_commands_are_taken(line):
    assert dry(*shlex.split(line)[1:])[0] == 0


def test_several_verbs_take_each_others_variables():
    assert dry("report", "compare", "RUN=a", "RUNS=a b")[0] == 0


def test_values_of_several_words_and_signs():
    code, out, _ = dry("train", "ARGS=learning_rate=1e-3 rule=scale data.path='a b'")
    assert code == 0
    assert "learning_rate=1e-3 rule=scale data.path='a b'" in out


def test_a_run_with_spaces_in_its_path():
    assert "open_r1_capo.report 'my run'" in dry("report", "RUN=my run")[1]


def test_the_table_of_variables_is_what_the_rules_read():
    """Each verb's row names the variables of its rule, of the help line and of no other."""
    text = "\n".join(path.read_text() for path in MAKEFILES)
    for verb, head, body in re.findall(r"^([a-z-]+):(.*)\n((?:\t.*\n|#.*\n)*)", text, re.MULTILINE):
        row = re.search(rf"^TAKES_{verb} := (.*)$", text, re.MULTILINE)
        takes = set(row[1].split()) if row else set()
        read = set(re.findall(r"\$\(([A-Z_]+)\)", body)) | set(re.findall(r"if \$\(([A-Z_]+)\)", body))
        read |= {name for names in re.findall(r"foreach name,([A-Z_ ]+),", body) for name in names.split()}
        assert read - INNER <= takes, verb
        documented = set(re.findall(r"\b([A-Z_]{4,})=", head.partition("; theorem:")[0])) - {"NAME"}
        assert documented <= takes | {"NAME"}, verb


def test_a_run_that_is_not_there_installs_nothing():
    """`make eval` builds two environments: it looks first."""
    assert dry("eval", "RUN=nowhere")[1].startswith("test -d 'nowhere'")
