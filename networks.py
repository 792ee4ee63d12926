"""The networks: the recurrent state-space model, the routing encoder, heads, actors and the critic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from config import UserError
from envs.tasks import ActionSpec
from layers import MLP, BlockCell, DenseCell, Normed
from sets import SetEncoder, masked_share, scrub
from tools import LOGIT_FLOOR, BoundedNormal, MultiOneHot, OneHotDist, SymexpTwoHot, symexp_bins
from views import View, summarise, take_nodes

# Of the predicted rewards in a pointer's scores, before it learns better: enough to prefer what is cheap.
MOVES_WEIGHT = 0.5
# tanh(4) is 0.9993: beyond, a logit is its clip and hardly learns.
SATURATED = 4.0
SATURATION_PENALTY = 0.01

ActionDist = OneHotDist | MultiOneHot | BoundedNormal


class Latent(NamedTuple):
    """What the RSSM carries from step to step."""

    deter: Float[Tensor, "*B D"]
    stoch: Float[Tensor, "*B S K"]

    def feat(self) -> Float[Tensor, "*B F"]:
        """Both parts in one vector: what heads, actor and critic read."""
        return torch.cat((self.deter, self.stoch.flatten(-2)), -1)


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
        cell: str = "block",
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
            cell: "block" (2025) or "dense" (2023).
            deter: size of the deterministic state.
            stoch: categorical variables in the stochastic state.
            classes: of each of them.
            hidden: units of the layers between.
            blocks: of the block-diagonal matrices.
            unimix: share of a uniform distribution in prior and posterior.

        Raises:
            UserError: an unknown cell, or sizes that the blocks do not divide.
        """
        super().__init__()
        if cell not in ("block", "dense"):
            raise UserError(f"rssm.cell is {cell!r}; choose block or dense")
        self.deter_size, self.stoch_size, self.classes, self.unimix = deter, stoch, classes, unimix
        self.feat_size = deter + stoch * classes
        self.cell: nn.Module
        if cell == "block":
            self.cell = BlockCell(deter, stoch * classes, action_size, hidden=hidden, blocks=blocks)
        else:
            self.cell = DenseCell(deter, stoch * classes, action_size, hidden=hidden)
        self.prior = nn.Sequential(Normed(deter, hidden), Normed(hidden, hidden), nn.Linear(hidden, stoch * classes))
        self.posterior = nn.Sequential(Normed(deter + embed_size, hidden), nn.Linear(hidden, stoch * classes))

    def initial(self, shape: tuple[int, ...]) -> Latent:
        """The latent before the first observation: zeros."""
        weight = next(self.prior.parameters())
        return Latent(
            deter=weight.new_zeros(*shape, self.deter_size),
            stoch=weight.new_zeros(*shape, self.stoch_size, self.classes),
        )

    def recur(self, latent: Latent, action: Float[Tensor, "B A"]) -> Float[Tensor, "B D"]:
        """The next deterministic state."""
        return self.cell(latent.deter, latent.stoch.flatten(-2), action)

    def sample(self, logits: Float[Tensor, "*B L"], noise: Float[Tensor, "*B S"] | None) -> Float[Tensor, "*B S K"]:
        """A one-hot draw of every variable, with straight-through gradients; the mode where there is no noise."""
        dist = self.distribution(logits)
        return dist.one_hot(dist.mode() if noise is None else dist.sample(noise))

    def distribution(self, logits: Float[Tensor, "*B L"]) -> OneHotDist:
        """The S categorical variables that the logits stand for."""
        return OneHotDist(logits.unflatten(-1, (self.stoch_size, self.classes)), unimix=self.unimix)

    def imagine_step(self, latent: Latent, action: Float[Tensor, "B A"], noise: Float[Tensor, "B S"] | None) -> Latent:
        """The latent after `action`, drawn from the prior."""
        deter = self.recur(latent, action)
        return Latent(deter=deter, stoch=self.sample(self.prior(deter), noise))

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
        # Filled rather than multiplied by 0, which would let a NaN pass.
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


