"""A second computation of a step's consequences, which shares nothing with the first but the problem.

J of a finite horizon is summed over every trajectory, J of a discounted problem is iterated to its fixed point;
derivatives are central differences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from open_r1_capo.experiments.theorem.mdp import Problem

Array = np.ndarray


class Recheck:
    """One instance in numpy: J of any policy, and what the surrogate around one policy says."""

    def __init__(self, start: Array, transition: Array, reward: Array, features: Array, discount: float, horizon: int):
        self.start, self.transition, self.reward, self.features = start, transition, reward, features
        self.discount, self.horizon = discount, horizon

    @classmethod
    def of(cls, problem: Problem, horizon: int) -> Recheck:
        """From one instance of the first computation's problems."""
        return cls(*(part.numpy() for part in problem[:4]), discount=float(problem.discount), horizon=horizon)

    def policy(self, weight: Array) -> Array:
        """(S, A) probabilities of the weight (A, D)."""
        logits = self.features @ weight.T
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def objective(self, weight: Array) -> float:
        """J, over every trajectory or by iteration."""
        probs = self.policy(weight)
        if self.horizon:
            return sum(p * self._return(probs, s, self.horizon) for s, p in enumerate(self.start) if p)
        return float(self.start @ self._iterate(probs))

    def _return(self, probs: Array, state: int, left: int) -> float:
        if not left:
            return 0.0
        total = 0.0
        for action, p in enumerate(probs[state]):
            total += p * self.reward[state, action]
            for after in np.flatnonzero(self.transition[state, action]) if left > 1 else ():
                total += p * self.transition[state, action, after] * self._return(probs, after, left - 1)
        return total

    def _iterate(self, probs: Array) -> Array:
        value = np.zeros(len(probs))
        for _ in range(math.ceil(math.log(1e-16) / math.log(self.discount))):
            value = (probs * (self.reward + self.discount * self.transition @ value)).sum(1)
        return value

    def surrogate(self, weight: Array, other: Array) -> float:
        """L_π(π') by moving one step's choice at a time to the other policy, the rest to π.

        J + Σ_t (J of the policy that plays π' at step t alone − J): Lemma K.3's definition without advantages.
        """
        probs, other_probs, base = self.policy(weight), self.policy(other), self.objective(weight)
        total, state = 0.0, self.start
        values = self._values(probs)
        for value, after in values:
            gains = self.reward + self.discount * self.transition @ after
            total += state @ ((other_probs * gains).sum(1) - value)
            state = self.discount * np.einsum("s,sa,sat->t", state, probs, self.transition)
        return base + total

    def _values(self, probs: Array) -> list[tuple[Array, Array]]:
        """V of each step and of the next one."""
        if not self.horizon:
            value = self._iterate(probs)
            return [(value, value)] * math.ceil(math.log(1e-16) / math.log(self.discount))
        values = [np.zeros(len(probs))]
        for _ in range(self.horizon):
            values.insert(0, (probs * (self.reward + self.transition @ values[0])).sum(1))
        return list(itertools.pairwise(values))


def derivatives(function: Callable[[float], float], width: float = 0.005) -> tuple[float, float]:
    """First and second derivative at 0, by central differences of fourth order."""
    far, near, here = (function(2 * width), function(-2 * width)), (function(width), function(-width)), function(0.0)
    first = (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * width)
    return first, (16 * sum(near) - sum(far) - 30 * here) / (12 * width**2)
