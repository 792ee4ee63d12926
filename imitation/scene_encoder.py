"""What stands around an ego as vectors: itself, other agents, the map, and the lines that it may follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from parts.sets import Gathering, Hidden, PointsEncoder, scrub

# Features (driving/features.py) are divided by these, so that they are of the size of 1: metres, m/s, radians.
EGO_UNITS = (10.0, 2.0, 0.3, 5.0, 2.0, 15.0)
AGENT_UNITS = (20.0, 20.0, 1.0, 1.0, 10.0, 10.0, 5.0, 2.0)
ROAD_UNITS = (20.0, 20.0, 1.0, 1.0, 15.0)
LINE_UNITS = (20.0, 20.0, 1.0, 1.0, 1.0)
# Every so many points of a line are read: they lie 2 m apart, and lanes bend less than that.
LINE_STRIDE = 3


class Scene(NamedTuple):
    """B scenes: the ego, everything that queries may gather from, and the lines, each with a vector of E numbers."""

    ego: Float[Tensor, "B E"]
    tokens: Float[Tensor, "B S E"]
    tokens_valid: Bool[Tensor, "B S"]
    lines: Float[Tensor, "B R E"]
    lines_valid: Bool[Tensor, "B R"]


class SceneEncoder(nn.Module):
    """From the features of a row to a `Scene`: points become vectors, and those attend to one another.

    What is padding is 0 everywhere, and has gradient 0 whatever stands there. Points carry where they lie, so sets are
    in no order: agents, polylines and lines may change places.
    """

    def __init__(self, *, width: int, layers: int, point_layers: int, heads: int, hidden: int) -> None:
        """Make the layers.

        Args:
            width: E, of every vector.
            layers: of attention among all that there is.
            point_layers: of attention among the points of one agent, polyline or line; 0: each is read by itself.
            heads: of attention.
            hidden: units of hidden layers.
        """
        super().__init__()

        def points(features: int) -> PointsEncoder:
            return PointsEncoder(features, width=width, layers=point_layers, heads=heads, hidden=hidden)

        self.ego = nn.Sequential(nn.Linear(len(EGO_UNITS), width), Hidden(width, hidden=hidden))
        # Moments of an agent's track are points of a set, so each says when it was.
        self.agents = points(len(AGENT_UNITS) + 1)
        self.roads = points(len(ROAD_UNITS))
        self.lines = points(len(LINE_UNITS))
        self.gather = nn.ModuleList(Gathering(width, heads=heads) for _ in range(layers))
        self.hidden = nn.ModuleList(Hidden(width, hidden=hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-4)

    def forward(self, features: Mapping[str, Tensor]) -> Scene:
        """Read `ego`, `agents`, `roads` and `lines`, each but the first with its `..._valid`."""
        ego = self.ego(scaled(features["ego"], EGO_UNITS))
        agents, agents_valid = self._agents(features["agents"], features["agents_valid"])
        roads_valid = features["roads_valid"]
        roads = self.roads(scaled(features["roads"], ROAD_UNITS), roads_valid)
        lines_valid = features["lines_valid"]
        stride = slice(None, None, LINE_STRIDE)
        lines = self.lines(scaled(features["lines"][:, :, stride], LINE_UNITS), lines_valid[:, :, stride])
        here = torch.ones_like(lines_valid[:, :1, 0])
        tokens = torch.cat((ego[:, None], agents, roads, lines), 1)
        valid = torch.cat((here, agents_valid, roads_valid.any(-1), lines_valid.any(-1)), 1)
        for gather, hidden in zip(self.gather, self.hidden, strict=True):
            tokens = scrub(hidden(gather(tokens, valid)), valid)
        count = lines.shape[1]
        return Scene(
            ego=tokens[:, 0],
            tokens=self.norm(tokens),
            tokens_valid=valid,
            lines=tokens[:, -count:],
            lines_valid=lines_valid.any(-1),
        )

    def _agents(
        self, agents: Float[Tensor, "B A H F"], valid: Bool[Tensor, "B A H"]
    ) -> tuple[Float[Tensor, "B A E"], Bool[Tensor, "B A"]]:
        moments = torch.linspace(-1, 0, agents.shape[2], device=agents.device)
        when = moments[:, None].expand(*agents.shape[:-1], 1)
        return self.agents(torch.cat((scaled(agents, AGENT_UNITS), when), -1), valid), valid.any(-1)


def scaled(features: Float[Tensor, "*B F"], units: tuple[float, ...]) -> Float[Tensor, "*B F"]:
    """Features in units of the network's own."""
    return features / torch.tensor(units, device=features.device)
