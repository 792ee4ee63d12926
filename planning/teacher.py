"""Planned tours that the policy imitates, of maps that were walked or only dreamt: kept in a stock, told as lessons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from imagining.imagination import stack_steps
from imagining.routing_starts import drawn_rows
from imagining.world_model import Metrics
from parts.actors import Actor
from parts.views import NodeSet, View
from planning.planner import Planner
from routing.rules import Instance, State, each_part, expand_instance
from settings.planning import TeacherSettings
from tools import uniform

# A tour may be told the other way round where it costs at most so many times as much that way.
AS_GOOD = 1.001


class Planned(NamedTuple):
    """Plans from states of episodes on: S of them.

    Attributes:
        instance: where the episodes are played.
        state: how far they had come.
        belief: about what is hidden; None where nothing is.
        moves: the nodes that are visited from there; home again and again once an episode is over.
        either_way: whether the tour is as good the other way round.
    """

    instance: Instance
    state: State
    belief: Float[Tensor, "S L"] | None
    moves: Int[Tensor, "S H"]
    either_way: Bool[Tensor, " S"]


class Lesson(NamedTuple):
    """What to imitate: planned choices in the states of Q ways through each of B instances.

    Attributes:
        nodes: of the instances.
        view: of the states.
        action: what was planned there.
        weight: 1 where there was a choice, and 0 where one node alone was open.
    """

    nodes: NodeSet
    view: View
    action: Int[Tensor, "B Q H"]
    weight: Float[Tensor, "B Q H"]


class Teacher:
    """Plans a few tours with every update, keeps the latest of them, and teaches from all that it keeps.

    In a world that hides nothing it plans whole episodes; a closed tour is then told from several first nodes, and
    either way round where costs allow. In others it plans from replayed rows, by the belief that there was.
    """

    def __init__(self, planner: Planner, settings: TeacherSettings) -> None:
        """Begin with nothing in stock.

        Args:
            planner: makes the plans.
            settings: how many, and of what.
        """
        self.planner, self.settings, self.rules = planner, settings, planner.rules
        self.model = planner.imagination.model
        self.stock: Planned | None = None
        self.planned = 0

    def scale(self, progress: float) -> float:
        """What the loss counts when a share of the run is over."""
        return self.settings.scale * (1 + (self.settings.final - 1) * progress)

    @torch.no_grad()
    def lesson(self, batch: dict[str, Tensor], generator: torch.Generator) -> Lesson:
        """Plan a few tours more, and draw a lesson from the stock.

        Args:
            batch: replayed episodes, whose maps or rows are planned.
            generator: draws maps, rows, and what is told of them.
        """
        self._keep(self._plan(batch, generator))
        assert self.stock is not None
        chosen = (uniform((self.settings.batch,), generator) * min(self.planned, self.settings.stock)).long()
        told: Planned = each_part(self.stock, lambda part: part[chosen])
        if not self._turns(told.instance):
            return self._lesson(told, each_part(told.state, lambda part: part[:, None]), told.moves[:, None])
        turned = self._turned(told, generator)
        first = self.rules.reset(expand_instance(told.instance, turned.shape[:2]), turned[..., 0])
        return self._lesson(told, first, turned.roll(-1, -1))

    def _lesson(self, told: Planned, state: State, action: Int[Tensor, "B Q H"]) -> Lesson:
        states = []
        for step in range(action.shape[-1]):
            states.append(state)
            state, _ = self.rules.step(state, action[..., step])
        stacked = stack_steps(states, action.shape[:2])
        mask = self.rules.action_mask(stacked)
        nodes = self.model.node_set(told.instance, told.belief)
        return Lesson(nodes, View.of(self.rules, stacked, mask), action, (mask.sum(-1) > 1).float())

    def _turns(self, instance: Instance) -> bool:
        """Whether tours may be told from any first node: closed ones, without padding between their nodes."""
        return self.rules.starts_anywhere and self.model.belief is None and instance.valid is None

    def _turned(self, told: Planned, generator: torch.Generator) -> Int[Tensor, "B Q H"]:
        """Closed tours from first nodes spread over them, each way round where either is as good."""
        count, tours = len(told.moves), self.settings.tours
        length, device = told.moves.shape[1], told.moves.device
        begin = (torch.arange(tours, device=device) * length // tours)[None, :, None]
        drawn = uniform((2, count, tours, 1), generator)
        backwards = (drawn[0] < 0.5) & told.either_way[:, None, None]
        steps = torch.arange(length, device=device) * torch.where(backwards, -1, 1)
        offset = (drawn[1, :, :1] * length).long()
        return told.moves[:, None].expand(-1, tours, -1).gather(-1, (begin + offset + steps) % length)

    def _plan(self, batch: dict[str, Tensor], generator: torch.Generator) -> Planned:
        # The first lesson needs something to choose from.
        count = self.settings.plans if self.planned else max(self.settings.plans, self.settings.batch)
        instance, state, belief = self._where(batch, count, generator)
        costs = self.planner.costs(instance, belief)
        plans = self.planner.solved(instance, state, costs, thorough=False)
        length = self.rules.episode_steps(instance.coords.shape[1])
        moves = np.stack([np.pad(plan, (0, length - len(plan)), mode="edge") for plan in plans])
        back = np.array([_as_good_backwards(each, plan) for each, plan in zip(costs, plans, strict=True)])
        device = instance.coords.device
        return Planned(instance, state, belief, torch.from_numpy(moves).to(device), torch.from_numpy(back).to(device))

    def _where(
        self, batch: dict[str, Tensor], count: int, generator: torch.Generator
    ) -> tuple[Instance, State, Float[Tensor, "S L"] | None]:
        """Where plans are made: the beginning of episodes, or where costs are hidden replayed rows."""
        if self.model.belief is not None:
            return self._rows(batch, count, generator)
        instance = self.model.first_instance(batch)
        nodes, dreamt = instance.coords.shape[1], round(self.settings.dreamt * count)
        parts = [each_part(instance, lambda part: part[: count - dreamt])]
        if dreamt:
            fresh = self.rules.random(dreamt, nodes, generator=generator, device=instance.coords.device)
            parts.append(fresh if instance.valid is None else self.rules.pad(fresh, nodes))
        together = _joined(parts)
        return together, self.rules.reset(together), None

    def _rows(
        self, batch: dict[str, Tensor], count: int, generator: torch.Generator
    ) -> tuple[Instance, State, Float[Tensor, "S L"]]:
        among = torch.arange(count, device=generator.device) % len(batch["reward"])
        episodes = {key: value[among] for key, value in batch.items()}
        row, rows = drawn_rows(episodes, generator), torch.arange(count, device=generator.device)
        shown = {key: value[rows, row] for key, value in episodes.items() if value.ndim > 1}
        instance, state = self.rules.restore(shown)
        return instance, state, self.model.believe(episodes, instance)[rows, row]

    def _keep(self, planned: Planned) -> None:
        """Let new plans take the place of the oldest ones."""
        size, count = self.settings.stock, len(planned.moves)
        if self.stock is None:
            self.stock = each_part(planned, lambda part: part.new_zeros(size, *part.shape[1:]))
        places = (self.planned + torch.arange(count, device=planned.moves.device)) % size
        for old, new in zip(_leaves(self.stock), _leaves(planned), strict=True):
            old[places] = new
        self.planned += count

    def state_dict(self) -> dict[str, Any]:
        """The stock, and how many plans were ever made."""
        if self.stock is None:
            return {"planned": self.planned, "stock": None}
        parts = {"instance": self.stock.instance._asdict(), "state": self.stock.state._asdict()}
        return {"planned": self.planned, "stock": {**self.stock._asdict(), **parts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.planned, stock = state["planned"], state["stock"]
        if stock is not None:
            instance = self.rules.instance_type(**stock["instance"])
            stock = Planned(**{**stock, "instance": instance, "state": self.rules.state_type(**stock["state"])})
        self.stock = stock


def imitation(actor: Actor, lesson: Lesson) -> tuple[Float[Tensor, ""], Metrics]:
    """How unlikely the actor finds what was planned, on average over choices; how often it would choose the same."""
    tables = actor.tables(lesson.nodes)
    scores = actor.scores(None, tables, lesson.view)
    dist = actor.distribution(scores, lesson.view)
    penalty, metrics = actor.penalty(scores, lesson.view)
    total = lesson.weight.sum().clamp(min=1)
    loss = -(dist.log_prob(lesson.action) * lesson.weight).sum() / total
    agreement = ((dist.mode() == lesson.action) * lesson.weight).sum() / total
    metrics = {**metrics, "teacher_loss": loss.detach(), "teacher_agreement": agreement.detach()}
    return loss + penalty, metrics


def _as_good_backwards(costs: Float64[np.ndarray, "N N"], plan: Int64[np.ndarray, " K"]) -> bool:
    """Whether a plan that leads home costs as much the other way round."""
    path = np.concatenate((plan[-1:], plan))
    there, back = costs[path[:-1], path[1:]].sum(), costs[path[1:], path[:-1]].sum()
    return bool(back <= there * AS_GOOD)


def _joined(instances: list[Instance]) -> Instance:
    """Instances one after the other."""
    make: Any = type(instances[0])
    return make(*(None if each[0] is None else torch.cat(each) for each in zip(*instances, strict=True)))


def _leaves(parts: Any) -> Iterator[Tensor]:
    """Every tensor in a NamedTuple, at any depth."""
    for part in parts:
        if isinstance(part, tuple):
            yield from _leaves(part)
        elif part is not None:
            yield part
