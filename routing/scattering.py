"""How the nodes of random instances are scattered over the unit square: a layout makes positions of uniform numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Clusters have their centres in the middle of the square, and a deviation of their own each.
FEWEST_CLUSTERS, MOST_CLUSTERS = 1, 8
CENTRES_WITHIN = 0.8
LEAST_DEVIATION, LARGEST_DEVIATION = 0.02, 0.1
# Of one cluster: its centre and its deviation; of one node: its angle, its distance, and which cluster is its own.
CLUSTER_NUMBERS, NODE_NUMBERS = 3, 3
# log(0) is infinite.
LEAST_UNIFORM = 1e-7


@dataclass(frozen=True)
class Layout(ABC):
    """Where nodes lie, as a function of numbers that are uniform in [0, 1), of which each instance has a fixed count.

    Attributes:
        name: what the config key `layout` calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def numbers(self, num_nodes: int) -> int:
        """How many uniform numbers an instance of so many nodes takes."""

    @abstractmethod
    def place(self, uniform: Float[Tensor, "I K"], num_nodes: int) -> Float[Tensor, "I N 2"]:
        """Positions of nodes in the unit square, from `numbers(num_nodes)` numbers for each instance."""


class Uniform(Layout):
    """Each node anywhere: what the field trains and tests on."""

    name = "uniform"

    def numbers(self, num_nodes: int) -> int:
        return 2 * num_nodes

    def place(self, uniform: Float[Tensor, "I K"], num_nodes: int) -> Float[Tensor, "I N 2"]:
        return uniform.unflatten(-1, (num_nodes, 2))


class Clustered(Layout):
    """All nodes in 1 to 8 round clusters, which may overlap: normal around a centre, with deviations of 0.02 to 0.1.

    What would lie outside of the square is mirrored at its border.
    """

    name = "clustered"

    def numbers(self, num_nodes: int) -> int:
        return 1 + MOST_CLUSTERS * CLUSTER_NUMBERS + num_nodes * NODE_NUMBERS

    def place(self, uniform: Float[Tensor, "I K"], num_nodes: int) -> Float[Tensor, "I N 2"]:
        count, clusters, nodes = uniform.split([1, MOST_CLUSTERS * CLUSTER_NUMBERS, num_nodes * NODE_NUMBERS], -1)
        clusters = clusters.unflatten(-1, (MOST_CLUSTERS, CLUSTER_NUMBERS))
        angle, radius, share = nodes.unflatten(-1, (num_nodes, NODE_NUMBERS)).unbind(-1)
        choices = MOST_CLUSTERS - FEWEST_CLUSTERS + 1
        num_clusters = FEWEST_CLUSTERS + _drawn(count, torch.full_like(count, choices))
        own = _drawn(share, num_clusters.to(share.dtype).expand(share.shape))
        centre, spread = clusters.gather(-2, own[..., None].expand(*own.shape, CLUSTER_NUMBERS)).split([2, 1], -1)
        deviation = LEAST_DEVIATION + (LARGEST_DEVIATION - LEAST_DEVIATION) * spread
        # Two normal numbers (Box and Muller 1958).
        distance = torch.sqrt(-2 * torch.log(radius.clamp(min=LEAST_UNIFORM)))
        normal = distance[..., None] * torch.stack((torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)), -1)
        positions = 0.5 + CENTRES_WITHIN * (centre - 0.5) + deviation * normal
        return 1 - (1 - positions.abs()).abs()


class Mixed(Layout):
    """One half of the nodes anywhere, the others in clusters; which of them is up to chance."""

    name = "mixed"

    def numbers(self, num_nodes: int) -> int:
        return UNIFORM.numbers(num_nodes) + CLUSTERED.numbers(num_nodes) + num_nodes

    def place(self, uniform: Float[Tensor, "I K"], num_nodes: int) -> Float[Tensor, "I N 2"]:
        parts = [UNIFORM.numbers(num_nodes), CLUSTERED.numbers(num_nodes), num_nodes]
        anywhere, clustered, share = uniform.split(parts, -1)
        return torch.where(
            (share < 0.5)[..., None],
            UNIFORM.place(anywhere, num_nodes),
            CLUSTERED.place(clustered, num_nodes),
        )


class OfAnyKind(Layout):
    """Each instance of one of the other kinds, which are equally likely."""

    name = "any"

    def numbers(self, num_nodes: int) -> int:
        return 1 + max(kind.numbers(num_nodes) for kind in KINDS)

    def place(self, uniform: Float[Tensor, "I K"], num_nodes: int) -> Float[Tensor, "I N 2"]:
        kind = _drawn(uniform[:, 0], torch.full_like(uniform[:, 0], len(KINDS)))
        placed = [each.place(uniform[:, 1 : 1 + each.numbers(num_nodes)], num_nodes) for each in KINDS]
        return _chosen(torch.stack(placed), kind)


def _drawn(share: Float[Tensor, "*B"], count: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """A whole number below `count`, from a uniform number in [0, 1)."""
    # Rounding could reach the count.
    return torch.minimum((share * count).long(), count.long() - 1)


def _chosen(placed: Float[Tensor, "M I N 2"], kind: Int[Tensor, " I"]) -> Float[Tensor, "I N 2"]:
    return placed[kind, torch.arange(len(kind), device=kind.device)]


UNIFORM, CLUSTERED, MIXED = Uniform(), Clustered(), Mixed()
KINDS: tuple[Layout, ...] = (UNIFORM, CLUSTERED, MIXED)
LAYOUTS: dict[str, Layout] = {each.name: each for each in (*KINDS, OfAnyKind())}
