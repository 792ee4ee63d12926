"""The networks of a world model: the recurrent state-space model, the routing encoder and heads over nodes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from parts.actors import MaskedActor, TSPPointerActor
from parts.latents import Chosen
from parts.layers import MLP, BlockCell, DenseCell, JointCell, Normed
from parts.sets import SetEncoder
from parts.views import View, summarise
from tools import OneHotDist

__all__ = ["RSSM", "Latent", "MaskedActor", "NodeHead", "RoutingEncoder", "TSPPointerActor"]


class Latent(NamedTuple):
    """What the RSSM carries from step to step."""

    deter: Float[Tensor, "*B D"]
    stoch: Float[Tensor, "*B S K"]

    def feat(self) -> Float[Tensor, "*B F"]:
        """Both parts in one vector: what heads, actor and critic read."""
        return torch.cat((self.deter, self.stoch.flatten(-2)), -1)

    def chosen(self) -> Chosen:
        """The same by classes, where every variable of `stoch` is one-hot."""
        return Chosen(self.deter, self.stoch.argmax(-1))


class RSSM(nn.Module):
    """The recurrent state-space model with discrete latents (DreamerV3).

    `deter` is stepped deterministically; `stoch` is S categorical variables with K classes each, whose distribution
    is predicted from `deter` (the prior) or inferred from `deter` and the embedded observation (the posterior).
    Sampling noise is an argument everywhere, so that the same noise gives the same latents.
    """

    def __init__(
        self,
        action_size: int,
        embed_size: int,
        *,
        cell: Literal["block", "joint", "dense"] = "block",
        deter: int,
        stoch: int,
        classes: int,
        hidden: int,
        blocks: int,
        unimix: float,
    ) -> None:
        """Build the networks.

        Args:
            action_size: numbers in an embedded action.
            embed_size: numbers in an embedded observation.
            cell: "joint" (DreamerV3 of 2025), "block" (the same, its first layer in two parts) or "dense" (2023).
            deter: size of the deterministic state.
            stoch: categorical variables in the stochastic state.
            classes: of each of them.
            hidden: units of the layers between.
            blocks: of the block-diagonal matrices.
            unimix: share of a uniform distribution in prior and posterior.

        Raises:
            UserError: sizes that the blocks do not divide.
        """
        super().__init__()
        self.deter_size, self.stoch_size, self.classes, self.unimix = deter, stoch, classes, unimix
        self.feat_size, self.embed_size = deter + stoch * classes, embed_size
        self.cell: nn.Module
        if cell == "dense":
            self.cell = DenseCell(deter, stoch * classes, action_size, hidden=hidden)
        else:
            kind = JointCell if cell == "joint" else BlockCell
            self.cell = kind(deter, stoch * classes, action_size, hidden=hidden, blocks=blocks)
        self.prior = nn.Sequential(Normed(deter, hidden), Normed(hidden, hidden), nn.Linear(hidden, stoch * classes))
        self.posterior = nn.Sequential(Normed(deter + embed_size, hidden), nn.Linear(hidden, stoch * classes))

    def initial(self, shape: tuple[int, ...]) -> Latent:
        """The latent before the first observation: zeros."""
        weight = next(self.prior.parameters())
        return Latent(
            deter=weight.new_zeros(*shape, self.deter_size),
            stoch=weight.new_zeros(*shape, self.stoch_size, self.classes),
        )

    def recur(self, latent: Latent | Chosen, action: Float[Tensor, "B A"]) -> Float[Tensor, "B D"]:
        """The next deterministic state."""
        stoch = latent.stoch.flatten(-2) if isinstance(latent, Latent) else latent.classes
        return self.cell(latent.deter, stoch, action)

    def sample(self, logits: Float[Tensor, "*B L"], noise: Float[Tensor, "*B S"] | None) -> Float[Tensor, "*B S K"]:
        """A one-hot draw of every variable, with straight-through gradients; the mode where there is no noise."""
        dist = self.distribution(logits)
        return dist.one_hot(_drawn(dist, noise))

    def distribution(self, logits: Float[Tensor, "*B L"]) -> OneHotDist:
        """The S categorical variables that the logits stand for."""
        return OneHotDist(logits.unflatten(-1, (self.stoch_size, self.classes)), unimix=self.unimix)

    @overload
    def imagine_step(self, latent: Latent, action: Tensor, noise: Tensor | None) -> Latent: ...

    @overload
    def imagine_step(self, latent: Chosen, action: Tensor, noise: Tensor | None) -> Chosen: ...

    def imagine_step(
        self, latent: Latent | Chosen, action: Float[Tensor, "B A"], noise: Float[Tensor, "B S"] | None
    ) -> Latent | Chosen:
        """The latent after `action`, drawn from the prior, in the form that the one before it has."""
        deter = self.recur(latent, action)
        logits = self.prior(deter)
        if isinstance(latent, Chosen):
            return Chosen(deter, _drawn(self.distribution(logits), noise))
        return Latent(deter=deter, stoch=self.sample(logits, noise))

    def observe_step(
        self,
        latent: Latent,
        prev_action: Float[Tensor, "B A"],
        embed: Float[Tensor, "B E"],
        is_first: Bool[Tensor, " B"],
        noise: Float[Tensor, "B S"] | None,
    ) -> tuple[Latent, Float[Tensor, "B L"]]:
        """The latent after an observation, drawn from the posterior, and the posterior's logits.

        At `is_first` the previous latent and action count as zeros: nothing passes from one episode to the next.
        """
        # The padding is filled, since a product with 0 would let a NaN pass.
        first = is_first[:, None]
        latent = Latent(latent.deter.masked_fill(first, 0.0), latent.stoch.masked_fill(first[..., None], 0.0))
        deter = self.recur(latent, prev_action.masked_fill(first, 0.0))
        logits = self.posterior(torch.cat((deter, embed), -1))
        return Latent(deter=deter, stoch=self.sample(logits, noise)), logits

    def observe(
        self,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        noise: Float[Tensor, "B T S"],
        initial: Latent | None = None,
    ) -> tuple[Latent, OneHotDist, OneHotDist]:
        """Latents [B, T] of a sequence, with their posterior and prior.

        `initial` is the latent before the first row; None where the sequence begins in the initial state.
        """
        latent = self.initial((embed.shape[0],)) if initial is None else initial
        latents, posterior_logits = [], []
        for t in range(embed.shape[1]):
            latent, logits = self.observe_step(latent, prev_action[:, t], embed[:, t], is_first[:, t], noise[:, t])
            latents.append(latent)
            posterior_logits.append(logits)
        sequence = Latent(*(torch.stack(part, 1) for part in zip(*latents, strict=True)))
        posterior = self.distribution(torch.stack(posterior_logits, 1))
        return sequence, posterior, self.distribution(self.prior(sequence.deter))


def _drawn(dist: OneHotDist, noise: Float[Tensor, "*B S"] | None) -> Int[Tensor, "*B S"]:
    return dist.mode() if noise is None else dist.sample(noise)


class RoutingEncoder(nn.Module):
    """Encodes routing observations. Nodes are encoded once per episode; each step then only looks them up."""

    def __init__(
        self, node_features: int, *, state_features: int = 0, width: int, layers: int, heads: int, units: int
    ) -> None:
        super().__init__()
        self.nodes = SetEncoder(node_features, width=width, layers=layers, heads=heads, hidden=2 * width)
        self.step = nn.Sequential(Normed(3 * width + state_features, units), Normed(units, units))
        self.embed_size, self.node_size = units, width

    def forward(self, nodes: Float[Tensor, "B N E"], view: View) -> Float[Tensor, "B *Q U"]:
        return self.step(summarise(nodes, view))


class NodeHead(nn.Module):
    """One logit per node: how well the node's embedding fits a query drawn from the latent."""

    def __init__(self, feat_size: int, node_size: int, *, units: int) -> None:
        super().__init__()
        self.query = MLP(feat_size, node_size, units=units, layers=1)
        self.key = nn.Linear(node_size, node_size, bias=False)

    def forward(self, feat: Float[Tensor, "B *Q F"], nodes: Float[Tensor, "B N E"]) -> Float[Tensor, "B *Q N"]:
        query = self.query(feat)
        rows = query.reshape(nodes.shape[0], -1, nodes.shape[-1])
        logits = rows @ self.key(nodes).transpose(-1, -2) / math.sqrt(nodes.shape[-1])
        return logits.view(*query.shape[:-1], -1)
