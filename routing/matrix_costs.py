"""The cost world of instances that say themselves what moves cost: a matrix each, of which positions tell nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from routing.cost_world import COST_LIMIT, Costs, Nodes, UniformDraws

# Costs above so many times an instance's mean look alike to networks: with so dear a move no tour is good.
DEAREST = 5.0
# Costs of the random class are whole numbers below this, before they are scaled to at most 1.
WHOLE_COSTS = 1_000_000
# Numbers of matrices to work on at once.
CHUNK = 2**16


def on_circle(shape: torch.Size, *, like: Tensor, valid: Bool[Tensor, "*B N"] | None = None) -> Float[Tensor, "*B N 2"]:
    """Positions for pictures of nodes [*B, N] that lie nowhere: evenly on a circle in the unit square, node 0 east.

    Those that are not `valid` lie where node 0 does.
    """
    node = torch.arange(shape[-1], device=like.device, dtype=like.dtype).expand(shape)
    count: Tensor | int = shape[-1]
    if valid is not None:
        node, count = node * valid, valid.sum(-1, keepdim=True)
    angle = node * (2 * math.pi / count)
    return 0.5 + 0.5 * torch.stack((torch.cos(angle), torch.sin(angle)), -1)


def closed(costs: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B N N"]:
    """What moves cost where each takes the cheapest way, over any other nodes (Floyd 1962; Warshall 1962).

    Afterwards no detour is cheaper than a move: the triangle inequality holds.
    """
    count = costs.shape[-1]
    pieces = []
    # As many at a time as stay in a core's cache.
    for piece in costs.reshape(-1, count, count).split(max(1, CHUNK // count**2)):
        piece = piece.clone()
        for node in range(count):
            torch.minimum(piece, piece[:, :, node, None] + piece[:, None, node], out=piece)
        pieces.append(piece)
    return torch.cat(pieces).view(costs.shape)


def relative(costs: Float[Tensor, "B N N"], valid: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N N"]:
    """Costs of moves as networks see them: in units of the instance's mean cost, so that no unit matters; 0 of padding.

    Where all moves are free, all are 0. What is dearer than `DEAREST` is that.

    Args:
        costs: of moves from each node (row) to each (column); of any sign.
        valid: False for nodes that are padding; None where none are.
    """
    count = costs.shape[-1]
    counts = ~torch.eye(count, dtype=torch.bool, device=costs.device).expand(costs.shape)
    if valid is not None:
        counts = counts & valid[:, :, None] & valid[:, None]
    costs = costs.masked_fill(~counts, 0.0)
    number = counts.sum((-2, -1), keepdim=True).clamp(min=1)
    mean = costs.abs().sum((-2, -1), keepdim=True) / number
    smallest = torch.finfo(costs.dtype).tiny
    return (costs / mean.clamp(min=smallest)).clamp(-DEAREST, DEAREST)


@dataclass(frozen=True)
class GivenCosts(Costs):
    """A world in which every instance has `costs` [*B, N, N], shown to all: from each node (row) to each (column)."""

    def between(
        self,
        instance: Any,
        origin: Int[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        rows = instance.costs.gather(-2, origin[..., None, None].expand(*origin.shape, 1, instance.costs.shape[-1]))
        return rows[..., 0, :].gather(-1, target[..., None])[..., 0]

    def matrix(self, instance: Any, factors: Float[Tensor, "*B F"] | None = None) -> Float[Tensor, "*B N N"]:
        return instance.costs

    def random_nodes(
        self, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Nodes:
        """On a circle, without a draw."""
        return Nodes(on_circle(torch.Size((num_instances, num_nodes)), like=torch.zeros((), device=device)))

    def numpy_nodes(self, uniform: UniformDraws, num_instances: int, *sizes: int) -> Nodes:
        """On a circle, without a draw."""
        like = torch.zeros((), dtype=torch.float64, device=torch.device("cpu"))
        return Nodes(on_circle(torch.Size((num_instances, sum(sizes))), like=like))

    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """On a circle: nobody asks where they are."""
        return self.numpy_nodes(np.random.RandomState(0).uniform, 1, len(positions))

    def validate(self, instance: Any) -> None:
        """Costs are numbers from 0 up, and staying costs nothing.

        Raises:
            UserError: some are not.
        """
        costs = instance.costs
        # Written so that NaN is refused too.
        possible = (costs >= 0) & (costs <= COST_LIMIT)
        if not bool(possible.all()):
            row, begin, end = (~possible).flatten(0, -3).nonzero()[0].tolist()
            cost = float(costs.flatten(0, -3)[row, begin, end])
            raise UserError(
                f"the move from node {begin} to node {end} of instance {row} costs {cost:g}; a number from 0 to"
                f" {COST_LIMIT:g} is needed"
            )
        if bool(costs.diagonal(dim1=-2, dim2=-1).any()):
            raise UserError("staying at a node costs something; the diagonal of a matrix of costs has to be 0")


GIVEN_COSTS = GivenCosts("given")
