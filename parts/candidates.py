"""What an actor sees of candidates, lines to be followed in one of some modes, and the actor that scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from envs.tasks import CandidateSpec
from parts.actors import Actor
from parts.latents import Feat
from parts.layers import MLP, Normed
from parts.sets import Gathering, Hidden, scrub
from routing.rules import each_part
from tools import OneHotDist, symlog

# Every so many points of a line are read, the first one included.
STRIDE = 5
HEADS = 4


class Agents(NamedTuple):
    """Who is around: G numbers of each, of the ego first, and who of them is there."""

    numbers: Float[Tensor, "B *Q N G"]
    valid: Bool[Tensor, "B *Q N"]


class Candidates(NamedTuple):
    """What there is to see of a state's candidates.

    Attributes:
        action_mask: which are legal.
        lines: each line as one row of L numbers.
        agents: who is around, where that is known; None where it is not.
    """

    action_mask: Bool[Tensor, "B *Q A"]
    lines: Float[Tensor, "B *Q R L"]
    agents: Agents | None = None

    def at(self, steps: slice) -> Candidates:
        """Those of some steps of trajectories [B, Q, H, ...]."""
        return each_part(self, lambda part: part[:, :, steps])


def line_size(spec: CandidateSpec) -> int:
    """L: numbers that are read of a line."""
    return len(range(0, spec.points, STRIDE)) * (spec.features + 1)


def read_lines(
    lines: Float[Tensor, "*B P"], valid: Shaped[Tensor, "*B V"], spec: CandidateSpec
) -> Float[Tensor, "*B R L"]:
    """Lines as an actor reads them: of every `STRIDE`-th point its numbers, in symlog, and whether there is one.

    Where there is none all numbers are 0, whatever stands there.

    Args:
        lines: as replay stores them and a decoder predicts them, the points of all lines in a row.
        valid: which points there are, likewise.
        spec: says how many there are.
    """
    points = lines.unflatten(-1, (spec.lines, spec.points, spec.features))[..., ::STRIDE, :]
    there = valid.unflatten(-1, (spec.lines, spec.points))[..., ::STRIDE].bool()
    points = symlog(points.float().masked_fill(~there[..., None], 0.0))
    return torch.cat((points, there[..., None].float()), -1).flatten(-2)


def _nobody(number: int, members: Tensor) -> Tensor:
    """Lines as they are, where nobody is known to be around."""
    return members


class CandidateActor(Actor):
    """Scores candidates by the lines that they follow and the latent.

    Lines, and that there is none to follow, attend to one another, and to everybody around where that is known; each
    then scores all of its modes. The modes of a line differ by nothing but their number, so that they need no vectors
    of their own.
    """

    def __init__(
        self, feat_size: int, spec: CandidateSpec, *, units: int, layers: int, unimix: float, agent_features: int = 0
    ) -> None:
        """Build the networks.

        Args:
            feat_size: of the latent feature.
            spec: what there is to choose among.
            units: width of each line's vector, and of hidden layers.
            layers: rounds of attention.
            unimix: share of a uniform distribution over legal candidates.
            agent_features: G, what views tell of everybody around; 0: nothing.

        Raises:
            UserError: the units cannot be shared out among the heads of attention.
        """
        super().__init__()
        self.latent_size, self.unimix, self.spec = feat_size, unimix, spec
        # Without tables, no step's gradient is larger than the step.
        self.learns_in_roll_out = True
        self.latent = Normed(feat_size, units)
        self.line = MLP(line_size(spec), units, units=units, layers=1)
        self.no_line = nn.Parameter(0.1 * torch.randn(units, device=torch.get_default_device()))
        self.agent_features = agent_features
        if agent_features:
            self.own = MLP(agent_features, units, units=units, layers=1)
            self.agent = MLP(agent_features, units, units=units, layers=1)
            self.among = nn.ModuleList(Gathering(units, heads=HEADS) for _ in range(layers))
        self.attend = nn.ModuleList(Gathering(units, heads=HEADS) for _ in range(layers))
        self.hidden = nn.ModuleList(Hidden(units, hidden=2 * units) for _ in range(layers))
        self.norm = nn.RMSNorm(units, eps=1e-4)
        # It begins close to uniform, as `MaskedActor` does.
        self.modes = MLP(units, spec.modes, units=units, layers=1, output_scale=0.01)
        self.alone = MLP(units, 1, units=units, layers=1, output_scale=0.01)

    def scores(self, feat: Feat | None, tables: Any, view: Candidates) -> Float[Tensor, "B *Q A"]:
        assert feat is not None, "this actor reads the latent"
        latent = self.latent(feat)
        lead = view.action_mask.shape[:-1]
        followed = view.action_mask[..., :-1].unflatten(-1, (self.spec.lines, self.spec.modes)).any(-1)
        there = torch.cat((followed, torch.ones_like(followed[..., :1])), -1)
        shown = torch.cat((self.line(scrub(view.lines, followed)), self.no_line.expand(*lead, 1, -1)), -2)
        members = shown + latent[..., None, :]
        around: Callable[[int, Tensor], Tensor] = _nobody
        if self.agent_features:
            assert view.agents is not None, "this actor reads who is around"
            around = self._around(view.agents)
            members = members + self.own(view.agents.numbers[..., :1, :])
        members = scrub(members, there)
        for number, (attend, hidden) in enumerate(zip(self.attend, self.hidden, strict=True)):
            members = scrub(hidden(around(number, attend(members, there))), there)
        members = self.norm(members)
        return torch.cat((self.modes(members[..., :-1, :]).flatten(-2), self.alone(members[..., -1, :])), -1)

    def _around(self, agents: Agents) -> Callable[[int, Tensor], Tensor]:
        """What lets lines know, in each round, who is around."""
        numbers = scrub(agents.numbers, agents.valid)
        vectors = scrub(self.agent(numbers), agents.valid)
        return lambda number, members: self.among[number](members, agents.valid, vectors)

    def distribution(self, scores: Float[Tensor, "B *Q A"], view: Candidates) -> OneHotDist:
        return OneHotDist(scores, mask=view.action_mask, unimix=self.unimix)

    def takes(self, num_nodes: int) -> bool:
        return self.spec.lines * self.spec.modes + 1 == num_nodes
