"""How likely the actions of trajectories were: some of them at a time where their distributions would fill memory."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from imagining.world_model import Metrics
from parts.actors import Actor
from routing.rules import each_part
from system.ranks import here

# Scores that are looked at together. A distribution and its gradient take some twelve numbers for each.
TOGETHER = 2**20


class Chances(NamedTuple):
    """Of every action [B, Q, H] its log-probability, and its distribution's entropy; what the scores cost; metrics."""

    log_prob: Float[Tensor, "B Q H"]
    entropy: Float[Tensor, "B Q H"]
    penalty: Float[Tensor, ""]
    metrics: Metrics


def chances_of(
    action: Shaped[Tensor, "B Q H *A"],
    scores: Float[Tensor, "B Q H S"],
    actor: Actor,
    view: Any,
    *,
    counts: Bool[Tensor, "B Q H"],
) -> Chances:
    """The chances of `action` under the distributions that `scores` stand for.

    Where there are many scores, some trajectories are computed at a time, and again on the way back.

    Args:
        action: what was drawn.
        scores: with the graph to learn by.
        actor: makes distributions of them.
        view: of the states, [B, Q, H].
        counts: where an action is taken at all; what comes after an episode's end costs nothing.
    """
    if view.action_mask is None:
        return _chances(action, scores, actor, view, None)
    counted = view.action_mask & counts[..., None]
    chances = _chances_in_parts(action, scores, actor, view, counted)
    # What scores cost is a mean over legal ones.
    return chances._replace(penalty=here().balance(counted)(chances.penalty))


def _chances_in_parts(
    action: Shaped[Tensor, "B Q H *A"],
    scores: Float[Tensor, "B Q H S"],
    actor: Actor,
    view: Any,
    counted: Bool[Tensor, "B Q H S"],
) -> Chances:
    """All chances at once, or those of some trajectories at a time."""
    if scores.numel() <= TOGETHER or torch.compiler.is_compiling():
        return _chances(action, scores, actor, view, counted)
    (batch, tours), size = scores.shape[:2], scores[0, 0].numel()
    length = max(1, min(tours, TOGETHER // size))
    parts: list[Chances] = []
    legal: list[Tensor] = []
    for row in range(batch):
        for tour in range(0, tours, length):
            at = (slice(row, row + 1), slice(tour, tour + length))
            part = each_part(view, itemgetter(at))
            parts.append(checkpoint(_chances, action[at], scores[at], actor, part, counted[at], use_reentrant=False))
            legal.append(counted[at].sum())
    share = torch.stack(legal) / torch.stack(legal).sum().clamp(min=1)
    return Chances(
        log_prob=torch.cat([part.log_prob.flatten(0, 1) for part in parts]).view(action.shape),
        entropy=torch.cat([part.entropy.flatten(0, 1) for part in parts]).view(action.shape),
        penalty=(torch.stack([part.penalty for part in parts]) * share).sum(),
        metrics={
            name: (torch.stack([part.metrics[name] for part in parts]) * share).sum() for name in parts[0].metrics
        },
    )


def legal_actions(mask: Bool[Tensor, "B Q H N"]) -> Float[Tensor, "B Q H"]:
    """How many actions are legal in each state."""
    # Adding up flags makes a number of eight bytes of each of them first.
    return (
        torch.stack([instance.sum(-1) for instance in mask]).float()
        if mask.numel() > TOGETHER
        else mask.sum(-1).float()
    )


def _chances(
    action: Shaped[Tensor, "B Q H *A"],
    scores: Float[Tensor, "B Q H S"],
    actor: Actor,
    view: Any,
    counted: Bool[Tensor, "B Q H S"] | None,
) -> Chances:
    dist = actor.distribution(scores, view)
    penalty, metrics = actor.penalty(scores, view if counted is None else view._replace(action_mask=counted))
    return Chances(dist.log_prob(action), dist.entropy(), penalty, metrics)
