"""What networks see beside the latent: of a state, and of the nodes of an instance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from parts.sets import masked_mean
from routing.rules import Instance, Rules, State


class View(NamedTuple):
    """What a network may see of a state beside the latent, of any number of states for each of B instances.

    A task with masked actions shows its mask; routing shows where a tour began and where it stands too, and
    `features` of the state where the problem has any. `first` may have size 1 where all the states of a trajectory
    share it.
    """

    action_mask: Bool[Tensor, "B *Q N"] | None
    first: Int[Tensor, "B *P"] | None = None
    current: Int[Tensor, "B *Q"] | None = None
    features: Float[Tensor, "B *Q X"] | None = None

    @classmethod
    def of(cls, rules: type[Rules], state: State, action_mask: Bool[Tensor, "B *Q N"]) -> View:
        """What routing shows of a state under a mask."""
        return cls(action_mask, first=state.first, current=state.current, features=rules.state_features(state))

    def at(self, steps: slice) -> View:
        """Those of some steps of trajectories [B, Q, H, ...]; the first node, which all steps share, once."""
        mask, first, current, features = (None if part is None else part[:, :, steps] for part in self)
        return View(mask, None if first is None else first[:, :, :1], current, features)


class NodeSet(NamedTuple):
    """What networks see of the nodes of B instances; actor and critic make tables of it, once for many states.

    Attributes:
        features: of each node.
        valid: False for nodes that are padding; None where none are.
        belief: what is believed of hidden costs; None where nothing is hidden.
        moves: the rewards that are expected of every move; None where nobody is shown them.
        costs: what every move costs, where observations show that; None where they don't.
    """

    features: Float[Tensor, "B N F"]
    valid: Bool[Tensor, "B N"] | None
    belief: Float[Tensor, "B L"] | None = None
    moves: Float[Tensor, "B N N"] | None = None
    costs: Float[Tensor, "B N N"] | None = None

    @classmethod
    def of(cls, rules: type[Rules], instance: Instance) -> NodeSet:
        """All that instances show."""
        return cls(rules.node_features(instance), instance.valid, costs=rules.shown_costs(instance))


def take_nodes(nodes: Shaped[Tensor, "B N E"], index: Int[Tensor, "B *Q"]) -> Shaped[Tensor, "B *Q E"]:
    """The rows of `nodes` that `index` names, by one copy of rows."""
    offset = torch.arange(nodes.shape[0], device=nodes.device) * nodes.shape[1]
    flat = (index + offset.view(-1, *[1] * (index.ndim - 1))).flatten()
    return nodes.flatten(0, 1).index_select(0, flat).view(*index.shape, nodes.shape[-1])


def summarise(nodes: Float[Tensor, "B N E"], view: View) -> Float[Tensor, "B *Q C"]:
    """A routing state as one vector: current node, first node, the mean of the nodes open to it, and its features."""
    assert view.current is not None and view.first is not None, "only routing states stand at a node"
    assert view.action_mask is not None, "routing masks its actions"
    current = take_nodes(nodes, view.current)
    first = take_nodes(nodes, view.first).expand_as(current)
    parts = [current, first, masked_mean(nodes, view.action_mask)]
    return torch.cat(parts if view.features is None else [*parts, view.features], -1)
