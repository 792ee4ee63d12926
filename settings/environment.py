"""How an observed environment is made and wrapped: its arguments, and what lies between it and the agent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from settings.files import read_value
from settings.mapping import as_text
from settings.sections import Between, Count, NotNegative, Section, Weight
from system.errors import ConfigError

# The prefix of any registered id, and those of the suites that have a way of their own to be made.
GYM_PREFIX = "gym_"
SUITE_PREFIXES = ("atari_", "bsuite_", "crafter_", "dmc_", "memory_", "minatar_", "minigrid_")
TASK_PREFIXES = (GYM_PREFIX, *SUITE_PREFIXES)
# What a program decides itself.
RESERVED_ARGUMENTS = ("render_mode",)


def read_arguments(text: str) -> dict[str, Any]:
    """The mapping that `env.kwargs` holds.

    Raises:
        ConfigError: it is none, or has a name that no argument can have.
    """
    value = read_value(text, key="env.kwargs", where="config") if text.strip() else {}
    if not isinstance(value, dict):
        raise ConfigError(f"env.kwargs is {text!r}; it takes a mapping of names to values, such as '{{gravity: 9.8}}'")
    for name in value:
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"env.kwargs has the name {name!r}; arguments are called by words such as max_speed")
        if name in RESERVED_ARGUMENTS:
            raise ConfigError(f"env.kwargs has {name}, which this program chooses itself; leave it out")
    return value


def holds_text(text: object) -> bool:
    """Whether an argument, at any depth, is a text: of files or of code it may be the name."""
    try:
        return _holds_text(read_arguments(str(text)))
    except ConfigError:
        return True


def _holds_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_text, value))
    return isinstance(value, str)


@dataclass(frozen=True)
class WrapperSettings(Section):
    """An environment's arguments, and what is done to its steps; without any, it is as its author made it.

    Attributes:
        kwargs: YAML of a mapping, the arguments that it is made with.
        sticky: the probability that a step takes the action of the step before.
        repeat: steps that every decision takes; their rewards are added up.
        grey: whether images are turned into their brightness.
        resize: height and width that images are scaled to; empty: none are.
        stack: observations that are shown together, the last one last.
        time_limit: decisions after which an episode is truncated; 0: none.
        reward_clip: the largest reward and loss of a decision in training; 0: any.
    """

    PLACE: ClassVar = "env"

    kwargs: str = ""
    sticky: Annotated[float, Between(0, 0.999)] = 0.0
    repeat: Count = 1
    grey: bool = False
    resize: tuple[int, ...] = ()
    stack: Count = 1
    time_limit: NotNegative = 0
    reward_clip: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        read_arguments(self.kwargs)
        if len(self.resize) not in (0, 2) or not all(type(side) is int for side in self.resize):
            raise ConfigError(f"env.resize is {as_text(self.resize)}; it takes height and width, such as [64, 64]")
        for side in self.resize:
            Between(16, 4096).require("env.resize", side)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that the environment is made with."""
        return read_arguments(self.kwargs)

    @property
    def changed(self) -> list[str]:
        """The keys that are not as they stand by default."""
        return [self.key(each.name) for each in fields(self) if getattr(self, each.name) != each.default]
