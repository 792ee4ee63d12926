"""Sections of the config as frozen dataclasses: what a key may hold stands in its type, and is checked at once.

    @dataclass(frozen=True)
    class ScheduleSettings(Section):
        PLACE = "schedule"

        warmup: NotNegative
        decay_from: Share

`ScheduleSettings.of(config)` reads the keys `schedule.warmup` and `schedule.decay_from`. What keys must have in common
is checked in `__post_init__`, after `super().__post_init__()`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from settings.mapping import Config, require_type
from system.errors import ConfigError

# Layers are objects of their own, so that a number of any size in a received config would be built for ever.
MOST_LAYERS = 1000

Read = TypeVar("Read", bound="Section")


@dataclass(frozen=True)
class Between:
    """The numbers that a key may hold.

    Attributes:
        low: the least.
        high: the largest; infinity: there is no bound.
        above: whether `low` itself is too little.
        finite: whether infinity is refused.
    """

    low: float
    high: float = math.inf
    above: bool = False
    finite: bool = True

    def require(self, key: str, value: float) -> None:
        """Raise a ConfigError where the value is none of them."""
        if self.finite and math.isinf(value):
            raise ConfigError(f"{key} is {value:g}; it must be finite")
        if not self.low <= value <= self.high or (self.above and value == self.low):
            raise ConfigError(f"{key} is {value:g}; it must be {self}")

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:g}" + ("" if math.isinf(self.high) else f" and at most {self.high:g}")
        return f"at least {self.low:g}" if math.isinf(self.high) else f"between {self.low:g} and {self.high:g}"


Count = Annotated[int, Between(1)]
NotNegative = Annotated[int, Between(0)]
Layers = Annotated[int, Between(1, MOST_LAYERS)]
Bins = Annotated[int, Between(3)]
Weight = Annotated[float, Between(0)]
Share = Annotated[float, Between(0, 1)]
PositiveShare = Annotated[float, Between(0, 1, above=True)]
LearningRate = Annotated[float, Between(0, above=True)]
# Infinity is no limit.
GradientLimit = Annotated[float, Between(0, above=True, finite=False)]


@dataclass(frozen=True)
class Section:
    """A part of the config whose values have been checked.

    Attributes:
        PLACE: the key of the section; empty where its keys lie at the top.
        RENAMED: the full keys of fields that are not called like them.
    """

    PLACE: ClassVar[str] = ""
    RENAMED: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls: type[Read], config: Config) -> Read:
        """The section as the whole config has it.

        Raises:
            ConfigError: a value is out of its range, or values do not go together; the message names the keys.
        """
        values = {}
        for name, hint in _hints(cls).items():
            nested = isinstance(hint, type) and issubclass(hint, Section)
            values[name] = hint.of(config) if nested else cls.read(config, name)
        return cls(**values)

    @classmethod
    def read(cls, config: Config, name: str) -> Any:
        """The value of one field that is no section itself."""
        return functools.reduce(lambda section, part: section[part], cls.key(name).split("."), config)

    @classmethod
    def key(cls, name: str) -> str:
        """The full key of a field."""
        return cls.RENAMED.get(name) or (f"{cls.PLACE}.{name}" if cls.PLACE else name)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _require(self.key(name), getattr(self, name), hint)


# Types of the fields of sections that have been read, since reading them takes long.
_KNOWN: dict[str, dict[str, Any]] = {}


def _hints(section: type[Section]) -> dict[str, Any]:
    """The type of each field, with the range that it is annotated with; read once for each section."""
    name = f"{section.__module__}.{section.__qualname__}"
    if name not in _KNOWN:
        hints = get_type_hints(section, include_extras=True)
        _KNOWN[name] = {field.name: hints[field.name] for field in fields(section)}
    return _KNOWN[name]


def _require(key: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        require_choice(key, value, get_args(hint))
        return
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if kind in (bool, int, float, str):
        require_type(key, value, kind)
    for bound in bounds:
        bound.require(key, value)


def require_choice(key: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise a ConfigError where a value is none of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(map(str, allowed))}")
