"""What an agent must know of a task before it meets it: its observations, its actions, its rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routing.rules import Rules

ACTION_MASK = "action_mask"
# Under this key of `info` a wrapper reports a value that was not finite, and that it has replaced: a name and a line to
# read.
BAD_INPUT = "bad_input"
# Under this one it reports what the user should read once: a topic and a line.
NOTICE = "notice"


# Shape and dtype of what is stored of each row, by its name.
Spaces = dict[str, tuple[tuple[int, ...], torch.dtype]]


@runtime_checkable
class VectorEnv(Protocol):
    """Environments that are stepped together, as far as a task asks for them."""

    def reset(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


class ObservationKey(NamedTuple):
    """One entry of an observation, and how it wants to be read.

    Attributes:
        kind: `vector` (numbers of any scale), `classes` (one or more discrete variables), `image` (uint8, [H, W, C]),
            `set` (N elements of F features each, of which some are padding) or `validity` (which elements are not).
        shape: of one observation, as replay stores it: [F], [M], [H, W, C], [N, F] or [N].
        dtype: as replay stores it: float32, int64, uint8, float32 or bool.
        classes: for `classes`, how many values each of the M variables has.
        validity: for `set`, the key under which the observation says which elements are real; None where all are.
        note: what a reader of the space would not expect, such as floats kept as bytes; a few words, or none.
    """

    kind: Literal["vector", "classes", "image", "set", "validity"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    classes: tuple[int, ...] = ()
    validity: str | None = None
    note: str = ""


class ActionSpec(NamedTuple):
    """The actions of a task.

    Attributes:
        kind: `discrete` (one index), `multi_discrete` (an index for each of M choices) or `continuous` (A numbers,
            each scaled to [-1, 1]).
        sizes: (n,), (n_1, ..., n_M) or (A,).
        masked: whether observations carry an `action_mask` over the n discrete actions.
    """

    kind: Literal["discrete", "multi_discrete", "continuous"]
    sizes: tuple[int, ...]
    masked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one action, as replay stores it."""
        return {"discrete": (), "multi_discrete": (len(self.sizes),), "continuous": self.sizes}[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """As replay stores it."""
        return torch.float32 if self.kind == "continuous" else torch.int64

    @property
    def embed_size(self) -> int:
        """Numbers that a world model sees of an action: one-hot vectors one after another, or the action itself."""
        return sum(self.sizes)


class CandidateSpec(NamedTuple):
    """Actions that stand for candidates: to follow one of R lines in one of M modes, or, by the last action, no line.

    Action r * M + m follows line r in mode m. The last one is always legal.

    Attributes:
        lines: R.
        points: of each line.
        features: numbers of each point.
        modes: M.
    """

    lines: int
    points: int
    features: int
    modes: int


@runtime_checkable
class MaskRules(Protocol):
    """Rules of legality that a user supplies for a task of discrete actions, as pure functions over tensors.

    A state is a NamedTuple of tensors; every method takes and returns any number of leading dimensions.
    """

    def restore(self, obs: dict[str, Tensor]) -> Any:
        """The state that an observation shows."""

    def action_mask(self, state: Any) -> Bool[Tensor, "*B n"]:
        """True where an action is legal."""

    def step(self, state: Any, action: Int[Tensor, "*B"]) -> Any:
        """The state after a legal action."""


def wrong_share(rules: MaskRules, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The share of replayed rows whose mask is not what the rules say, of the row itself or of the one before it.

    The last rows of episodes do not count: nothing is done there.

    Args:
        rules: held against what happened.
        batch: replayed sequences [B, T, ...].
    """
    mask, counts = batch[ACTION_MASK], ~batch["is_last"]
    wrong = (rules.action_mask(rules.restore(batch)) != mask).any(-1)
    before = {name: value[:, :-1] for name, value in batch.items()}
    foreseen = rules.action_mask(rules.step(rules.restore(before), before["action"]))
    wrong[:, 1:] |= (foreseen != mask[:, 1:]).any(-1) & ~batch["is_first"][:, 1:]
    return (wrong & counts).sum() / counts.sum().clamp(min=1)


@dataclass(frozen=True)
class Task(ABC):
    """The shape of a task.

    Attributes:
        has_references: whether it is known how well it can be done, so that an agent is measured by gaps.
        actions: what can be done.
    """

    has_references: ClassVar[bool] = False

    actions: ActionSpec

    @property
    def num_actions(self) -> int:
        """How many discrete actions there are."""
        assert self.actions.kind == "discrete", f"{self.actions.kind} actions cannot be counted"
        return self.actions.sizes[0]

    @abstractmethod
    def sequence(self, length: int) -> tuple[int, bool]:
        """How many rows a replayed sequence has, where windows have `length`, and whether it is a whole episode."""

    @abstractmethod
    def stored(self, env: VectorEnv) -> Spaces:
        """Shape and dtype of all that replay stores of an observation, and of the action."""

    @abstractmethod
    def fault(self, episode: Mapping[str, np.ndarray]) -> str | None:
        """Why a recorded episode, whose arrays fit in shape, cannot be of this task, in words that follow its name.

        Args:
            episode: all that replay stores of it, [T, ...].
        """

    @abstractmethod
    def reading(self, choose: Callable[[dict[str, ObservationKey]], dict[str, ObservationKey]]) -> Task:
        """The same task as seen by somebody who reads only the keys of observations that are chosen."""


@dataclass(frozen=True)
class RoutingTask(Task):
    """A routing problem; nodes and state are encoded by what they mean.

    Attributes:
        actions: the nodes of a training instance, masked.
        rules: the problem's batched rules.
    """

    has_references: ClassVar[bool] = True

    rules: type[Rules]

    @classmethod
    def of(cls, rules: type[Rules], num_nodes: int) -> RoutingTask:
        """The problem with instances of that many nodes."""
        return cls(ActionSpec("discrete", (num_nodes,), masked=True), rules)

    def sequence(self, length: int) -> tuple[int, bool]:
        """A whole episode, so that each sequence has one static context."""
        return self.rules.episode_steps(self.num_actions) + 1, True

    def stored(self, env: VectorEnv) -> Spaces:
        obs, _ = env.reset()
        shown = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
        return {**shown, "action": ((), torch.int64)}

    def fault(self, episode: Mapping[str, np.ndarray]) -> str | None:
        rows, longest = len(episode["reward"]), self.sequence(0)[0]
        if rows > longest or (rows < longest and self.rules.fixed_length):
            return f"has {rows} rows; an episode of this task has {longest}"
        return None

    def reading(self, choose: Callable[[dict[str, ObservationKey]], dict[str, ObservationKey]]) -> RoutingTask:
        return self


@dataclass(frozen=True)
class ObservationTask(Task):
    """Any other task: a gymnasium environment.

    Attributes:
        actions: what can be done.
        observations: what is seen, by key, without the action mask.
        mask_rules: of a task with masked actions, the rules by which its mask changes; None where they are not known,
            and the mask is predicted.
        candidates: where the actions are candidates that are observed, what these are made of.
        left_out: keys of the observation that are not read at all, each with the reason.
    """

    observations: dict[str, ObservationKey]
    mask_rules: MaskRules | None = None
    candidates: CandidateSpec | None = None
    left_out: tuple[tuple[str, str], ...] = ()

    def sequence(self, length: int) -> tuple[int, bool]:
        """A window, which may cross the ends of episodes."""
        return length, False

    @property
    def encoded(self) -> dict[str, ObservationKey]:
        """What a world model sees: the observations and, since legality may show nowhere else, the action mask."""
        if not self.actions.masked:
            return self.observations
        return {**self.observations, ACTION_MASK: ObservationKey("vector", self.spaces[ACTION_MASK][0], torch.bool)}

    @property
    def spaces(self) -> Spaces:
        """Shape and dtype of all that replay stores of an observation, and of the action."""
        spaces = {name: (key.shape, key.dtype) for name, key in self.observations.items()}
        if self.actions.masked:
            spaces[ACTION_MASK] = ((math.prod(self.actions.sizes),), torch.bool)
        return {**spaces, "action": (self.actions.shape, self.actions.dtype)}

    def stored(self, env: VectorEnv) -> Spaces:
        return self.spaces

    def fault(self, episode: Mapping[str, np.ndarray]) -> str | None:
        for name, key in self.observations.items():
            if key.kind == "classes" and ((episode[name] < 0) | (episode[name] >= key.classes)).any():
                return f"has a class in {name} that its space does not have"
        return None

    def reading(self, choose: Callable[[dict[str, ObservationKey]], dict[str, ObservationKey]]) -> ObservationTask:
        return replace(self, observations=choose(self.observations))
