"""Moves as networks see them: their geometry, what they tell of hidden costs, and what they earn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# How many numbers a move's geometry has, how many of them are the positions of its ends, and which one is its length.
GEOMETRY, ENDS, LENGTH = 9, 4, 6
# How large the vector that stands for a place is when learning begins.
PLACE_SCALE = 0.1
# The largest cost per distance that a belief sees.
LARGEST_RATE = 20.0
# The least that a belief takes a move to have been expected to cost.
LEAST_EXPECTED = 0.01


class Moves(NamedTuple):
    """Moves that somebody has made, and what they have earned.

    Attributes:
        origin: where they began.
        target: where they ended.
        reward: what they earned: minus what they cost.
        weight: how much each of them counts.
        places: which places both ends are, -1 for unknown ones; None where nobody knows any.
        latent: what says more to a head that reads it: a latent or a belief.
        shown: what observations say that they cost; None where these say nothing of it.
    """

    origin: Float[Tensor, "*#B 2"]
    target: Float[Tensor, "*#B 2"]
    reward: Float[Tensor, "*#B"]
    weight: Float[Tensor, "*B"]
    places: Int[Tensor, "*#B 2"] | None = None
    latent: Float[Tensor, "*#B L"] | None = None
    shown: Float[Tensor, "*#B"] | None = None


def move_geometry(origin: Float[Tensor, "*#B 2"], target: Float[Tensor, "*#B 2"]) -> Float[Tensor, "*B G"]:
    """A move as networks see it: both ends, their difference, its length (at `LENGTH`) and its direction."""
    origin, target = torch.broadcast_tensors(origin, target)
    difference = target - origin
    # The gradient of a norm is not finite at zero, where a finished tour stays.
    length = (difference.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return torch.cat((origin, target, difference, length, difference / length), -1)


class Belief(nn.Module):
    """What is known of hidden costs: a recurrent filter of what each move so far has cost.

    It reads a move's geometry, its cost, its cost per distance, and a flag; all of them are 0 before the first move.
    Hidden factors that are shown come as points on the unit circle, since they may stand for angles. One that
    `compares` also reads what the move was expected to cost before anything was known, for costs that do not follow
    from geometry.

    Nothing is drawn, unlike in the RSSM: belief and head only learn together, and the little that each has to offer
    the other in the beginning is drowned by the noise of a fresh latent.
    """

    def __init__(self, factors: int, *, size: int, compares: bool = False) -> None:
        """Build the networks.

        Args:
            factors: hidden factors that are shown.
            size: numbers in a belief.
            compares: whether it is told what moves were expected to cost.
        """
        super().__init__()
        self.exact = True
        self.factors, self.size, self.compares = factors, size, compares
        evidence = GEOMETRY + 3 + 2 * factors + 2 * compares
        self.encoder = nn.Sequential(nn.Linear(evidence, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU())
        self.cell = nn.GRU(size, size, batch_first=True)

    def forward(
        self,
        origin: Float[Tensor, "B T 2"],
        target: Float[Tensor, "B T 2"],
        cost: Float[Tensor, "B T"],
        factors: Float[Tensor, "B T F"] | None,
        before: Float[Tensor, "B L"] | None = None,
        *,
        expected: Float[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T L"]:
        """The belief after each of T moves.

        Args:
            origin: where the moves began; where they ended, too, if there was none.
            target: where they ended.
            cost: of each.
            factors: the hidden factors, where they are shown; None where they are not.
            before: the belief before the first of these moves; None where an episode begins.
            expected: what each was expected to cost, for a belief that compares; None where nothing was.
        """
        geometry = move_geometry(origin, target)
        length = geometry[..., LENGTH : LENGTH + 1]
        moved = (origin != target).any(-1, keepdim=True)
        # A toll between two nodes in almost one place can be any number of times the distance.
        rate = (cost[..., None] / length).clamp(-LARGEST_RATE, LARGEST_RATE)
        evidence = torch.cat((geometry, cost[..., None], rate, moved), -1) * moved
        if self.compares:
            usual = cost if expected is None else expected
            ratio = (cost / usual.clamp(min=LEAST_EXPECTED)).clamp(-LARGEST_RATE, LARGEST_RATE)
            evidence = torch.cat((evidence, torch.stack((cost - usual, ratio), -1) * moved), -1)
        if self.factors:
            angle = cost.new_zeros(*cost.shape, 0) if factors is None else 2 * math.pi * factors
            circle = torch.cat((torch.cos(angle), torch.sin(angle)), -1)
            # Unknown factors stand at the centre.
            circle = functional.pad(circle, (0, 2 * self.factors - circle.shape[-1]))
            evidence = torch.cat((evidence, circle), -1)
        return self.cell(self.encoder(evidence), None if before is None else before[None])[0]


class MoveHead(nn.Module):
    """What a move earns, from its geometry and, if wanted, a vector that says more: a latent, or a belief.

    Sees both nodes, their difference, its length and its direction, and gives `out0 * length + out1`: a network that
    has to find the length in a latent vector needs far more moves than one that is handed it. Starts at zero.
    What the vector says scales what the head makes of the geometry, since a cost that depends on the direction of
    something hidden is a product of the two.

    `waves` adds sines and cosines of the positions of both ends, times pi, 2 pi, 4 pi and so on, by which costs that
    change within short distances are learnt from fewer moves (Tancik et al. 2020). `places` adds a vector that is
    learnt for each of a fixed set of places, for costs that do not follow from where they lie; it is zero for an
    unknown place, and stays zero for one that is never learnt of.

    One that is `shown` what moves cost looks at that in place of their geometry, and in place of the length. That moves
    earn minus what is shown it has to find out.

    With more than one member it is an ensemble, whose members differ by where their weights begin; what they disagree
    about has not been learnt yet (Lakshminarayanan et al. 2017).
    """

    def __init__(
        self,
        *,
        latent_size: int,
        units: int,
        layers: int,
        members: int = 1,
        waves: int = 0,
        places: int = 0,
        place_size: int = 0,
        unseen: Sequence[int] = (),
        shown: bool = False,
    ) -> None:
        """Build the networks.

        Args:
            latent_size: numbers in the vector that says more; 0: there is none.
            units: of each hidden layer.
            layers: hidden ones.
            members: of the ensemble.
            waves: wavelengths of the positions that it sees.
            places: that it knows; 0: none.
            place_size: numbers in the vector of each place.
            unseen: places that no move will go to.
            shown: whether observations show what moves cost, and geometry tells nothing of it.
        """
        super().__init__()
        self.exact = True
        self.shown = shown
        size_in = 1 if shown else GEOMETRY + 8 * waves + 2 * place_size * bool(places)
        sizes = [size_in] + [units] * layers
        parts: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            parts += [_linear(size_in, size_out, members), nn.SiLU()]
        self.members, self.waves = members, waves
        self.places = None
        if places:
            # All members' vectors of a place lie side by side. The first row is that of unknown places.
            self.places = nn.Embedding(places + 1, members * place_size, padding_idx=0)
            with torch.no_grad():
                self.places.weight.mul_(PLACE_SCALE)
                for place in unseen:
                    self.places.weight[place + 1] = 0.0
        self.hidden = nn.Sequential(*parts)
        self.gate = None
        if latent_size:
            # What is hidden is seldom linear in a belief.
            self.gate = nn.Sequential(_linear(latent_size, units, members), nn.SiLU(), _linear(units, units, members))
        self.output = _linear(units, 2, members)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        origin: Float[Tensor, "*#B 2"],
        target: Float[Tensor, "*#B 2"],
        latent: Float[Tensor, "*#B L"] | None,
        places: Int[Tensor, "*#B 2"] | None = None,
        shown: Float[Tensor, "*#B"] | None = None,
    ) -> Float[Tensor, "K *B"]:
        """What each member expects of the moves.

        Args:
            origin: where they begin.
            target: where they end.
            latent: what says more, if the head was built to read it.
            places: which places both ends are, -1 for unknown ones; None where nobody knows any.
            shown: what they are said to cost, if the head was built to look at that.
        """
        if self.shown:
            assert shown is not None, "this head looks at what moves are said to cost"
            seen = self._to_all(shown[..., None])
            measure = seen[..., 0]
        else:
            geometry = self._to_all(move_geometry(origin, target))
            seen, measure = self._seen(geometry, places), geometry[..., LENGTH]
        hidden = self.hidden[:2](seen)
        if self.gate is not None:
            assert latent is not None, "this head reads a latent or a belief"
            hidden = hidden * (1 + self.gate(self._to_all(latent)))
        out = self.output(self.hidden[2:](hidden))
        return out[..., 0] * measure + out[..., 1]

    def _seen(self, geometry: Float[Tensor, "K *B G"], places: Int[Tensor, "*#B 2"] | None) -> Float[Tensor, "K *B I"]:
        """All that it sees of moves."""
        parts = [geometry]
        if self.waves:
            lengths = math.pi * 2 ** torch.arange(self.waves, dtype=geometry.dtype, device=geometry.device)
            angle = (geometry[..., :ENDS, None] * lengths).flatten(-2)
            parts += [torch.sin(angle), torch.cos(angle)]
        if self.places is not None:
            if places is None:
                places = torch.full((*geometry.shape[1:-1], 2), -1, device=geometry.device)
            known = self.places(places.clamp(min=-1).long() + 1).unflatten(-1, (self.members, -1))
            parts.append(known.movedim(-2, 0).flatten(-2).expand(*geometry.shape[:-1], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _to_all(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "K *B I"]:
        return x.expand(self.members, *x.shape)


class MembersLinear(nn.Module):
    """A linear layer of each member of an ensemble, all in one product."""

    def __init__(self, size_in: int, size_out: int, members: int) -> None:
        super().__init__()
        layers = [nn.Linear(size_in, size_out) for _ in range(members)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().t() for layer in layers]).contiguous())
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Float[Tensor, "K *B I"]) -> Float[Tensor, "K *B O"]:
        out = torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight)
        return out.view(*x.shape[:-1], out.shape[-1])


def _linear(size_in: int, size_out: int, members: int) -> nn.Linear | MembersLinear:
    return nn.Linear(size_in, size_out) if members == 1 else MembersLinear(size_in, size_out, members)
