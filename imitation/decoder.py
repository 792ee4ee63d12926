"""From a scene to a trajectory and a score for each candidate: reference lines by modes, and one without a line."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from driving.scene import STEP
from imitation.scene_encoder import Gathering, Hidden, Scene, scaled
from parts.layers import MLP
from parts.sets import scrub
from tools import OneHotDist

# Metres, metres and radians that candidates are divided by where they are read.
CANDIDATE_UNITS = (20.0, 20.0, 1.0)
# How far a network's output of 1 leads away from a candidate in each second: metres, metres, radians.
RESIDUAL_UNITS = (2.0, 0.5, 0.1)


class Plans(NamedTuple):
    """What a planner makes of B scenes: for each of C candidates a trajectory in the ego's frame and a score.

    Candidate r * M + m follows line r in mode m; the last follows none, and is always legal. T points, one each half
    second: x, y in metres, heading in radians.
    """

    trajectories: Float[Tensor, "B C T 3"]
    scores: Float[Tensor, "B C"]
    action_mask: Bool[Tensor, "B C"]

    def distribution(self) -> OneHotDist:
        """Over the legal candidates."""
        return OneHotDist(self.scores, mask=self.action_mask)


class DecoderLayer(nn.Module):
    """One round in which candidates learn of each other and of the scene.

    Those of one mode attend along lines, those of one line along modes, and all to what is in the scene.
    """

    def __init__(self, width: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        self.along_lines = Gathering(width, heads=heads)
        self.along_modes = Gathering(width, heads=heads)
        self.to_scene = Gathering(width, heads=heads)
        self.hidden = Hidden(width, hidden=hidden)

    def forward(
        self, queries: Float[Tensor, "B C E"], mask: Bool[Tensor, "B C"], scene: Scene
    ) -> Float[Tensor, "B C E"]:
        lines = scene.lines.shape[1]
        # Candidates as a table [B, R, M, E]: its mask is turned with it, and neither is ever repeated.
        table, legal = (each[:, :-1].unflatten(1, (lines, -1)) for each in (queries, mask))
        table = self.along_lines(table.transpose(1, 2), legal.transpose(1, 2)).transpose(1, 2)
        table = self.along_modes(table, legal)
        queries = torch.cat((table.flatten(1, 2), queries[:, -1:]), 1)
        queries = self.hidden(self.to_scene(queries, scene.tokens_valid, scene.tokens))
        return scrub(queries, mask)


class PlanningDecoder(nn.Module):
    """A trajectory and a score for each candidate; where there is no line, for the one that follows none.

    Candidates that are illegal are 0 throughout, and have gradient 0.
    """

    def __init__(self, *, width: int, layers: int, heads: int, hidden: int, modes: int, points: int) -> None:
        """Make the layers.

        Args:
            width: E, of every vector.
            layers: rounds of attention.
            heads: of attention.
            hidden: units of hidden layers.
            modes: M, of each line.
            points: T, of a trajectory.
        """
        super().__init__()
        self.modes, self.points = modes, points
        # What tells candidates apart: the mode, or that there is no line.
        self.mode = nn.Parameter(torch.randn(modes + 1, width, device=torch.get_default_device()) * 0.1)
        self.candidate = nn.Linear(3 * points, width, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(width, heads=heads, hidden=hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-4)
        self.trajectory = MLP(width, 3 * points, units=hidden, layers=1, zero_output=True)
        self.score = MLP(width, 1, units=hidden, layers=1, zero_output=True)

    def forward(self, scene: Scene, candidates: Float[Tensor, "B C T 3"], action_mask: Bool[Tensor, "B C"]) -> Plans:
        """Score the candidates, and bend each towards what would be driven.

        Args:
            scene: what is there.
            candidates: by kinematics alone, in the ego's frame; index r * M + m, and the last without a line.
            action_mask: which of them are legal.
        """
        lines = scene.lines.shape[1]
        count = lines * self.modes + 1
        assert action_mask.shape[1] == count, f"{lines} lines of {self.modes} modes and one without are {count}"
        candidates = candidates.masked_fill(~action_mask[..., None, None], 0.0)
        queries = scrub(self._queries(scene, candidates), action_mask)
        for layer in self.layers:
            queries = layer(queries, action_mask, scene)
        queries = self.norm(queries)
        residual = self.trajectory(queries).unflatten(-1, (self.points, 3))
        seconds = STEP * torch.arange(1, self.points + 1, device=residual.device)
        reach = seconds[:, None] * torch.tensor(RESIDUAL_UNITS, device=residual.device)
        trajectories = (candidates + residual * reach).masked_fill(~action_mask[..., None, None], 0.0)
        return Plans(trajectories, self.score(queries).squeeze(-1), action_mask)

    def _queries(self, scene: Scene, candidates: Float[Tensor, "B C T 3"]) -> Float[Tensor, "B C E"]:
        followed = scene.lines[:, :, None] + self.mode[:-1]
        free = self.mode[-1].expand(followed.shape[0], 1, -1)
        shown = self.candidate(scaled(candidates, CANDIDATE_UNITS).flatten(2))
        return torch.cat((followed.flatten(1, 2), free), 1) + shown + scene.ego[:, None]
