"""Critics: the return to be expected from a state, as a symexp two-hot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from parts.latents import Chosen, Feat
from parts.layers import MLP
from parts.sets import SetEncoder, masked_share
from parts.views import NodeSet, View, summarise
from tools import SymexpTwoHot, symexp_bins


class NodeTables(NamedTuple):
    """A critic's own embeddings of each instance's nodes; those that are not `valid` are padding."""

    nodes: Float[Tensor, "B N E"]
    valid: Bool[Tensor, "B N"] | None


class Critic(nn.Module, ABC):
    """What returns to expect.

    Attributes:
        latent_size: numbers that it reads of the latent feature; 0: none.
    """

    bins: Tensor
    latent_size: int

    def _build(self, inputs: int, *, units: int, layers: int, bins: int) -> None:
        self.mlp = MLP(inputs, bins, units=units, layers=layers, zero_output=True)
        self.register_buffer("bins", symexp_bins(bins, device=torch.get_default_device()))

    @abstractmethod
    def tables(self, nodes: NodeSet | None) -> NodeTables | None:
        """What it needs of the nodes of B instances; None where it sees none."""

    @abstractmethod
    def forward(self, feat: Feat | None, tables: NodeTables | None, view: Any) -> SymexpTwoHot:
        """The distribution over returns."""


class LatentCritic(Critic):
    """The return to be expected from a latent."""

    def __init__(self, feat_size: int, *, units: int, layers: int, bins: int) -> None:
        super().__init__()
        self.latent_size = feat_size
        self._build(feat_size, units=units, layers=layers, bins=bins)

    def tables(self, nodes: NodeSet | None) -> None:
        return None

    def forward(self, feat: Feat | None, tables: NodeTables | None, view: Any) -> SymexpTwoHot:
        assert feat is not None, "this critic reads the latent"
        # Some steps of a trajectory lie scattered in memory: one copy is cheaper than products of scattered numbers.
        return SymexpTwoHot(self.mlp(feat.contiguous()), self.bins)


class NodeCritic(Critic):
    """The return to be expected from a routing state itself and, if `feat_size` is not 0, a latent beside it."""

    def __init__(
        self, feat_size: int, node_features: int, *, state_features: int = 0, units: int, layers: int, bins: int
    ) -> None:
        super().__init__()
        self.latent_size = feat_size
        self.nodes = SetEncoder(node_features, width=units, layers=layers, heads=4, hidden=2 * units)
        self._build(feat_size + 3 * units + state_features + 1, units=units, layers=layers, bins=bins)

    def tables(self, nodes: NodeSet | None) -> NodeTables:
        assert nodes is not None, "this critic sees nodes"
        return NodeTables(self.nodes(nodes.features, nodes.valid), nodes.valid)

    def forward(self, feat: Feat | None, tables: NodeTables | None, view: View) -> SymexpTwoHot:
        assert tables is not None and view.action_mask is not None
        assert not isinstance(feat, Chosen), "beside nodes, latents are read as numbers"
        inputs = [] if feat is None else [feat]
        open_share = masked_share(view.action_mask, tables.valid)[..., None]
        inputs += [summarise(tables.nodes, view), open_share]
        return SymexpTwoHot(self.mlp(torch.cat(inputs, -1)), self.bins)
