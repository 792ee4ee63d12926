"""Between one environment of a user's own program and an agent: what it shows as tensors, and actions as it takes them.

Whatever is shown may come alone or batched, as gymnasium's vector environments batch it; so do the actions that answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space, spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from jaxtyping import Shaped
from torch import Tensor

from config import UserError, compiled
from envs.spaces import flattener, to_env_action
from routing.rules import Rules


class Shown(NamedTuple):
    """Observations as agents take them, [E, ...] each, on the host; `alone` says that they came as one."""

    obs: dict[str, Tensor]
    alone: bool

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(next(iter(self.obs.values())))


class Translation(ABC):
    """Knows what an environment shows and takes."""

    @abstractmethod
    def read(self, obs: Any) -> Shown:
        """One observation, or a batch of them.

        Raises:
            UserError: it is not what the environments that the agent knows show.
        """

    @abstractmethod
    def write(self, actions: Shaped[np.ndarray, "E *A"], *, alone: bool) -> Any:
        """An agent's actions as the environment takes them: the only one `alone`, or batched."""


class SpacesTranslation(Translation):
    """Of a gymnasium environment, by its spaces."""

    def __init__(self, observation_space: Space, action_space: Space, *, zero_keys: str = "") -> None:
        """Take the spaces of one environment.

        Args:
            observation_space: what it shows.
            action_space: what it takes.
            zero_keys: a regular expression over keys of the observation whose numbers are set to 0 where they are not
                finite; elsewhere these are refused.
        """
        self._space, self._action_space = observation_space, action_space
        self._flatten, self._zero_keys = flattener(observation_space), compiled(zero_keys)

    def read(self, obs: Any) -> Shown:
        count = _batch_size(self._space, obs)
        each = [obs] if count is None else [*iterate(batch_space(self._space, count), obs)]
        rows = [self._flatten(part) for part in each]
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Shown({name: torch.from_numpy(self._finite(name, of)) for name, of in stacked.items()}, count is None)

    def write(self, actions: Shaped[np.ndarray, "E *A"], *, alone: bool) -> Any:
        taken = [to_env_action(self._action_space, action) for action in actions]
        if alone:
            return taken[0]
        empty: Any = create_empty_array(self._action_space, len(taken))
        return concatenate(self._action_space, taken, empty)

    def _finite(self, name: str, values: Shaped[np.ndarray, "E *S"]) -> Shaped[np.ndarray, "E *S"]:
        bad = ~np.isfinite(values)
        if bad.any() and not self._zero_keys.fullmatch(name):
            raise UserError(
                f"observation '{name}' has {bad.sum()} of {bad.size} entries that are NaN, infinite or beyond float32;"
                " mend what shows it, or train with such entries set to 0 (--guard.zero_keys)"
            )
        return np.where(bad, np.zeros_like(values), values)


class RoutingTranslation(Translation):
    """Of a routing problem, whose instances may be of any size."""

    def __init__(self, rules: type[Rules]) -> None:
        """Take the rules of the problem."""
        self._rules = rules

    def read(self, obs: Any) -> Shown:
        nodewise, numbers = ("costs", "N") if self._rules.shows_costs else ("coords", "2")
        if not isinstance(obs, Mapping) or nodewise not in obs or np.ndim(obs[nodewise]) not in (2, 3):
            raise UserError(
                f"an observation of {self._rules.name} is a dict with {nodewise} [N, {numbers}], or"
                f" [E, N, {numbers}] of a batch, and the rest of what the problem's environment shows (envs/routing.py)"
            )
        nodes = np.shape(obs[nodewise])[-2]
        space = self._rules.costs.observation_space(self._rules.observation_space(nodes), nodes)
        assert isinstance(space, spaces.Dict), "routing is shown by name"
        alone = np.ndim(obs[nodewise]) == 2
        lead = () if alone else np.shape(obs[nodewise])[:1]
        read = {}
        for name, part in space.items():
            if name not in obs:
                raise UserError(f"observation '{name}' is missing; its space is {part}")
            value = np.asarray(obs[name])
            if value.shape != (*lead, *(part.shape or ())):
                raise UserError(f"observation '{name}' has shape {value.shape}, but its space is {part}")
            read[name] = torch.from_numpy(np.array(value[None] if alone else value, dtype=part.dtype))
        return Shown(read, alone)

    def write(self, actions: Shaped[np.ndarray, "E *A"], *, alone: bool) -> Any:
        return actions[0] if alone else actions


def _batch_size(space: Space, obs: Any) -> int | None:
    """How many observations of `space` these are; None where they are one, or do not fit it in either way."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Iterable[tuple[Any, Space]] = (
            space.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        )
        for name, part in parts:
            try:
                count = _batch_size(part, obs[name])
            except (LookupError, TypeError):
                return None
            if count is not None:
                return count
        return None
    try:
        shape = np.shape(obs)
    except ValueError:
        return None
    return shape[0] if shape and space.shape is not None and shape[1:] == space.shape else None
