"""Random instances of a family of problems, sampled subsets of their trajectories, and the steps these propose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_r1_capo.experiments.theorem import mdp
from open_r1_capo.experiments.theorem.mdp import Problem, Values

CANDIDATES = 16  # subsets of a batch
SAMPLED = 8  # tokens of a trajectory of a discounted problem
RADII = (1e-2, 3.0)  # between which r, the longest candidate step's norm, is drawn; the logits' own spread is 0.3 to 3
DISCOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99)


@dataclass(frozen=True)
class Family:
    """A shape of problem; `horizon` 0 is a discounted problem, whose γ is drawn from DISCOUNTS."""

    name: str
    states: int
    actions: int
    horizon: int
    features: int = 0  # D; 0 is a tabular policy

    def draw(self, count: int, generator: torch.Generator) -> tuple[Problem, Tensor]:
        """`count` problems, and weights (count, A, D) of policies from nearly uniform to nearly certain."""
        s, a, d = self.states, self.actions, self.features or self.states
        start, moves = (_simplex((count, *shape), generator) for shape in ((s,), (s, a, s)))
        features = torch.eye(s, dtype=torch.float64).expand(count, s, s)
        if self.features:
            features = torch.randn(count, s, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        index = torch.randint(len(DISCOUNTS), (count,), generator=generator)
        discount = torch.tensor(DISCOUNTS, dtype=torch.float64)[index]
        problem = Problem(
            start=start,
            transition=moves,
            reward=2 * _uniform((count, s, a), generator) - 1,
            features=features,
            discount=torch.ones_like(discount) if self.horizon else discount,
        )
        if self.name.startswith("tokens"):
            problem = _token_tree(self, problem, generator)
        spread = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
        spread = spread[torch.randint(3, (count, 1, 1), generator=generator)]
        return problem, spread * torch.randn(count, a, d, generator=generator, dtype=torch.float64)


FAMILIES = (
    Family("bandit, 2 arms", 1, 2, 1),
    Family("bandit, 5 arms", 1, 5, 1),
    Family("discounted", 4, 3, 0),
    Family("discounted, shared features", 6, 3, 0, features=3),
    Family("finite, T = 2", 3, 3, 2),
    Family("finite, T = 4", 4, 2, 4),
    Family("tokens, T = 4", 15, 2, 4, features=4),  # every text of two tokens, one state each
)


def _token_tree(family: Family, problem: Problem, generator: torch.Generator) -> Problem:
    """A text is a state, a token its successor, and the last token is rewarded 0 or 1, as by a verifier (§3)."""
    count, s, a = problem.reward.shape
    start = torch.zeros(count, s, dtype=torch.float64)
    start[:, 0] = 1
    moves, reward = torch.zeros(count, s, a, s, dtype=torch.float64), torch.zeros(count, s, a, dtype=torch.float64)
    inner = s - a ** (family.horizon - 1)  # texts whose next token is not the last
    for state in range(s):
        for action in range(a):
            moves[:, state, action, a * state + action + 1 if state < inner else 0] = 1
    reward[:, inner:] = torch.randint(2, (count, s - inner, a), generator=generator).double()
    return problem._replace(start=start, transition=moves, reward=reward)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _simplex(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    parts = -torch.log1p(-_uniform(shape, generator))
    return parts / parts.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Proposals:
    """The candidate steps of N instances."""

    steps: Tensor  # (N, CANDIDATES, P)
    own_shift: Tensor  # (N, CANDIDATES), m_H as a subset's own tokens estimate it (Eq. 63), which is what CAPO sees


def propose(problem: Problem, horizon: int, values: Values, weight: Tensor, generator: torch.Generator) -> Proposals:
    """The steps of CANDIDATES disjoint subsets of one sampled batch of each of N instances.

    A subset is a trajectory or one token of it. Its gradient Σ γ^t A ∇ log π is taken as it is (SGD) or divided by its
    absolute values (Adam's first step), and all steps of an instance are scaled alike, so that the longest has norm r.
    """
    state, action, factor = sample(problem, horizon, values, weight, generator)
    n, _, length = state.shape
    of_token, adam = torch.randint(2, (2, n, 1, 1), generator=generator).bool()  # drawn for each instance
    chosen = torch.nn.functional.one_hot(torch.randint(length, state.shape[:2], generator=generator), length)
    factor = torch.where(of_token, factor * chosen, factor)  # of a token: the others weigh 0
    here = torch.arange(n)[:, None, None]
    gradients = torch.einsum("nkt,nktp->nkp", factor, mdp.scores(problem, weight)[here, state, action])
    steps = torch.where(adam, gradients / (gradients.abs() + 1e-8), gradients)
    low, high = map(math.log, RADII)
    radius = torch.exp(low + (high - low) * _uniform((n,), generator))
    longest = steps.norm(dim=-1).amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
    steps = steps * (radius / longest)[:, None, None]
    return Proposals(steps, own_shift(problem, weight, steps, state, action, factor))


def own_shift(
    problem: Problem, weight: Tensor, steps: Tensor, state: Tensor, action: Tensor, factor: Tensor
) -> Tensor:
    """(N, K), Σ A vᵀz + ½ A [(vᵀz)² - Var_π(z)] over a subset's tokens, z = U h (Eq. 62), `factor` its γ^t A."""
    probs = mdp.log_policy(problem, weight).exp()[:, None]
    z = torch.einsum("nkad,nsd->nksa", steps.view(*steps.shape[:2], *weight.shape[1:]), problem.features)
    z = z - (probs * z).sum(-1, keepdim=True)
    variance = (probs * z.square()).sum(-1)
    n, k = torch.arange(len(z))[:, None, None], torch.arange(z.shape[1])[:, None]
    change = z[n, k, state, action]
    return (factor * (change + (change.square() - variance[n, k, state]) / 2)).sum(-1)


def sample(
    problem: Problem, horizon: int, values: Values, weight: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """CANDIDATES trajectories of each of N instances: states, actions and γ^t A(s_t, a_t), (N, CANDIDATES, tokens)."""
    probs = mdp.log_policy(problem, weight).exp()
    here = torch.arange(len(weight))[:, None]
    state = torch.multinomial(problem.start, CANDIDATES, replacement=True, generator=generator)
    tokens = []
    for t in range(horizon or SAMPLED):
        action = _pick(probs[here, state], generator)
        advantage = values.advantages[here, t if horizon else 0, state, action]
        tokens.append((state, action, problem.discount[:, None] ** t * advantage))
        state = _pick(problem.transition[here, state, action], generator)
    state, action, factor = (torch.stack(part, 2) for part in zip(*tokens, strict=True))
    return state, action, factor


def _pick(probs: Tensor, generator: torch.Generator) -> Tensor:
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.view(probs.shape[:-1])
