"""The fields of TRL's `GRPOConfig` as data, so that settings are checked without importing TRL and torch.

`python -m open_r1_capo.settings.trl_fields` writes trl_fields.json anew for the installed TRL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from open_r1_capo.settings.values import Kinds, kinds

FILE = Path(__file__).with_name("trl_fields.json")


class TRLField(NamedTuple):
    """What values a field takes, and its default."""

    kinds: Kinds
    default: Any


def installed(config: str = "GRPOConfig") -> dict[str, TRLField]:
    """The fields of a configuration of the installed TRL; defaults as JSON has them."""
    from dataclasses import MISSING, fields

    import trl

    kind = getattr(trl, config)
    hints = get_type_hints(kind)
    defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(kind)}
    return {name: TRLField(kinds(hints[name]), json.loads(json.dumps(default))) for name, default in defaults.items()}


def read() -> dict[str, TRLField]:
    """The fields as trl_fields.json has them."""
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: TRLField(tuple(kinds), default) for name, (kinds, default) in stored.items()}


def write() -> None:
    """Write trl_fields.json, one line a field."""
    lines = [f"  {json.dumps(name)}: {json.dumps(field)}" for name, field in installed().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
else:
    TRL_FIELDS = read()
