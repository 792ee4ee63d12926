"""What tests of the planner share: a small network, and rows of made-up scenes in the layout of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from imitation.decoder import PlanningDecoder
from imitation.losses import Driven
from imitation.network import PlanningNetwork
from imitation.scene_encoder import SceneEncoder

LINES, MODES, POINTS, AGENTS, ROADS = 3, 2, 4, 5, 4
CANDIDATES = LINES * MODES + 1
WIDTH = 8


def make_network(seed: int = 0) -> PlanningNetwork:
    """Small, with scores and trajectories that are not the zeros that training begins with."""
    torch.manual_seed(seed)
    scene = SceneEncoder(width=WIDTH, layers=1, point_layers=1, heads=2, hidden=16)
    decoder = PlanningDecoder(width=WIDTH, layers=2, heads=2, hidden=16, modes=MODES, points=POINTS)
    for mlp in (decoder.trajectory, decoder.score):
        torch.nn.init.normal_(mlp.output.weight)
    return PlanningNetwork(scene=scene, decoder=decoder)


def features(lines: list[int], *, padding: float = 0.0, seed: int = 1) -> dict[str, Tensor]:
    """A row for each entry of `lines`, with so many lines; `padding` stands where nothing is."""
    draws, rows = torch.Generator().manual_seed(seed), len(lines)

    def some(*shape: int) -> Tensor:
        return 5 * torch.randn(rows, *shape, generator=draws)

    def valid(*shape: int) -> Tensor:
        return torch.rand(rows, *shape, generator=draws) < 0.6

    present = torch.arange(LINES) < torch.tensor(lines)[:, None]
    lines_valid = present[..., None] & (torch.arange(9) < 7)
    action_mask = torch.cat((present.repeat_interleave(MODES, 1), torch.ones(rows, 1, dtype=torch.bool)), 1)
    made = {
        "ego": some(6),
        "agents": some(AGENTS, 3, 8),
        "agents_valid": valid(AGENTS, 3),
        "roads": some(ROADS, 6, 5),
        "roads_valid": valid(ROADS, 6),
        "lines": some(LINES, 9, 5),
        "lines_valid": lines_valid,
        "candidates": some(CANDIDATES, POINTS, 3),
        "action_mask": action_mask,
    }
    for name in ("agents", "roads", "lines"):
        made[name] = made[name].masked_fill(~made[f"{name}_valid"][..., None], padding)
    made["candidates"] = made["candidates"].masked_fill(~action_mask[..., None, None], padding)
    return made


def driven(rows: dict[str, Tensor], *, padding: float = 0.0, seed: int = 2) -> Driven:
    """What an expert did there: a legal candidate, and some future, of the last row none."""
    draws, mask = torch.Generator().manual_seed(seed), rows["action_mask"]
    action = torch.multinomial(mask.float(), 1, generator=draws)[:, 0]
    future = torch.randn(len(mask), POINTS, 3, generator=draws)
    future_valid = torch.arange(POINTS) < torch.randint(1, POINTS + 1, (len(mask), 1), generator=draws)
    future_valid[-1] = False
    return Driven(action, future.masked_fill(~future_valid[..., None], padding), future_valid)
