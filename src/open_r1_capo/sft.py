r"""A cold start before `grpo`: supervised training of a policy on worked solutions, from a recipe of `recipes/sft`.

    python -m open_r1_capo.sft --config-name gsm_symbolic model_name_or_path=models/SmolLM2-135M-Instruct

Exit codes: 0 done, or done before; 2 the input cannot be used (one sentence says why); 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from open_r1_capo.settings.sft import known_sft


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m open_r1_capo.sft", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config-name", default="gsm_symbolic", help=f"one of {', '.join(known_sft())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of TRL's SFTConfig or of ours")
    options = parser.parse_args(argv)
    from open_r1_capo.training.sft import command  # seconds of imports that --help does not need

    return command(options.config_name, options.overrides)


if __name__ == "__main__":
    sys.exit(main())
