"""KLBudget: every step within its budget, whatever the rate; what is taken back, and what is refused."""

import math

import pytest
import torch

from open_r1_capo.budget import KLBudget, Schedule, sampled_kl


class Policy:
    """A categorical policy over nine actions in six states, its optimizer, and the KL to where it was."""

    def __init__(self, kind=torch.optim.Adam, lr=0.1, **options):
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
        self.target = torch.randint(9, (6,))
        self.optimizer = kind([self.logits], lr=lr, **options)
        self.old = None

    def backward(self):
        self.optimizer.zero_grad()
        self.old = self.logits.detach().log_softmax(1)
        loss = -self.logits.log_softmax(1)[torch.arange(6), self.target].mean()
        loss.backward()
        return float(loss.detach())

    def kl(self):
        return float((self.old.exp() * (self.old - self.logits.detach().log_softmax(1))).sum(1).mean())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("lr", [1e-6, 1.0, 1e4])
def test_target_keeps_every_step_within_the_budget(kind, lr):
    """From the first step, whatever the rate that the optimizer was given."""
    policy = Policy(kind, lr)
    budget = KLBudget(policy.optimizer, nats=1e-3)
    losses, taken = [], []
    for _ in range(30):
        losses.append(policy.backward())
        taken.append(budget.step(policy.kl))
        assert taken[-1].kl == pytest.approx(policy.kl(), rel=1e-6)  # it is where it says it is
        assert taken[-1].kl <= 1.5e-3
        assert policy.optimizer.param_groups[0]["lr"] == lr
    assert all(one.kl >= 1e-3 / 1.5 for one in taken[1:])  # and fills it, once α is known
    assert sum(one.passes for one in taken[1:]) <= 2.2 * 29
    assert losses[-1] < losses[0]


def test_verify_never_exceeds_the_scheduled_rate():
    policy = Policy(lr=1e-4)
    budget = KLBudget(policy.optimizer, nats=1e-3, rule="verify")
    policy.backward()
    taken = budget.step(policy.kl)
    assert (taken.alpha, taken.passes) == (1e-4, 1)
    assert taken.kl < 1e-3
    policy = Policy(lr=10.0)
    budget = KLBudget(policy.optimizer, nats=1e-3, rule="verify")
    for _ in range(10):
        policy.backward()
        taken = budget.step(policy.kl)
        assert policy.kl() <= 1.5e-3
        assert 0 < taken.alpha < 10.0


def test_a_step_of_its_own_budget():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    for nats in (1e-3, 1e-5, 3e-4, 2e-2):
        policy.backward()
        taken = budget.step(policy.kl, nats=nats)
        assert nats / 1.5 <= taken.kl <= 1.5 * nats
        assert taken.nats == nats


def test_a_share_of_the_entropy():
    policy = Policy()
    budget = KLBudget(policy.optimizer, entropy_share=0.01)
    policy.backward()
    assert budget.step(policy.kl, entropy=0.5).nats == pytest.approx(5e-3)
    with pytest.raises(ValueError, match="entropy_share needs the entropy"):
        budget.step(policy.kl)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine2", [1, 0.8536**2, 0.25, 0.1464**2])],
)
def test_schedules(schedule, expected):
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3, schedule=Schedule(schedule, 4))
    found = []
    for _ in range(4):
        policy.backward()
        found.append(budget.step(policy.kl).nats)
    assert found == pytest.approx([1e-3 * factor for factor in expected], rel=1e-3)


def test_the_budget_warms_up_as_a_rate_does():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3, schedule=Schedule(warmup_steps=2))
    nats = []
    for _ in range(3):
        policy.backward()
        nats.append(budget.step(policy.kl).nats)
    assert nats == pytest.approx([0.25e-3, 1e-3, 1e-3])


