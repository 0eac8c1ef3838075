"""Eight benchmarks by lighteval and their mean, TEST."""

from open_r1_capo.runs.exit import UserError


class EvalError(UserError):
    """An evaluation cannot be made."""
