"""The embedded default: a tiny policy and its task, made from nothing on a laptop in minutes.

`task` states problems and writes solutions, `tokenizer` splits them, `pretrain` trains the policy on a noisy
mixture of styles, `policy` keeps it in a cache and measures it. The policy knows a style of solution that works
(running sums) but does not prefer it, so reinforcement learning has something to teach.
"""
