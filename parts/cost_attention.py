"""Attention among the members of a set that knows what it costs to go from one to another, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from parts.precision import ExactLinear
from parts.sets import SetEncoder, SetLayer


class CostLayer(SetLayer):
    """A set layer whose attention mixes in costs, of every move and of the move back.

    Each head adds to its scores what it makes of the costs, as in Kwon et al. 2021, "Matrix encoding networks for
    neural combinatorial optimization"; and members gather, beside the others' values, the costs of the moves to them.
    Without the latter a member would know whom it is near to, and not how near.
    """

    def __init__(self, width: int, *, heads: int, hidden: int, cost_units: int) -> None:
        super().__init__(width, heads=heads, hidden=hidden)
        self.cost_bias = nn.Linear(cost_units, heads, bias=False)
        self.costs_out = nn.Linear(heads * cost_units, width, bias=False)

    def forward(
        self,
        members: Float[Tensor, "B N E"],
        valid: Bool[Tensor, "B N"] | None = None,
        costs: Float[Tensor, "B N N U"] | None = None,
    ) -> Float[Tensor, "B N E"]:
        """What members make of one another and of `costs`, which `CostEncoder` has embedded."""
        assert costs is not None, "attention mixes in costs"
        # As in `attend`, a CPU computes attention in float32.
        query, key, value = (each.float() for each in self.project(members))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + self.cost_bias(costs).permute(0, 3, 1, 2)
        if valid is not None:
            # A set without members attends to its padding, and all that comes of it is scrubbed.
            scores = scores.masked_fill(~(valid | ~valid.any(-1, keepdim=True))[:, None, None], -torch.inf)
        attention = torch.softmax(scores, -1)
        gathered = self.attention_out((attention @ value).transpose(1, 2).flatten(-2))
        # One product for each member: attention of all its heads over the costs of its moves.
        moves = torch.bmm(attention.transpose(1, 2).flatten(0, 1), costs.flatten(0, 1))  # [B x N, A, U]
        return self.finish(members, gathered + self.costs_out(moves.view(*members.shape[:2], -1)), valid)


class CostEncoder(SetEncoder):
    """A set encoder of `CostLayer`s: members' embeddings know of all the others, and of what moves among them cost."""

    def __init__(self, features: int, *, width: int, layers: int, heads: int, hidden: int, cost_units: int) -> None:
        super().__init__(features, width=width, layers=0, heads=heads, hidden=hidden)
        sizes = {"heads": heads, "hidden": hidden, "cost_units": cost_units}
        self.layers = nn.ModuleList(CostLayer(width, **sizes) for _ in range(layers))
        # Two costs closer than half precision tells apart would be one.
        self.embed_costs = ExactLinear(2, cost_units)

    def costs(self, costs: Float[Tensor, "B N N"]) -> Float[Tensor, "B N N U"]:
        """Costs of moves from each member (row) to each (column), there and back, embedded for all layers."""
        return functional.silu(self.embed_costs(torch.stack((costs, costs.transpose(1, 2)), -1)))

    def attend(
        self,
        embedded: Float[Tensor, "B N E"],
        valid: Bool[Tensor, "B N"] | None = None,
        costs: Float[Tensor, "B N N U"] | None = None,
    ) -> Float[Tensor, "B N E"]:
        """The layers alone, for members and costs that are embedded already."""
        for layer in self.layers:
            embedded = layer(embedded, valid, costs)
        return embedded


def make_encoder(features: int, *, width: int, layers: int, heads: int, hidden: int, cost_units: int = 0) -> SetEncoder:
    """An encoder that knows what moves cost, where it is given units to know it by; otherwise a plain one."""
    if not cost_units:
        return SetEncoder(features, width=width, layers=layers, heads=heads, hidden=hidden)
    return CostEncoder(features, width=width, layers=layers, heads=heads, hidden=hidden, cost_units=cost_units)


class AddedScores(NamedTuple):
    """What costs add to a pointer's scores of going from the row's node to the column's.

    Attributes:
        current: to a glimpse's attention, where a tour stands at the row's node; G is heads x N.
        first: likewise, where it began there.
        direct: to the score itself.
    """

    current: Float[Tensor, "B N G"]
    first: Float[Tensor, "B N G"]
    direct: Float[Tensor, "B N N"]


class CostScores(nn.Module):
    """What a pointer makes of embedded costs, beside all that it knows of the nodes."""

    def __init__(self, *, units: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.out = nn.Linear(units, 2 * heads + 1, bias=False)

    def forward(self, costs: Float[Tensor, "B N N U"]) -> AddedScores:
        """The scores that costs stand for."""
        current, first, direct = self.out(costs).split([self.heads, self.heads, 1], -1)
        of_current, of_first = (each.transpose(2, 3).flatten(2) for each in (current, first))
        return AddedScores(of_current, of_first, direct[..., 0])
