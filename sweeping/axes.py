"""What a sweep varies: lists of values, and ranges to search in."""

from __future__ import annotations

import re
from typing import NamedTuple

from system.errors import ConfigError

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
# A comma that separates values stands neither within brackets, braces or quotes nor behind a backslash.
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"
# The most values that a range of whole numbers is written out to.
MOST_VALUES = 10_000


class Range(NamedTuple):
    """Numbers from `low` to `high`, both among them: whole ones only, or evenly spread by their logarithms."""

    low: float
    high: float
    whole: bool
    log: bool


def values_of(text: str) -> list[str]:
    """The values that a text lists, separated by commas; `\\,` is a comma within a value."""
    values, current, depth, quote, escaped = [], "", 0, "", False
    for letter in text:
        if escaped:
            current += letter if letter == "," else f"\\{letter}"
        elif letter == "," and not depth and not quote:
            values.append(current)
            current = ""
        elif letter != "\\":
            current += letter
        if letter in _QUOTES and not escaped:
            quote = "" if quote == letter else quote or letter
        depth += 0 if quote else (letter in _OPENING) - (letter in _CLOSING)
        escaped = letter == "\\" and not escaped
    return [*values, current + ("\\" if escaped else "")]


def range_of(key: str, text: str) -> Range | None:
    """The range `LOW..HIGH`, or `LOW..HIGH:log`, that a text is; None where it is none.

    Raises:
        ConfigError: it is empty, or has no logarithms.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    low, high = float(match[1]), float(match[2])
    found = Range(low, high, whole=all(re.fullmatch(r"[-+]?\d+", end) for end in match.group(1, 2)), log=bool(match[3]))
    if low >= high or (found.log and low <= 0):
        above = ", both above 0" if found.log else ""
        raise ConfigError(f"{key} is {text}; a range is LOW..HIGH with LOW below HIGH{above}")
    return found


def listed(key: str, text: str) -> list[str]:
    """All values of a list, or of a range of whole numbers: `0..4` has five.

    Raises:
        ConfigError: one of them is given twice or is empty, or the range has no end of values.
    """
    span = range_of(key, text)
    if span is None:
        values = values_of(text)
    elif span.whole and not span.log and span.high - span.low < MOST_VALUES:
        values = [str(number) for number in range(int(span.low), int(span.high) + 1)]
    else:
        raise ConfigError(f"{key} is the range {text}; list its values (a,b,c), or add --search optuna")
    if len(values) > 1 and (len(set(values)) < len(values) or "" in values):
        raise ConfigError(f"{key} is {text}; give each value once, separated by commas, and none that is empty")
    return values
