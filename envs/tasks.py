"""What an agent must know of a task before it meets it: its observations, its actions, its rules."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from envs.rules import Rules

ACTION_MASK = "action_mask"
# Under this key of `info` a wrapper says what it met that was not finite and has seen to: a name, and a line to read.
BAD_INPUT = "bad_input"
# Under this one it says what the user should read once: a topic, and a line.
NOTICE = "notice"


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


class Task(NamedTuple):
    """The shape of a task.

    Attributes:
        rules: the batched rules of a routing problem; None for any other task.
        actions: what can be done (for routing, the nodes of a training instance).
        observations: what is seen, by key, without the action mask; empty for routing, where nodes and state are
            encoded by what they mean.
        mask_rules: of a task with masked actions that is no routing problem, the rules by which its mask changes;
            None where they are not known, and the mask is predicted.
        left_out: keys of the observation that are not read at all, each with the reason.
    """

    rules: type[Rules] | None
    actions: ActionSpec
    observations: dict[str, ObservationKey]
    mask_rules: MaskRules | None = None
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def num_actions(self) -> int:
        """How many discrete actions there are."""
        assert self.actions.kind == "discrete", f"{self.actions.kind} actions cannot be counted"
        return self.actions.sizes[0]

    def sequence(self, length: int) -> tuple[int, bool]:
        """How many rows a replayed sequence has, and whether it is a whole episode.

        Routing trains on whole episodes, so that each has one static context; any other task on windows of `length`.
        """
        if self.rules is None:
            return length, False
        return self.rules.episode_steps(self.num_actions) + 1, True

    @property
    def encoded(self) -> dict[str, ObservationKey]:
        """What a world model sees: the observations and, since legality may show nowhere else, the action mask."""
        if self.rules is not None or not self.actions.masked:
            return self.observations
        return {**self.observations, ACTION_MASK: ObservationKey("vector", self.spaces[ACTION_MASK][0], torch.bool)}

    @property
    def spaces(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of all that replay stores of an observation, and of the action."""
        spaces = {name: (key.shape, key.dtype) for name, key in self.observations.items()}
        if self.actions.masked:
            spaces[ACTION_MASK] = ((math.prod(self.actions.sizes),), torch.bool)
        return {**spaces, "action": (self.actions.shape, self.actions.dtype)}
