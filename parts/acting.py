"""What acting sees, and what it keeps of an instance for a whole episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from envs.tasks import ACTION_MASK, ActionSpec
from parts.actors import TSPPointerActor
from parts.views import NodeSet, View
from routing.rules import Instance, Rules, each_part
from tools import OneHotDist, uniform


class Sight(NamedTuple):
    """What E environments show at once.

    Attributes:
        obs: the observations.
        is_first: where an episode begins; nothing of the episode before is used there.
        any_first: whether one begins anywhere. Environments know that without waiting for the device.
    """

    obs: dict[str, Tensor]
    is_first: Bool[Tensor, " E"]
    any_first: bool

    @classmethod
    def of(cls, obs: dict[str, Tensor], info: dict[str, Any]) -> Sight:
        """What a vector environment returned."""
        return cls(obs, info["is_first"], info["any_first"])


def random_actions(
    actions: ActionSpec, noise: Float[Tensor, "E *A"], mask: Bool[Tensor, "E N"] | None
) -> Shaped[Tensor, "E *A"]:
    """Actions drawn uniformly, of the legal ones where there is a mask.

    Args:
        actions: what can be done.
        noise: uniform in [0, 1).
        mask: True where an action is legal.
    """
    if actions.kind == "continuous":
        return 2 * noise - 1
    if actions.kind == "multi_discrete":
        return (noise * torch.tensor(actions.sizes, device=noise.device)).long()
    logits = torch.zeros((len(noise), actions.sizes[0]), device=noise.device)
    return OneHotDist(logits, mask=mask).sample(noise)


def encode_static(
    kept: dict[str, Tensor],
    instance: Instance,
    sight: Sight,
    *,
    rules: type[Rules],
    encode: Callable[[Instance], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What acting needs of each environment's instance for a whole episode: kept, and encoded anew where one begins.

    Args:
        kept: from the last call; empty before the first.
        instance: what every environment shows.
        sight: says where an episode begins.
        rules: say whether all episodes begin together.
        encode: gives the tensors, [E, ...] each.
    """
    if not kept:
        return encode(instance)
    is_first = sight.is_first
    if not sight.any_first:
        return kept
    if rules.fixed_length or is_first.device.type != "cpu":
        # In lockstep, all begin where one does. A GPU encodes all rows in the time of a few, and asking it which ones
        # begin would wait for it.
        fresh = encode(instance)
        began = {name: is_first.view(-1, *[1] * (value.ndim - 1)) for name, value in fresh.items()}
        return {name: torch.where(began[name], value, kept[name]) for name, value in fresh.items()}
    rows = is_first.nonzero()[:, 0]
    fresh = encode(each_part(instance, lambda part: part[rows]))
    return {name: kept[name].index_copy(0, rows, value) for name, value in fresh.items()}


def next_node(
    policy: TSPPointerActor,
    rules: type[Rules],
    sight: Sight,
    static: dict[str, Tensor],
    *,
    generator: torch.Generator | None,
) -> tuple[Int[Tensor, " E"], dict[str, Tensor]]:
    """Where a pointer that sees nodes alone moves on to, and what it keeps of the instances for a whole episode.

    Args:
        policy: points.
        rules: of the problem.
        sight: what E environments show.
        static: what it kept; empty before the first step.
        generator: draws the nodes; None takes the likeliest.
    """

    def encode(instance: Instance) -> dict[str, Tensor]:
        return policy.tables(NodeSet.of(rules, instance)).named()

    instance, state = rules.restore(sight.obs)
    static = encode_static(static, instance, sight, rules=rules, encode=encode)
    states = each_part(state, lambda part: part[:, None])
    view = View.of(rules, states, sight.obs[ACTION_MASK][:, None])
    noise = None if generator is None else uniform((*sight.is_first.shape, 1), generator)
    return policy.draw(None, policy.restore(static), view, noise)[0][:, 0], static
