"""What the benchmarks' command lines share: the file of settings, and numbers among their flags."""

from __future__ import annotations

import math
from pathlib import Path

from config import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs.yaml"


def number(text: str, name: str, *, least: float) -> float:
    """A finite number from the command line.

    Raises:
        ConfigError: it is none, or below `least`.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ConfigError(f"--{name} is {text!r}; it takes a number, at least {least:g}")
    return value