class PointerTables(NamedTuple):
    """All that a pointer actor needs of B instances, so that a decision is a few look-ups and one product.

    The glimpse's attention scores are linear in the query, and the query is a sum over the current node, the first
    node, the state's features and the latent. So each part's scores are computed once per instance, and a decision
    adds up rows.
    """

    current: Float[Tensor, "B N G"]
    first: Float[Tensor, "B N G"]
    direct: Float[Tensor, "B N N"]
    features: Float[Tensor, "B X G"] | None
    latent: Float[Tensor, "B J G"] | None
    logits: Float[Tensor, "B G N"]

    def detach(self) -> PointerTables:
        """The same numbers without a graph."""
        return self._replace(**{name: part.detach() for name, part in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """Those there are, by name, as an agent keeps them for an episode; `of` takes them back."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> PointerTables:
        """The tables among `named`."""
        return cls(**{name: named.get(name) for name in cls._fields})  # type: ignore[arg-type]


class TSPPointerActor(nn.Module):
    """Points at the next node: attention over the nodes that are open, then one logit per node.

    An encoder-decoder after Kool et al. (2019), "Attention, learn to solve routing problems!", with a small
    projection of the latent added to the query and a direct score from the current node to every other.
    Features of the state (what load is left, say) enter the query linearly, as they do there.
    Logits are clipped to +-`clip` by a tanh.

    With a belief about hidden costs, node embeddings know of it from the first layer on, and the moves' predicted
    rewards are part of the direct scores.
    """

    needs_nodes = True

    def __init__(
        self,
        feat_size: int,
        node_features: int,
        *,
        state_features: int = 0,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        latent: int,
        clip: float,
        unimix: float,
        belief: int = 0,
    ) -> None:
        """Build the networks.

        Args:
            feat_size: of the latent feature.
            node_features: of each node.
            width: of node embeddings.
            layers: of the encoder.
            heads: of attention.
            hidden: units of the encoder's hidden layers.
            latent: numbers in the projection of the latent that the query sees; 0: none.
            clip: of the logits.
            unimix: share of a uniform distribution over legal nodes.
            belief: size of the belief that `encode` takes; 0: none.
        """
        super().__init__()
        self.heads, self.clip, self.unimix = heads, clip, unimix
        self.encoder = SetEncoder(node_features, width=width, layers=layers, heads=heads, hidden=hidden)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.pointer = nn.Linear(width, width, bias=False)
        self.query_current = nn.Linear(width, width, bias=False)
        self.query_first = nn.Linear(width, width, bias=False)
        self.direct_from = nn.Linear(width, width, bias=False)
        self.direct_to = nn.Linear(width, width, bias=False)
        self.state_features = state_features
        if state_features:
            self.query_features = nn.Linear(state_features, width, bias=False)
        self.latent_size = latent
        if latent:
            self.project_latent = nn.Sequential(nn.Linear(feat_size, latent), nn.RMSNorm(latent, eps=1e-4))
            self.query_latent = nn.Linear(latent, width, bias=False)
        self.belief_size = belief
        if belief:
            self.gate = nn.Linear(belief, width)
            self.gated = nn.Linear(width, width, bias=False)
            self.moves_weight = nn.Parameter(torch.full((), MOVES_WEIGHT, device=torch.get_default_device()))

    def encode(
        self,
        nodes: Float[Tensor, "B N F"],
        belief: Float[Tensor, "B L"] | None = None,
        moves: Float[Tensor, "B N N"] | None = None,
        *,
        valid: Bool[Tensor, "B N"] | None = None,
    ) -> PointerTables:
        """The tables of B instances, from their nodes' static features.

        Args:
            nodes: the features.
            belief: about what is hidden in each instance, if the actor takes one.
            moves: the rewards that the belief expects of every move.
            valid: False for nodes that are padding; None where none are.
        """
        embedded = self.encoder.embed(nodes)
        if belief is not None:
            # The same added to every node would be normalised away; what a direction does to positions is a product.
            embedded = embedded + self.gated(embedded * self.gate(belief)[:, None])
        nodes = self.encoder.attend(scrub(embedded, valid), valid)
        batch, count, width = nodes.shape
        key = self._split(self.key(nodes)).transpose(-1, -2) / math.sqrt(width // self.heads)
        direct = self.direct_from(nodes) @ self.direct_to(nodes).transpose(-1, -2) / math.sqrt(width)
        if moves is not None:
            direct = direct + self.moves_weight * moves
        features, latent = None, None
        if self.state_features:
            features = self._scores(self.query_features.weight.t()[None].expand(batch, -1, -1), key)
        if self.latent_size:
            latent = self._scores(self.query_latent.weight.t()[None].expand(batch, -1, -1), key)
        logits = self._split(self.value(nodes)) @ self._split(self.pointer(nodes)).transpose(-1, -2)
        return PointerTables(
            current=self._scores(self.query_current(nodes), key),
            first=self._scores(self.query_first(nodes), key),
            direct=direct,
            features=features,
            latent=latent,
            logits=logits.reshape(batch, self.heads * count, count) / math.sqrt(width),
        )

    def forward(self, feat: Float[Tensor, "B *Q F"] | None, tables: PointerTables | None, view: View) -> OneHotDist:
        """The distribution over next nodes for Q states of each instance."""
        assert view is not None
        return self.distribution(self.scores(feat, tables, view), view)

    def distribution(self, scores: Float[Tensor, "B *Q N"], view: View) -> OneHotDist:
        """The distribution that scores stand for."""
        return OneHotDist(self.clip * torch.tanh(scores), mask=view.action_mask, unimix=self.unimix)

    def scores(
        self, feat: Float[Tensor, "B *Q F"] | None, tables: PointerTables | None, view: View
    ) -> Float[Tensor, "B *Q N"]:
        """How well each node fits each state, before the tanh that clips the logits."""
        assert tables is not None and view.current is not None and view.first is not None
        count = tables.logits.shape[-1]
        queries = view.current.shape
        scores = take_nodes(tables.current, view.current) + take_nodes(tables.first, view.first)
        if tables.features is not None:
            assert view.features is not None, "this actor reads features of the state"
            scores = scores + torch.bmm(view.features.flatten(1, -2), tables.features).view_as(scores)
        if tables.latent is not None:
            assert feat is not None, "this actor reads the latent"
            projected = self.project_latent(feat).reshape(queries[0], -1, self.latent_size)
            scores = scores + torch.bmm(projected, tables.latent).view_as(scores)
        closed = (~view.action_mask).to(scores.dtype) * LOGIT_FLOOR
        attention = torch.softmax(scores.unflatten(-1, (self.heads, count)) + closed[..., None, :], -1)
        pointed = torch.bmm(attention.view(queries[0], -1, self.heads * count), tables.logits).view(*queries, count)
        return pointed + take_nodes(tables.direct, view.current)

    def _split(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B A N D"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _scores(self, query: Float[Tensor, "B M E"], key: Float[Tensor, "B A D N"]) -> Float[Tensor, "B M G"]:
        return (self._split(query) @ key).transpose(1, 2).flatten(-2)


def saturation(
    scores: Float[Tensor, "*B N"], mask: Bool[Tensor, "*B N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """A penalty on scores far out on the tanh that clips a pointer's logits, and the share of legal ones out there.

    Where a tanh is flat no gradient passes, and a pointer whose scores have all run away stays uniform for ever. The
    penalty's gradient grows with the distance, so it leads back; within `SATURATED` it is exactly 0.
    """
    excess = (scores.abs() - SATURATED).clamp(min=0) * mask
    legal = mask.sum().clamp(min=1)
    return SATURATION_PENALTY * excess.square().sum() / legal, (excess.detach() > 0).sum() / legal


class MaskedActor(nn.Module):
    """An MLP over the latent: a distribution over any kind of actions, illegal discrete ones masked out."""

    needs_nodes = False

    def __init__(self, feat_size: int, actions: ActionSpec, *, units: int, layers: int, unimix: float) -> None:
        super().__init__()
        self.actions, self.unimix = actions, unimix
        self.latent_size = feat_size
        outputs = 2 * sum(actions.sizes) if actions.kind == "continuous" else sum(actions.sizes)
        # DreamerV3 begins with a policy close to uniform.
        self.mlp = MLP(feat_size, outputs, units=units, layers=layers, output_scale=0.01)

    def forward(
        self, feat: Float[Tensor, "B *Q F"] | None, tables: PointerTables | None, view: View | None
    ) -> ActionDist:
        """The distribution over actions; without a view (a task without masks) every action is legal."""
        assert feat is not None, "this actor reads the latent"
        outputs = self.mlp(feat)
        if self.actions.kind == "continuous":
            return BoundedNormal(*outputs.chunk(2, -1))
        if self.actions.kind == "multi_discrete":
            return MultiOneHot(outputs, self.actions.sizes, unimix=self.unimix)
        return OneHotDist(outputs, mask=None if view is None else view.action_mask, unimix=self.unimix)


class Critic(nn.Module):
    """The return to be expected from a latent and, in routing, from the state itself: a symexp two-hot."""

    bins: Tensor

    def __init__(
        self,
        feat_size: int,
        node_features: int | None,
        *,
        state_features: int = 0,
        units: int,
        layers: int,
        bins: int,
    ) -> None:
        super().__init__()
        self.nodes = None
        summary_size = 0
        if node_features is not None:
            self.nodes = SetEncoder(node_features, width=units, layers=layers, heads=4, hidden=2 * units)
            summary_size = 3 * units + state_features + 1
        self.mlp = MLP(feat_size + summary_size, bins, units=units, layers=layers, zero_output=True)
        self.register_buffer("bins", symexp_bins(bins, device=torch.get_default_device()))

    def encode(
        self, nodes: Float[Tensor, "B N F"] | None, valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"] | None:
        """The critic's own embeddings of each instance's nodes; None for a task without nodes."""
        return None if self.nodes is None or nodes is None else self.nodes(nodes, valid)

    def forward(
        self,
        feat: Float[Tensor, "B *Q F"] | None,
        nodes: Float[Tensor, "B N E"] | None,
        view: View | None,
        valid: Bool[Tensor, "B N"] | None = None,
    ) -> SymexpTwoHot:
        """The distribution over returns; nodes that are not `valid` are padding."""
        inputs = [] if feat is None else [feat]
        if nodes is not None:
            assert view is not None
            open_share = masked_share(view.action_mask, valid)[..., None]
            inputs += [summarise(nodes, view), open_share]
        return SymexpTwoHot(self.mlp(torch.cat(inputs, -1)), self.bins)
