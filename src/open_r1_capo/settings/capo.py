"""CAPO's own settings, the group `capo` of a recipe: what the trainer does with each token, and with the step.

The settings of a token rule or a step rule are the fields of its class (`capo/rules.py`, `budget/rules.py`): a rule
that is added there can be set here at once, and only under its own `mode` or `step_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from open_r1_capo.budget.rules import STEP_RULES, NormGuard, StepRule, step_settings
from open_r1_capo.capo.rules import RULES, TokenRule, rule_settings
from open_r1_capo.settings.values import ConfigError, Kinds, kinds, make

OFF = "off"  # the mode without any rule: plain TRL


@dataclass
class CAPOConfig:
    """What CAPO does; every threshold is in the units of Eq. 10 at the scheduler's current learning rate.

    `capo_config` makes one from a recipe's flat settings.
    """

    # `off` (plain TRL), or the name of a token rule in `RULES`: `mask` is the paper's, `observe` only logs
    mode: str = "mask"
    optimizer_model: str = "adam"  # adam or sgd (App. I), the model of the step
    top_k: int = 50  # k of the support; the sampled token is always added
    granularity: str = "token"  # what is judged: token, sequence, group or batch (within one micro-batch of one rank)
    # of the step model: `aligned` predict the token, `one_late` is the token's own, which the authors' code reads
    hidden_states: str = "aligned"
    denominator: str = "kept"  # GRPO divides a sequence by its `kept` tokens, or by `all`
    moment_average: str = "per_logit"  # per_logit or per_token, see `AdamStep`
    absent_rows: str = "hold"  # hold or decay, see `AdamStep`
    # share of each micro-batch's sequences on which the update's true KL is measured; 0 is off
    measure_kl: float = 1.0
    skip_gradient_norm: float = math.inf  # κ, see `NormGuard`
    rule: TokenRule = field(default_factory=TokenRule)  # the token rule with its own settings
    step: StepRule = field(default_factory=StepRule)  # the step rule with its own settings; `step_rule` names it

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "optimizer_model": ("adam", "sgd"),
        "granularity": ("token", "sequence", "group", "batch"),
        "hidden_states": ("aligned", "one_late"),
        "denominator": ("kept", "all"),
        "moment_average": ("per_logit", "per_token"),
        "absent_rows": ("hold", "decay"),
    }

    def __post_init__(self):
        """Check choices and ranges; raises ConfigError."""
        for name, known in self.CHOICES.items():
            _one_of(name, getattr(self, name), known)
        if self.top_k < 1:
            raise ConfigError(f"capo.top_k must be at least 1, got {self.top_k}")
        if not 0 <= self.measure_kl <= 1:
            raise ConfigError(f"capo.measure_kl is a share between 0 and 1, got {self.measure_kl}")
        make(NormGuard, {"skip_gradient_norm": self.skip_gradient_norm}, "capo.")
        if self.step.acts and self.step.predicts and self.optimizer_model == "adam" and self.absent_rows == "hold":
            raise ConfigError(
                "capo.step_policy_shift plans the step of the real, dense Adam, which moves every row: it needs "
                "capo.absent_rows=decay"
            )
        if self.step.learns and self.measure_kl == 0:
            what = "step_feedback" if self.step.predicts else f"step_rule={self.step.name}"
            raise ConfigError(f"capo.{what} needs the measured KL: set capo.measure_kl above 0 (1 is every token)")

    @property
    def on(self) -> bool:
        """Whether there is more than plain TRL."""
        return self.mode != OFF

    @property
    def weighs(self) -> bool:
        """Whether a token's gradient may be changed."""
        return self.on and self.rule.weighs


COMMON = tuple(one.name for one in fields(CAPOConfig) if one.name not in ("rule", "step"))


def capo_config(**values: Any) -> CAPOConfig:
    """Build the settings from a recipe's flat group `capo`, without those of rules that are not chosen."""
    mode, step_rule = _chosen(values)
    _one_of("mode", mode, (OFF, *RULES))
    _one_of("step_rule", step_rule, STEP_RULES)
    rule, step = RULES.get(mode, TokenRule), STEP_RULES[step_rule]
    return CAPOConfig(
        **{key: values[key] for key in COMMON if key in values},
        rule=make(rule, {key: values[key] for key in rule_settings(rule) if key in values}, "capo."),
        step=make(step, {key: values[key] for key in step_settings(step) if key in values}, "capo."),
    )


def capo_keys() -> dict[str, Kinds]:
    """Every setting of the group, whatever its rule, and what values it takes."""
    keys: dict[str, Kinds] = {"step_rule": ("str",)}
    owners = [(CAPOConfig, COMMON)]
    owners += [(rule, rule_settings(rule)) for rule in RULES.values()]
    owners += [(rule, step_settings(rule)) for rule in STEP_RULES.values()]
    for owner, names in owners:
        keys |= {name: kinds(get_type_hints(owner)[name]) for name in names}
    return keys


def unread(key: str, values: dict[str, Any]) -> str | None:
    """The setting that makes `key` unused, such as `capo.mode=off`; None if it is used.

    `key` and `values` are without the group's name.
    """
    mode, step_rule = _chosen(values)
    rule, step = RULES.get(mode, TokenRule), STEP_RULES.get(step_rule, StepRule)
    if mode == OFF and key != "mode":
        return "capo.mode=off"
    if _belongs_to_another(key, rule_settings, RULES, rule) or (key == "denominator" and not rule.weighs):
        return f"capo.mode={mode}"
    if key in ("moment_average", "absent_rows") and values.get("optimizer_model") == "sgd":
        return "capo.optimizer_model=sgd"
    if _belongs_to_another(key, step_settings, STEP_RULES, step):
        return f"capo.step_rule={step_rule}"
    aims = "step_policy_shift" in step_settings(step)
    if aims and key in ("step_rule", "step_feedback") and values.get("step_policy_shift", math.inf) == math.inf:
        return "capo.step_policy_shift=inf"
    return None


def _chosen(values: dict[str, Any]) -> tuple[Any, Any]:
    return values.get("mode", CAPOConfig.mode), values.get("step_rule", StepRule.name)


def _belongs_to_another(key: str, settings: Callable, rules: dict[str, type], chosen: type) -> bool:
    return key not in settings(chosen) and any(key in settings(rule) for rule in rules.values())


def _one_of(key: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"capo.{key} must be one of {', '.join(known)}, got {value!r}")
