"""Actors: from what there is to see of a state to a distribution over actions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from config import UserError
from envs.tasks import ActionSpec
from parts.action_distributions import BoundedNormal, MultiOneHot
from parts.cost_attention import CostEncoder, CostScores, make_encoder
from parts.latents import Feat
from parts.layers import MLP
from parts.pointing import PointerTables, Queries, point, point_again, pointed_by
from parts.precision import rounded
from parts.sets import scrub
from parts.views import NodeSet, View
from routing.matrix_costs import relative
from tools import OneHotDist

# How much the predicted rewards count in a pointer's scores at first: enough to prefer what is cheap.
MOVES_WEIGHT = 0.5
# tanh(4) is 0.9993: beyond, a logit is its clip and hardly learns.
SATURATED = 4.0
SATURATION_PENALTY = 0.01

ActionDist = OneHotDist | MultiOneHot | BoundedNormal


class Actor(nn.Module, ABC):
    """A policy: scores of the actions in a state, and the distribution that they stand for.

    What it makes of nodes once, for many states, are its tables; an actor that sees no nodes, or finds them in the view
    because they change with every state, has none.

    Attributes:
        latent_size: numbers that it reads of the latent feature; 0: none.
        heads: of attention, by which its tables grow.
        learns_in_roll_out: whether a roll-out keeps the graph of its scores, step by step; `score_again` makes one
            afterwards where it doesn't.
    """

    latent_size: int
    heads: int = 1
    learns_in_roll_out: bool = False

    @abstractmethod
    def scores(self, feat: Feat | None, tables: Any, view: Any) -> Float[Tensor, "B *Q S"]:
        """What it makes of states: the numbers that a distribution is built from."""

    def score_again(
        self, known: Float[Tensor, "B *Q S"], feat: Feat | None, tables: Any, view: Any
    ) -> Float[Tensor, "B *Q S"]:
        """Scores that are `known` from a roll-out without a graph, with one."""
        return self.scores(feat, tables, view)

    @abstractmethod
    def distribution(self, scores: Float[Tensor, "B *Q S"], view: Any) -> ActionDist:
        """The distribution over legal actions that scores stand for."""

    def forward(self, feat: Feat | None, tables: Any, view: Any) -> ActionDist:
        """The distribution over the legal actions of Q states of each instance."""
        return self.distribution(self.scores(feat, tables, view), view)

    def draw(
        self,
        feat: Feat | None,
        tables: Any,
        view: Any,
        noise: Float[Tensor, "B *Q *A"] | None,
        *,
        learns: bool = False,
    ) -> tuple[Shaped[Tensor, "B *Q *A"], Float[Tensor, "B *Q S"]]:
        """Actions drawn by `noise`, or the likeliest where there is none, and their scores.

        Only the scores carry a graph, and only where it `learns`.
        """
        with torch.set_grad_enabled(learns):
            scores = self.scores(feat, tables, view)
        with torch.no_grad():
            dist = self.distribution(scores, view)
            return dist.mode() if noise is None else dist.sample(noise), scores

    def penalty(
        self, scores: Float[Tensor, "B *Q S"], view: Any
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """What scores cost by themselves, whatever their actions earn, and metrics."""
        return torch.zeros((), device=scores.device), {}

    def tables(self, nodes: NodeSet | None) -> Any:
        """What it needs of the nodes of B instances, so that each state is a look-up."""
        return None

    def named(self, tables: Any) -> dict[str, Tensor]:
        """Tables as acting keeps them for an episode, [B, ...] each."""
        return {}

    def restore(self, named: Mapping[str, Tensor]) -> Any:
        """The tables among those that `named` gave."""
        return None

    def takes(self, num_nodes: int) -> bool:
        """Whether it can choose among that many nodes."""
        return True


class TSPPointerActor(Actor):
    """Points at the next node: attention over the nodes that are open, then one logit per node.

    An encoder-decoder after Kool et al. (2019), "Attention, learn to solve routing problems!", with a small
    projection of the latent added to the query and a direct score from the current node to every other.
    Features of the state (what load is left, say) enter the query linearly, as they do there.
    Logits are clipped to +-`clip` by a tanh.

    With a belief about hidden costs, node embeddings know of it from the first layer on, and the moves' predicted
    rewards are part of the direct scores.
    """

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
        moves: bool = False,
        cost_units: int = 0,
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
            moves: whether `encode` takes expected rewards of moves.
            cost_units: of the network that mixes costs of moves into attention, which `encode` takes then; 0: none.
        """
        super().__init__()
        self.heads, self.clip, self.unimix = heads, clip, unimix
        sizes = {"width": width, "layers": layers, "heads": heads, "hidden": hidden}
        self.encoder = make_encoder(node_features, **sizes, cost_units=cost_units)
        self.cost_scores = CostScores(units=cost_units, heads=heads) if cost_units else None
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
        if moves:
            self.moves_weight = nn.Parameter(torch.full((), MOVES_WEIGHT, device=torch.get_default_device()))

    def encode(
        self,
        nodes: Float[Tensor, "B N F"],
        belief: Float[Tensor, "B L"] | None = None,
        moves: Float[Tensor, "B N N"] | None = None,
        *,
        valid: Bool[Tensor, "B N"] | None = None,
        costs: Float[Tensor, "B N N"] | None = None,
    ) -> PointerTables:
        """The tables of B instances, from their nodes' static features.

        Args:
            nodes: the features.
            belief: about what is hidden in each instance, if the actor takes one.
            moves: the rewards that are expected of every move, if the actor takes them.
            valid: False for nodes that are padding; None where none are.
            costs: of every move in any unit, if the actor mixes them in.
        """
        embedded = self.encoder.embed(nodes)
        if belief is not None:
            # The same added to every node would be normalised away; what a direction does to positions is a product.
            embedded = embedded + self.gated(embedded * self.gate(belief)[:, None])
        embedded, mixed = scrub(embedded, valid), None
        if isinstance(self.encoder, CostEncoder):
            assert costs is not None, "this actor mixes costs into attention"
            mixed = self.encoder.costs(relative(costs, valid))
            nodes = self.encoder.attend(embedded, valid, mixed)
        else:
            nodes = self.encoder.attend(embedded, valid)
        width = nodes.shape[-1]
        key = self._split(self.key(nodes)).transpose(-1, -2) / math.sqrt(width // self.heads)
        direct = self.direct_from(nodes) @ self.direct_to(nodes).transpose(-1, -2) / math.sqrt(width)
        if moves is not None:
            direct = direct + self.moves_weight * moves
        current, first = (self._scores(query(nodes), key) for query in (self.query_current, self.query_first))
        if mixed is not None:
            assert self.cost_scores is not None
            scores = self.cost_scores(mixed)
            current, first, direct = current + scores.current, first + scores.first, direct + scores.direct
        features, latent = None, None
        if self.state_features:
            features = self._scores(self._row(self.query_features.weight, key), key)
        if self.latent_size:
            latent = self._scores(self._row(self.query_latent.weight, key), key)
        return PointerTables(
            current=current,
            first=first,
            direct=direct,
            features=features,
            latent=latent,
            pointed=pointed_by(self._split(self.value(nodes)), self._split(self.pointer(nodes)) / math.sqrt(width)),
        )

    def tables(self, nodes: NodeSet | None) -> PointerTables:
        """The tables of B instances."""
        assert nodes is not None, "a pointer points at nodes"
        costs = nodes.costs
        if costs is None and nodes.moves is not None:
            # Where nobody is shown what moves cost, the model expects it.
            costs = -nodes.moves
        return self.encode(nodes.features, nodes.belief, nodes.moves, valid=nodes.valid, costs=costs)

    def named(self, tables: PointerTables) -> dict[str, Tensor]:
        return tables.named()

    def restore(self, named: Mapping[str, Tensor]) -> PointerTables:
        return PointerTables.of(named)

    def distribution(self, scores: Float[Tensor, "B *Q N"], view: View) -> OneHotDist:
        """The distribution over next nodes that scores stand for."""
        return OneHotDist(self.clip * torch.tanh(scores), mask=view.action_mask, unimix=self.unimix)

    def scores(self, feat: Feat | None, tables: PointerTables | None, view: View) -> Float[Tensor, "B *Q N"]:
        """How well each node fits each state, before the tanh that clips the logits."""
        assert tables is not None and view.action_mask is not None
        return point(self._queries(feat, view), tables, heads=self.heads).view_as(view.action_mask)

    def score_again(
        self,
        known: Float[Tensor, "B *Q N"],
        feat: Feat | None,
        tables: PointerTables,
        view: View,
    ) -> Float[Tensor, "B *Q N"]:
        if torch.compiler.is_compiling():
            # A compiler decides by itself what to compute again.
            return self.scores(feat, tables, view)
        rows = known.reshape(known.shape[0], -1, known.shape[-1])
        return point_again(rows, self._queries(feat, view), tables, heads=self.heads).view_as(known)

    def _queries(self, feat: Feat | None, view: View) -> Queries:
        """Any number of states of each instance, in one row."""
        assert view.current is not None and view.first is not None and view.action_mask is not None
        batch, latent = view.current.shape[0], None
        if self.latent_size:
            assert feat is not None, "this actor reads the latent"
            latent = self.project_latent(feat).reshape(batch, -1, self.latent_size)
        return Queries(
            current=view.current.reshape(batch, -1),
            first=view.first.expand_as(view.current).reshape(batch, -1),
            open=view.action_mask.reshape(batch, -1, view.action_mask.shape[-1]),
            features=None if view.features is None else view.features.reshape(batch, -1, view.features.shape[-1]),
            latent=latent,
        )

    def penalty(
        self, scores: Float[Tensor, "B *Q N"], view: View
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """On scores far out on the tanh that clips them; the metric is the share of legal ones out there."""
        assert view.action_mask is not None
        penalty, share = saturation(scores, view.action_mask)
        return penalty, {"actor_saturation": share}

    def _row(self, weight: Float[Tensor, "E J"], key: Float[Tensor, "B A D N"]) -> Float[Tensor, "B J E"]:
        return rounded(weight, key.dtype).t()[None].expand(key.shape[0], -1, -1)

    def _split(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B A N D"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _scores(self, query: Float[Tensor, "B M E"], key: Float[Tensor, "B A D N"]) -> Float[Tensor, "B M G"]:
        return (self._split(query) @ key).transpose(1, 2).flatten(-2)


def require_costs(cost_units: int, *, shown: bool) -> None:
    """Check that a pointer that mixes costs of moves into attention is shown any.

    Raises:
        UserError: it is not.
    """
    if cost_units and not shown:
        raise UserError(
            f"actor.pointer.cost_units is {cost_units}, and nobody shows the pointer what moves cost: task atsp does,"
            " and of dreamer.py model.show_moves: true; or set it to 0"
        )


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


class MaskedActor(Actor):
    """An MLP over the latent: a distribution over any kind of actions, illegal discrete ones masked out."""

    def __init__(self, feat_size: int, actions: ActionSpec, *, units: int, layers: int, unimix: float) -> None:
        super().__init__()
        self.actions, self.unimix = actions, unimix
        self.latent_size = feat_size
        # Without tables, no step's gradient is larger than the step.
        self.learns_in_roll_out = True
        outputs = 2 * sum(actions.sizes) if actions.kind == "continuous" else sum(actions.sizes)
        # DreamerV3 begins with a policy close to uniform.
        self.mlp = MLP(feat_size, outputs, units=units, layers=layers, output_scale=0.01)

    def scores(self, feat: Feat | None, tables: None, view: Any) -> Float[Tensor, "B *Q S"]:
        assert feat is not None, "this actor reads the latent"
        return self.mlp(feat)

    def distribution(self, scores: Float[Tensor, "B *Q S"], view: Any) -> ActionDist:
        """The distribution over actions; where the view shows no mask every action is legal."""
        if self.actions.kind == "continuous":
            return BoundedNormal(*scores.chunk(2, -1))
        if self.actions.kind == "multi_discrete":
            return MultiOneHot(scores, self.actions.sizes, unimix=self.unimix)
        return OneHotDist(scores, mask=view.action_mask, unimix=self.unimix)

    def takes(self, num_nodes: int) -> bool:
        return self.actions.sizes == (num_nodes,)
