"""Cost worlds of which only a log of moves is known: nodes can be drawn there, and nobody says what a move costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from config import UserError
from routing.cost_world import Costs, Nodes, UniformDraws
from routing.costs import GeometricCosts
from routing.frame import Frame
from routing.places import Places

# The name of such a world.
TRIPS = "trips"


def logged_costs(frame: Frame) -> Costs:
    """The world of a log: between the places of its table, or anywhere in its box where it has none."""
    if frame.names:
        coords = torch.from_numpy(frame.places.astype(np.float32))
        return LoggedPlaces(TRIPS, coords=coords, frame=frame, unit=frame.unit)
    return LoggedCosts(TRIPS, _unknown, frame, unit=frame.unit)


def _unknown(*_: Any) -> NoReturn:
    raise UserError("what moves cost is known from a log alone, so that nothing can be played there")


def _measured(cost: float, frame: Frame) -> str:
    return f" ({cost * frame.unit:.4g} in the log's unit)"


@dataclass(frozen=True, eq=False)
class LoggedCosts(GeometricCosts):
    """A world of positions whose costs are logged; instances are drawn uniformly in the log's box.

    Attributes:
        frame: of the log.
    """

    frame: Frame

    @property
    def known(self) -> bool:
        return False

    def random_nodes(
        self, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Nodes:
        drawn = super().random_nodes(num_instances, num_nodes, generator=generator, device=device)
        return Nodes(drawn.coords * torch.from_numpy(self.frame.size).to(drawn.coords))

    def numpy_nodes(self, uniform: UniformDraws, num_instances: int, *sizes: int) -> Nodes:
        drawn = super().numpy_nodes(uniform, num_instances, *sizes)
        return Nodes(drawn.coords * torch.from_numpy(self.frame.size))

    def measured(self, cost: float) -> str:
        """In the log's own unit."""
        return _measured(cost, self.frame)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoggedPlaces(Places):
    """A world of places between which costs are logged.

    Attributes:
        frame: of the log; its places are those of the world.
    """

    frame: Frame

    @property
    def known(self) -> bool:
        return False

    @property
    def unseen_places(self) -> tuple[int, ...]:
        """Where the log never goes."""
        return tuple(np.flatnonzero(~self.frame.seen).tolist())

    def between(
        self,
        instance: Any,
        origin: Int[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        return _unknown()

    def matrix(self, instance: Any, factors: Float[Tensor, "*B F"] | None = None) -> Float[Tensor, "*B N N"]:
        return _unknown()

    def measured(self, cost: float) -> str:
        """In the log's own unit."""
        return _measured(cost, self.frame)
