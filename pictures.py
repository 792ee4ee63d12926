"""What a Dreamer imagines, drawn: a greedy tour of a routing instance, or an episode in open loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from envs.drawing import draw_open_loop, draw_tour
from envs.rules import Instance, each_part
from evaluation import Pictures
from models import ImagBehavior
from tools import uniform
from world_model import WorldModel

# Rows that an open-loop picture observes before it imagines.
OPEN_LOOP_SEEN = 8


def make_pictures(
    model: WorldModel, behavior: ImagBehavior, *, device: torch.device, reward_scale: float
) -> Pictures | None:
    """What draws the imagination of a model and its behaviour; None where there is nothing to draw.

    Of a routing task it takes an instance, of any other a replayed sequence, and it gives pictures by name.
    """

    @torch.no_grad()
    def imagined_tour(instance: Instance) -> dict[str, np.ndarray]:
        instance = each_part(instance, lambda part: part[:1].to(device))
        trajectory, reward = behavior.imagine_greedily(model, instance)
        assert trajectory.state is not None
        tour = torch.cat((trajectory.state.current[0, 0, :1], trajectory.action[0, 0, :-1]))
        title = f"imagined: length {-float(reward.sum()) / reward_scale:.3f} by the model"
        return {"imagined": draw_tour(instance.coords[0].cpu().numpy(), tour.cpu().numpy(), title=title)}

    def open_loop(sequence: dict[str, Tensor]) -> dict[str, np.ndarray]:
        length = sequence["is_first"].shape[1]
        seen = max(1, min(OPEN_LOOP_SEEN, length // 2))
        if length < seen + 1:
            return {}
        generator = torch.Generator(device).manual_seed(0)
        noise = uniform((1, length, model.rssm.stoch_size), generator)
        predicted = model.open_loop(sequence, seen=seen, noise=noise)
        return {
            f"open_loop_{name}": draw_open_loop(sequence[name][0].cpu().numpy(), value[0].cpu().numpy(), seen=seen)
            for name, value in predicted.items()
        }

    if model.rules is not None:
        return imagined_tour
    return open_loop if model.decoder is not None else None
