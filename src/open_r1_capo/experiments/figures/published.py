"""What the paper's figures and tables show, to be drawn beside our runs of the same scale and nowhere else.

Curve values were read off the published figures of arXiv 2510.00819 by eye (± 0.003); tables are copied.
"""

SCALE = "qwen2.5-math-7b"  # the paper's: Qwen2.5-Math-7B on MATH

# recipe → (training completions, accuracy) of single points of Figures 1 and 2
MATH = {
    "grpo_conservative": ((0, 0.612), (60_000, 0.752)),
    "grpo_aggressive": ((0, 0.612), (3_700, 0.76)),  # its peak lies between 3.2k and 4.2k; then it collapses
    "capo_aggressive": ((0, 0.612), (2_200, 0.752), (9_300, 0.794)),
}
TEST = {
    "grpo_conservative": ((0, 0.322), (60_000, 0.398)),
    "grpo_aggressive": ((0, 0.322), (3_800, 0.400)),
    "capo_aggressive": ((0, 0.322), (7_000, 0.398), (9_500, 0.402)),
}
# Figure 5: tokens rejected; below 0.02 from the second point on
REJECTED = {"capo_aggressive": ((800, 0.078), (1_500, 0.02))}

# Table 1: mean seconds a step on 4 × H100
SECONDS = {"time/generate": 55.50, "time/curvature": 3.99, "time/total": 135.84}

# Table 5: Spearman's ρ of m_F with the sampled KL, by recipe: a token's, a batch's
SPEARMAN = {
    "token": {"grpo_aggressive": 0.622, "capo_aggressive": 0.459},
    "batch": {"grpo_aggressive": 0.596, "capo_aggressive": 0.498},
}
