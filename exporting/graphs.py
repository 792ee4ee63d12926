"""What an agent is exported as: graphs with named inputs and outputs, and how far they are from the agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Outputs that are inputs of the next step have the inputs' names behind this.
NEXT = "next_"
# How many steps are compared, how far logits may be apart, and in which share of them a latent's class may be another:
# of two that are equally likely, rounding decides.
VERIFIED_STEPS, TOLERANCE, MOST_TIES = 1000, 1e-4, 0.01

Arrays = dict[str, np.ndarray]
# Runs an exported graph.
Run = Callable[[Mapping[str, np.ndarray]], Arrays]


class Graph(NamedTuple):
    """One graph to be.

    Attributes:
        name: of its file.
        module: takes a dict of tensors, gives another.
        inputs: an example of the dict.
        varies: of each input the axes that may have another size than in the example.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    varies: dict[str, tuple[int, ...]]

    @property
    def outputs(self) -> list[str]:
        """Names of what comes out."""
        with torch.no_grad():
            return list(self.module(self.inputs))


class Agreement(NamedTuple):
    """What a comparison of exported graphs with the agent has found.

    Attributes:
        steps: decisions compared.
        logits: the largest difference, or of continuous actions that of action and standard deviation.
        actions: decisions that differ.
        ties: decisions in which a latent's likeliest class was another, and which count neither way.
    """

    steps: int
    logits: float
    actions: int
    ties: int

    @property
    def holds(self) -> bool:
        """Whether the graphs do what the agent does."""
        return self.logits <= TOLERANCE and not self.actions and self.ties <= MOST_TIES * self.steps


class Export(ABC):
    """An agent of one kind of task, as graphs.

    Attributes:
        beside: a file that is put beside the graphs; None where there is none.
    """

    beside: Path | None = None

    @property
    @abstractmethod
    def graphs(self) -> Sequence[Graph]:
        """The graphs that make it up."""

    @abstractmethod
    def verify(self, runs: Mapping[str, Run]) -> Agreement:
        """Hold exported graphs, by their names, against the agent in `VERIFIED_STEPS` decisions."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a program must know of the task that the graphs do not say."""


def compared(ours: Mapping[str, Tensor], theirs: Arrays, *, told: Sequence[str], latent: Sequence[str]) -> Agreement:
    """One step of E decisions, by the agent and by a graph.

    Args:
        ours: what the agent's own modules gave.
        theirs: what the graph gave.
        told: the outputs that say what a policy is.
        latent: the outputs that are one-hot latents [E, ..., S, K].
    """
    numpy = {name: value.numpy() for name, value in ours.items()}
    decisions = numpy[told[0]].shape[:-1]
    same = np.ones(decisions, np.bool_)
    for name in latent:
        same &= (numpy[name] == theirs[name]).all((-2, -1))
    apart = [np.abs(numpy[name] - theirs[name])[same].max(initial=0.0) for name in told]
    actions = 0
    if "logits" in told:
        # Where two actions are equally good by float32, either one is right.
        best, chosen = numpy["logits"].max(-1), theirs["logits"].argmax(-1)[..., None]
        lost = best - np.take_along_axis(numpy["logits"], chosen, -1)[..., 0]
        actions = int((lost[same] > 1e-6).sum())
    return Agreement(int(np.prod(decisions)), float(max(apart)), actions, int((~same).sum()))


def together(found: Sequence[Agreement]) -> Agreement:
    """All comparisons as one."""
    return Agreement(
        sum(each.steps for each in found),
        max(each.logits for each in found),
        sum(each.actions for each in found),
        sum(each.ties for each in found),
    )
