"""What an agent must know of a task before it meets it."""

from __future__ import annotations

from typing import NamedTuple

from envs.routing import TSPRules


class Task(NamedTuple):
    """The shape of a task.

    Attributes:
        rules: the batched rules of a routing problem; None for any other task.
        num_actions: how many discrete actions there are (for routing, the nodes of a training instance).
        vectors: size of each vector in the observation that the world model encodes and decodes, by key; empty for
            routing, where nodes and state are encoded by what they mean.
    """

    rules: type[TSPRules] | None
    num_actions: int
    vectors: dict[str, int]
