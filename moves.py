"""Moves as networks see them: their geometry, what they tell of hidden costs, and what they earn."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from layers import Normed

# Numbers in a move's geometry, and where among them its length stands.
GEOMETRY, LENGTH = 9, 6


def move_geometry(origin: Float[Tensor, "*#B 2"], target: Float[Tensor, "*#B 2"]) -> Float[Tensor, "*B G"]:
    """A move as networks see it: both ends, their difference, its length (at `LENGTH`) and its direction."""
    origin, target = torch.broadcast_tensors(origin, target)
    difference = target - origin
    # The gradient of a norm is not finite at zero, where a finished tour stays.
    length = (difference.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return torch.cat((origin, target, difference, length, difference / length), -1)


class EvidenceEncoder(nn.Module):
    """Encodes what the last move tells of hidden costs: its geometry, its cost, cost per distance, and a flag.

    The flag is 0, and so is everything else, before the first move. Hidden factors that are shown come as points on the
    unit circle, since they may stand for angles.
    """

    def __init__(self, factors: int, *, units: int) -> None:
        super().__init__()
        self.factors, self.units = factors, units
        self.mlp = nn.Sequential(Normed(GEOMETRY + 3 + 2 * factors, units), Normed(units, units))

    def forward(
        self,
        origin: Float[Tensor, "*B 2"],
        target: Float[Tensor, "*B 2"],
        cost: Float[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None,
    ) -> Float[Tensor, "*B U"]:
        geometry = move_geometry(origin, target)
        length = geometry[..., LENGTH : LENGTH + 1]
        moved = (origin != target).any(-1, keepdim=True)
        evidence = torch.cat((geometry, cost[..., None], cost[..., None] / length, moved), -1) * moved
        if self.factors:
            angle = cost.new_zeros(*cost.shape, 0) if factors is None else 2 * math.pi * factors
            circle = torch.cat((torch.cos(angle), torch.sin(angle)), -1)
            # Where nobody knows them they are at the centre.
            circle = functional.pad(circle, (0, 2 * self.factors - circle.shape[-1]))
            evidence = torch.cat((evidence, circle), -1)
        return self.mlp(evidence)


class MoveHead(nn.Module):
    """What a move earns, from its geometry and, if wanted, the latent before it.

    Sees both nodes, their difference, its length and its direction, and gives `out0 * length + out1`: a network that
    has to find the length in a latent vector needs far more moves than one that is handed it. Starts at zero.
    """

    def __init__(self, *, latent_size: int, units: int, layers: int) -> None:
        super().__init__()
        sizes = [GEOMETRY + latent_size] + [units] * layers
        parts: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            parts += [nn.Linear(size_in, size_out), nn.SiLU()]
        self.hidden = nn.Sequential(*parts)
        self.output = nn.Linear(units, 2)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        origin: Float[Tensor, "*#B 2"],
        target: Float[Tensor, "*#B 2"],
        latent: Float[Tensor, "*#B L"] | None,
    ) -> Float[Tensor, "*B"]:
        geometry = move_geometry(origin, target)
        length = geometry[..., LENGTH]
        first, *rest = self.hidden
        assert isinstance(first, nn.Linear)
        hidden = functional.linear(geometry, first.weight[:, :GEOMETRY], first.bias)
        if latent is not None:
            # Apart, since one latent may answer for many moves.
            hidden = hidden + functional.linear(latent, first.weight[:, GEOMETRY:])
        for part in rest:
            hidden = part(hidden)
        out = self.output(hidden)
        return out[..., 0] * length + out[..., 1]
