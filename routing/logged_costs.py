"""Cost worlds of which only a log of moves is known: nodes can be drawn there, and nobody says what a move costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from config import UserError
from routing.cost_world import Costs, Nodes, UniformDraws
from routing.costs import GeometricCosts
from routing.frame import Frame
from routing.places import Places, nearest_points

# The name of such a world.
TRIPS = "trips"
# How far from a place, in the unit square, a node is still at it.
SAME_PLACE = 1e-4


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

    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """Where they are in the log's frame."""
        return Nodes(torch.from_numpy(self.frame.located(positions, are_degrees=are_degrees))[None])

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

    def numbers_of(self, called: Sequence[str]) -> Int64[np.ndarray, " N"]:
        """By their names in the log's table, which may be numbers."""
        return self.frame.numbers_of(called)

    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """The places given, or those at the positions; a node that is at none is an unknown place, -1."""
        if place is not None:
            return super().locate(positions, are_degrees=are_degrees, place=place)
        inside = self.frame.located(positions, are_degrees=are_degrees)
        nearest = nearest_points(inside, self.frame.places)
        is_there = np.abs(self.frame.places[nearest] - inside).max(-1) <= SAME_PLACE
        found = np.where(is_there, nearest, -1)
        return Nodes(torch.from_numpy(inside)[None], torch.from_numpy(found)[None].int())

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
