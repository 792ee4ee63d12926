"""What a Dreamer imagines, drawn: a greedy tour of a routing instance, or an episode in open loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imagining.behavior import ImagBehavior
from imagining.imagination import Imagination
from imagining.observation_imagination import ObservationImagination
from imagining.routing_imagination import RoutingImagination
from routing.drawing import draw_open_loop, draw_tour
from routing.rules import Instance, each_part
from tools import uniform
from training.evaluation import Pictures

# Rows that an open-loop picture observes before it imagines.
OPEN_LOOP_SEEN = 8


def make_pictures(
    imagination: Imagination, behavior: ImagBehavior, *, device: torch.device, reward_scale: float
) -> Pictures | None:
    """What draws the imagination of a behaviour; None where there is nothing to draw.

    Of a routing task it takes an instance, of any other a replayed sequence, and it gives pictures by name.
    """

    @torch.no_grad()
    def imagined_tour(instance: Instance) -> dict[str, np.ndarray]:
        assert isinstance(imagination, RoutingImagination)
        instance = each_part(instance, lambda part: part[:1].to(device))
        greedy = imagination.imagine_greedily(behavior.actor, instance, needs_latent=behavior.needs_latent)
        title = f"imagined: length {-float(greedy.reward.sum()) / reward_scale:.3f} by the model"
        coords, tour = instance.coords[0].cpu().numpy(), greedy.tours[0].cpu().numpy()
        return {"imagined": draw_tour(coords, tour, title=title)}

    def open_loop(sequence: dict[str, Tensor]) -> dict[str, np.ndarray]:
        assert isinstance(imagination, ObservationImagination)
        model, length = imagination.model, sequence["is_first"].shape[1]
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

    if isinstance(imagination, RoutingImagination):
        return imagined_tour
    assert isinstance(imagination, ObservationImagination)
    return open_loop if imagination.model.decoder is not None else None
