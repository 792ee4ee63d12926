"""What networks see of a state beside the latent, and what acting keeps of an instance for a whole episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from envs.rules import Instance, Rules, State, each_part
from sets import masked_mean


class View(NamedTuple):
    """What a network may see beside the latent, of any number of states for each of B instances.

    A task with masked actions shows its mask; routing shows where a tour began and where it stands too, and
    `features` of the state where the problem has any. `first` may have size 1 where all the states of a trajectory
    share it.
    """

    action_mask: Bool[Tensor, "B *Q N"]
    first: Int[Tensor, "B *P"] | None = None
    current: Int[Tensor, "B *Q"] | None = None
    features: Float[Tensor, "B *Q X"] | None = None

    @classmethod
    def of(cls, rules: type[Rules], state: State, action_mask: Bool[Tensor, "B *Q N"]) -> View:
        """What routing shows of a state under a mask."""
        return cls(action_mask, first=state.first, current=state.current, features=rules.state_features(state))


def take_nodes(nodes: Float[Tensor, "B N E"], index: Int[Tensor, "B *Q"]) -> Float[Tensor, "B *Q E"]:
    """The rows of `nodes` that `index` names, by one copy of rows."""
    offset = torch.arange(nodes.shape[0], device=nodes.device) * nodes.shape[1]
    flat = (index + offset.view(-1, *[1] * (index.ndim - 1))).flatten()
    return nodes.flatten(0, 1).index_select(0, flat).view(*index.shape, nodes.shape[-1])


def summarise(nodes: Float[Tensor, "B N E"], view: View) -> Float[Tensor, "B *Q C"]:
    """A routing state as one vector: current node, first node, the mean of the nodes open to it, and its features."""
    assert view.current is not None and view.first is not None, "only routing states stand at a node"
    current = take_nodes(nodes, view.current)
    first = take_nodes(nodes, view.first).expand_as(current)
    parts = [current, first, masked_mean(nodes, view.action_mask)]
    return torch.cat(parts if view.features is None else [*parts, view.features], -1)


def encode_static(
    kept: dict[str, Tensor],
    instance: Instance,
    is_first: Bool[Tensor, " E"],
    *,
    any_first: bool,
    rules: type[Rules],
    encode: Callable[[Instance], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What acting needs of each environment's instance for a whole episode: kept, and encoded anew where one begins.

    Args:
        kept: from the last call; empty before the first.
        instance: what every environment shows.
        is_first: where an episode begins.
        any_first: whether one does anywhere.
        rules: say whether all episodes begin together.
        encode: gives the tensors, [E, ...] each.
    """
    if not kept:
        return encode(instance)
    if not any_first:
        return kept
    if rules.fixed_length or is_first.device.type != "cpu":
        # In lockstep: if one begins, all do. And a GPU encodes all rows in the time of a few, where asking which ones
        # would be to wait for it.
        fresh = encode(instance)
        began = {name: is_first.view(-1, *[1] * (value.ndim - 1)) for name, value in fresh.items()}
        return {name: torch.where(began[name], value, kept[name]) for name, value in fresh.items()}
    rows = is_first.nonzero()[:, 0]
    fresh = encode(each_part(instance, lambda part: part[rows]))
    return {name: kept[name].index_copy(0, rows, value) for name, value in fresh.items()}
