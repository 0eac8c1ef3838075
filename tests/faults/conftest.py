"""What the drills share: repetitions, random moments that a number repeats, runs that are cleared away."""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from processes import ANEW, CHEAP, Server, folder_of, train

from test_grpo import command

TIMES = int(os.environ.get("TIMES") or 1)
MOMENTS = os.environ.get("MOMENTS") or str(random.randrange(10**6))


@pytest.fixture(params=range(TIMES), autouse=True)
def repetition(request):
    return request.param


@pytest.fixture
def rng(request):
    print(f"MOMENTS={MOMENTS} repeats these moments")
    return random.Random(f"{MOMENTS}/{request.node.name}")


@pytest.fixture
def anew(repetition):
    return ANEW and repetition == 0


@pytest.fixture
def start(tmp_path, lab_policy, anew):
    """Start the run of this test; whatever still lives at the test's end is killed."""
    started = []

    def start(*overrides, root=tmp_path, injury=None):
        started.append(train(command(root, lab_policy, CHEAP, *overrides), tmp_path / "log", anew, injury))
        return started[-1]

    yield start
    for process in started:
        process.kill().wait()


@pytest.fixture
def serve(tmp_path, lab_policy):
    started = []

    def serve(port=None):
        started.append(Server(lab_policy, tmp_path / "server.log", port))
        return started[-1]

    yield serve
    for server in started:
        server.kill().wait()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, lab_policy):
    """The folder of the uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    process = train(command(root, lab_policy, CHEAP), root / "log", ANEW)
    assert process.wait() == 0, process.text()
    return folder_of(root)
