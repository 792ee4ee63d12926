"""What completions earn."""

from __future__ import annotations

import math
from collections.abc import Callable

from config import ConfigError, UserError, load_function

# The largest reward whose square is a number of float32, too.
LARGEST = 1e18

Reward = Callable[[str, str, str], float]


def exact(prompt: str, completion: str, answer: str) -> float:
    """1 for the answer itself, blanks around it aside, and 0 for anything else."""
    return float(completion.strip() == answer.strip())


def places(prompt: str, completion: str, answer: str) -> float:
    """The share of characters at their places, of the longer one of completion and answer, blanks around them aside."""
    completion, answer = completion.strip(), answer.strip()
    length = max(len(completion), len(answer))
    if not length:
        return 1.0
    return sum(one == other for one, other in zip(completion, answer, strict=False)) / length


NAMED: dict[str, Reward] = {"exact": exact, "places": places}


def find_reward(name: str) -> Reward:
    """The reward that the key `language.reward` names.

    Raises:
        ConfigError: there is none of that name.
    """
    if ":" in name:
        return _own(name)
    if name not in NAMED:
        raise ConfigError(f"language.reward is {name!r}; choose {', '.join(NAMED)} or your own module:function")
    return NAMED[name]


def _own(name: str) -> Reward:
    """The user's function, whose answers are checked."""
    function = load_function(name, key="language.reward")

    def reward(prompt: str, completion: str, answer: str) -> float:
        earned = function(prompt, completion, answer)
        try:
            value = float(earned)
        except (TypeError, ValueError):
            value = math.nan
        if not abs(value) <= LARGEST:
            raise UserError(
                f"language.reward {name} gave {earned!r} for the prompt {prompt[:60]!r}; it has to give a number of"
                f" at most {LARGEST:g} in size"
            )
        return value

    return reward