def test_passes_that_run_out_take_the_step_back():
    policy = Policy(lr=1e3)
    before = policy.logits.detach().clone()
    budget = KLBudget(policy.optimizer, nats=1e-6, rule="verify", max_passes=2)
    policy.backward()
    taken = budget.step(policy.kl)
    assert taken.taken_back
    assert (taken.kl, taken.alpha, taken.passes, budget.taken_back) == (0.0, 0.0, 2, 1)
    assert torch.allclose(policy.logits, before, rtol=0, atol=1e-12)


def test_the_longest_step_that_fits_is_kept_when_passes_run_out():
    """A KL that jumps: lengthening overshoots, and the shorter step is gone back to."""
    policy = Policy(torch.optim.SGD, lr=1.0)
    budget = KLBudget(policy.optimizer, nats=1e-3, max_passes=2)
    start = policy.logits.detach().clone()
    policy.backward()
    taken = budget.step(lambda: 1e-5 if float((policy.logits - start).abs().max()) < 1e-6 else 1.0)
    assert not taken.taken_back
    assert taken.kl == 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_taken_back(value):
    policy = Policy()
    before = policy.logits.detach().clone()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    policy.backward()
    assert budget.step(lambda: value).taken_back
    assert torch.allclose(policy.logits, before, rtol=0, atol=1e-12)
    assert budget.alpha > 0


def test_a_gradient_that_is_not_finite_spoils_no_moments():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    policy.backward()
    policy.logits.grad[0, 0] = math.nan
    before = policy.logits.detach().clone()
    assert budget.step(policy.kl).taken_back
    assert torch.equal(policy.logits, before)
    assert not policy.optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("known", [False, True], ids=["at first", "later"])
def test_steps_without_a_gradient_lengthen_nothing(kind, known):
    """Batches of equal rewards, from the first step on or later: α stays, and the next real step keeps its budget."""
    policy = Policy(kind)
    budget = KLBudget(policy.optimizer, nats=1e-3)
    for _ in range(3 * known):
        policy.backward()
        budget.step(policy.kl)
    alpha = budget.alpha
    for _ in range(4):
        policy.backward()
        policy.logits.grad.zero_()
        assert budget.step(policy.kl).kl <= 1.5e-3
        assert budget.alpha <= alpha
    before = policy.logits.detach().clone()
    policy.backward()
    taken = budget.step(policy.kl)
    assert policy.kl() == pytest.approx(taken.kl, rel=1e-6, abs=1e-12)
    assert policy.kl() <= 1.5e-3
    assert (policy.logits - before).abs().max() < 1


def test_steps_without_a_signal_do_not_let_the_rate_drift():
    """Their budgets differ from the last filled one; α follows from that one alone, however many there are."""
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    for _ in range(3):
        policy.backward()
        budget.step(policy.kl)
    alpha = budget.alpha
    for _ in range(5):
        policy.backward()
        policy.logits.grad.zero_()
        budget.step(lambda: 0.0, nats=4e-3)
    assert budget.alpha == alpha


def test_a_process_whose_shard_has_no_gradient_lengthens_with_the_others():
    """It must measure as often as they do."""
    policies = {signal: Policy() for signal in (None, False, True)}
    measured = dict.fromkeys(policies, 0)
    for signal, policy in policies.items():
        budget = KLBudget(policy.optimizer, nats=1e-3)
        policy.backward()
        policy.logits.grad.zero_()
        budget.begin(1e-3)
        policy.optimizer.step()

        def measure(signal=signal):
            measured[signal] += 1
            return 1e-6

        budget.settle(measure, 1e-3, signal=signal)
    assert measured == {None: 1, False: 1, True: budget.max_passes}


def test_a_kl_that_nothing_raises_does_not_lengthen_without_end():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    policy.backward()
    budget.step(policy.kl)
    alpha = budget.alpha
    policy.backward()
    budget.step(lambda: 0.0)
    assert budget.alpha <= 101 * alpha


