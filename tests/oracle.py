"""The method once more, slow, dense and obvious: an explicit W, autograd for every derivative, float64.

Nothing here is shared with the implementation but the data of a `TokenBatch`.
"""

import torch

from open_r1_capo.capo import TokenBatch

torch.set_num_threads(1)


def random_batch(n=12, k=5, d=7, vocab=11, seed=0, padding=True, dtype=torch.float64):
    """A batch whose probabilities come from an explicit W (V, D), which is returned too."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, d, generator=rng, dtype=torch.float64)
    features = torch.randn(n, d, generator=rng, dtype=torch.float64)
    ids = torch.stack([torch.randperm(vocab, generator=rng)[:k] for _ in range(n)])
    occupied = torch.ones(n, k, dtype=torch.bool)
    if padding and k > 2:  # some tokens have an empty last slot, as when the action is among the top k
        occupied[::2, -1] = False
        ids[::2, -1] = ids[::2, 0]
    action = torch.stack([torch.randint(0, int(o.sum()), (), generator=rng) for o in occupied])
    probs = torch.einsum("nkd,nd->nk", weight[ids], features).masked_fill(~occupied, -torch.inf).softmax(1)
    groups = torch.randint(0, 3, (n,), generator=rng)
    advantages = torch.randn(n, generator=rng, dtype=torch.float64)
    return TokenBatch(features.to(dtype), ids, probs.to(dtype), action, advantages.to(dtype), groups), weight


def occupied_slots(batch, i):
    """The columns of token i that are not padding."""
    return [j for j in range(batch.token_ids.shape[1]) if batch.probs[i, j] > 0 or j == batch.action_index[i]]


def log_probs(weight, batch, i):
    """Token i's log-policy on its support, a function of the dense W."""
    return (weight[batch.token_ids[i, occupied_slots(batch, i)]] @ batch.features[i]).log_softmax(0)


def action_log_prob(weight, batch, i):
    return log_probs(weight, batch, i)[occupied_slots(batch, i).index(int(batch.action_index[i]))]


def token_gradient(weight, batch, i):
    """Eq. 7 for one token, by autograd: (V, D)."""
    return torch.func.grad(lambda w: batch.advantages[i] * action_log_prob(w, batch, i))(weight)


def mean_gradient(weight, batch, members, token_weight, average):
    """The averaged dense gradient over `members`, rows averaged as the moments are."""
    total, count = torch.zeros_like(weight), torch.zeros(len(weight), 1, dtype=weight.dtype)
    kept = [i for i in members if token_weight[i] > 0]
    for i in kept:
        total += token_weight[i] * token_gradient(weight, batch, i)
        count[batch.token_ids[i, occupied_slots(batch, i)]] += float(batch.advantages[i] != 0)
    return total / (count.clamp(min=1) if average == "per_logit" else max(1, len(kept)))


def shifts(weight, batch, members, direction, lr):
    """m_F and m_H of a dense step α·D (V, D) on the tokens `members`, and the KL's quadratic term.

    The objective is the importance-weighted one, Σ A π_W(a)/π(a): its gradient is Eq. 7, its Hessian Eq. 8.
    """

    def objective(alpha):
        moved = weight + alpha * direction
        ratios = [(action_log_prob(moved, batch, i) - action_log_prob(weight, batch, i)).exp() for i in members]
        return torch.stack([batch.advantages[i] * r for i, r in zip(members, ratios, strict=True)]).mean()

    def kl(alpha):
        old = [log_probs(weight, batch, i) for i in members]
        new = [log_probs(weight + alpha * direction, batch, i) for i in members]
        return torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(old, new, strict=True)]).mean()

    zero = torch.zeros((), dtype=weight.dtype)
    slope, curvature = torch.func.grad(objective)(zero), torch.func.grad(torch.func.grad(objective))(zero)
    scores = [torch.func.grad(lambda w, i=i: action_log_prob(w, batch, i))(weight) for i in members]
    fisher = torch.stack([(s * direction).sum() ** 2 for s in scores]).mean()
    kl_curvature = torch.func.grad(torch.func.grad(kl))(zero)
    return 0.5 * lr**2 * fisher, lr * slope + 0.5 * lr**2 * curvature, 0.5 * lr**2 * kl_curvature


def adam_direction(first, second, gradient, step, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam's dense direction (V, D) if `gradient` arrives as step number `step` (from 1)."""
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    return (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
