"""What acting keeps of an instance for a whole episode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from routing.rules import Instance, Rules, each_part


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