def test_settling_a_step_that_was_not_begun_is_refused():
    budget = KLBudget(Policy().optimizer, nats=1e-3)
    with pytest.raises(ValueError, match=r"settle\(\) without begin\(\)"):
        budget.settle(lambda: 0.0, 1e-3)


def test_a_copied_step_keeps_its_direction_in_float32():
    """The first step is almost nothing: its direction must not be what the rounding of the parameters leaves."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4000))
    optimizer = torch.optim.RMSprop([parameter], lr=1.0)
    budget = KLBudget(optimizer, nats=1e-3)
    old = parameter.detach().clone()
    parameter.grad = torch.randn(4000)
    budget.step(lambda: float((parameter.detach() - old).square().mean()))
    direction = parameter.detach() - old
    exact = -parameter.grad / (0.1 * parameter.grad.abs() + 1e-8)
    assert torch.cosine_similarity(direction, exact, dim=0) > 0.999


def test_it_goes_on_exactly():
    def run(steps, budget, policy):
        for _ in range(steps):
            policy.backward()
            taken = budget.step(policy.kl)
        return taken

    whole = Policy()
    expected = run(6, KLBudget(whole.optimizer, nats=1e-3, schedule=Schedule("linear", 6)), whole)
    policy = Policy()
    first = KLBudget(policy.optimizer, nats=1e-3, schedule=Schedule("linear", 6))
    run(3, first, policy)
    second = KLBudget(policy.optimizer, nats=1e-3, schedule=Schedule("linear", 6))
    second.load_state_dict(first.state_dict())
    assert run(3, second, policy) == expected
    assert torch.equal(policy.logits, whole.logits)


def test_sampled_kl_measures_it_too():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    states = torch.arange(6).repeat_interleave(2000)
    for _ in range(3):
        policy.backward()
        actions = torch.multinomial(policy.old.exp(), 2000, replacement=True).flatten()
        old = policy.old[states, actions]
        budget.step(lambda old=old, a=actions: sampled_kl(old, policy.logits.log_softmax(1)[states, a]).mean)
        assert policy.kl() == pytest.approx(1e-3, rel=0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either nats or entropy_share"),
        ({"nats": 1e-3, "entropy_share": 0.1}, "either nats or entropy_share"),
        ({"nats": 0}, "nats must be greater than 0"),
        ({"nats": math.nan}, "nats must be greater than 0"),
        ({"entropy_share": -1}, "entropy_share must be greater than 0"),
        ({"nats": 1, "rule": "aim"}, "rule must be one of target, verify"),
        ({"nats": 1, "tolerance": 1.0}, "tolerance must be greater than 1"),
        ({"nats": 1, "max_passes": 0}, "max_passes must be at least 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        KLBudget(Policy().optimizer, **options)


def test_measurements_that_are_no_kl():
    policy = Policy()
    budget = KLBudget(policy.optimizer, nats=1e-3)
    policy.backward()
    with pytest.raises(ValueError, match=r"one number, the mean KL in nats, got a \(6,\) tensor"):
        budget.step(lambda: torch.zeros(6))
    with pytest.raises(ValueError, match="a KL divergence is not negative"):
        budget.step(lambda: -1e-3)
    with pytest.raises(ValueError, match="must be greater than 0 nats"):
        budget.step(policy.kl, nats=0.0)


def test_optimizers_that_cannot_be_pulled_back():
    class Wrapper:
        """As DeepSpeed's, which steps inside backward."""

    Wrapper.__module__ = "deepspeed.runtime.zero"
    with pytest.raises(ValueError, match="DeepSpeed takes its step inside the backward pass"):
        KLBudget(Wrapper(), nats=1e-3)
    with pytest.raises(ValueError, match="expected a torch optimizer, got int"):
        KLBudget(3, nats=1e-3)


def test_schedules_that_cannot_be():
    with pytest.raises(ValueError, match="schedule must be one of constant, linear, cosine2"):
        Schedule("cosine")
    with pytest.raises(ValueError, match="schedule=linear needs total_steps"):
        Schedule("linear")
