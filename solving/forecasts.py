"""What a run's model expects moves and tours to cost, before the first move of an episode."""

from __future__ import annotations

import itertools
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from imagining.routing_imagination import RoutingImagination
from imagining.routing_model import RoutingModel
from parts.moves import MoveHead
from planning.planner import apart
from routing.rules import Instance, each_part
from settings.planning import PlanSettings
from solving.worlds import tells_costs

# Numbers that networks may hold at once: a quarter of a gigabyte in float32.
WORKING_NUMBERS = 2**26
# Copies of what its layers give that a network holds at once: before and after each activation, and two in between.
HELD = 4


class Forecaster:
    """Asks the model's ensemble. Where costs are hidden, it answers by the belief before anything was paid."""

    def __init__(self, imagination: RoutingImagination, settings: PlanSettings, *, reward_scale: float) -> None:
        """Take the model.

        Args:
            imagination: of a model that can be planned in.
            settings: `pessimism` says by how much dearer moves are taken to be than their mean.
            reward_scale: what rewards were multiplied by before the model saw them.
        """
        assert imagination.can_plan, "only a model that knows moves apart from latents can be asked"
        self.model: RoutingModel = imagination.model
        self.settings, self.reward_scale = settings, reward_scale

    @property
    def knows_costs(self) -> bool:
        """Whether instances themselves tell what moves cost, which needs no forecast."""
        return tells_costs(self.model.rules)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def matrices(self, instance: Instance) -> Float64[np.ndarray, "B N N"]:
        """What every move from a node (row) to a node (column) costs, as plans take it; staying costs nothing."""
        count, nodes = instance.coords.shape[:2]
        costs = np.zeros((count, nodes, nodes))
        belief = self.model.first_belief(instance)
        held = HELD * _numbers_of_a_move(self.model)
        rows = max(1, WORKING_NUMBERS // (held * nodes**2))
        origins = max(1, WORKING_NUMBERS // (held * nodes))
        for first, begin in itertools.product(range(0, count, rows), range(0, nodes, origins)):
            chosen, some = slice(first, first + rows), slice(begin, begin + origins)
            part: Instance = each_part(instance, itemgetter(chosen))
            known = None if belief is None else belief[chosen]
            costs[chosen, some] = self._taken(self.model.predict_moves_each(part, known, some))
        same = (instance.coords[:, :, None] == instance.coords[:, None]).all(-1)
        costs[same.cpu().numpy()] = 0.0
        return costs

    def _taken(self, rewards: Tensor) -> Float64[np.ndarray, "B M N"]:
        costs = -rewards.double().nan_to_num(0.0, 0.0, 0.0) / self.reward_scale
        return apart(costs, self.settings.pessimism).cpu().numpy()

    def tours(self, instance: Instance, tours: Int64[np.ndarray, "B L"]) -> Float64[np.ndarray, "K B"]:
        """What closed tours cost, as each member of the ensemble expects it; they may wait at a node."""
        belief = self.model.first_belief(instance)
        stops = torch.from_numpy(tours).to(instance.coords.device)
        legs = self.model.predict_legs_each(instance, belief, stops)
        return (-legs.double().sum(-1) / self.reward_scale).cpu().numpy()


def _numbers_of_a_move(model: RoutingModel) -> int:
    """What the layers of the ensemble give for one move."""
    head = model.heads["reward"]
    assert isinstance(head, MoveHead)
    sizes = [each.shape[-1] for name, each in head.hidden.named_parameters() if name.endswith("bias")]
    return head.members * sum(sizes)
