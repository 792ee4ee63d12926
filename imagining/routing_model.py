"""The world model of routing: nodes are static context, encoded once per episode; rules know the rest of a state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from config import UserError
from envs.tasks import ACTION_MASK, RoutingTask
from imagining.world_model import Losses, Metrics, Observed, RowMean, WorldModel
from networks import RSSM, Latent, NodeHead, RoutingEncoder
from parts.latents import Feat
from parts.layers import MLP
from parts.moves import Belief, MoveHead, Moves
from parts.sets import masked_share
from parts.views import NodeSet, View, take_nodes
from routing.cost_world import FACTORS, LAST_COST, LAST_NODE
from routing.rules import CURRENT_NODE, Instance, Rules, State, each_part
from settings.dreamer import ModelSettings
from system.ranks import here
from tools import BernoulliDist, OneHotDist, SymlogGaussian, uniform

# How much of the move head's loss asks what a move costs between places that it must not know.
UNKNOWN_SHARE = 0.1


def places_of(
    instance: Instance, origin: Int[Tensor, "B *Q"], target: Int[Tensor, "B *Q"]
) -> Int[Tensor, "B *Q 2"] | None:
    """Which places the ends of moves between nodes are; None where nodes are no places."""
    if instance.place is None:
        return None
    ends = torch.stack((origin, target), -1)
    return take_nodes(instance.place[..., None], ends)[..., 0]


def shown_of(
    costs: Float[Tensor, "B N N"] | None, origin: Int[Tensor, "B *Q"], target: Int[Tensor, "B *Q"]
) -> Float[Tensor, "B *Q"] | None:
    """What observations say that moves between nodes cost; None where they say nothing of it."""
    if costs is None:
        return None
    index = origin * costs.shape[-1] + target
    return costs.flatten(1).gather(1, index.flatten(1)).view(index.shape)


class RoutingContext(NamedTuple):
    """What never changes within an episode, encoded once for B instances.

    `nodes` are their embeddings; None where no latent is, which alone is predicted by them. `belief` is what the model
    knows of hidden costs where imagination begins; None where it keeps no belief.
    """

    instance: Instance
    nodes: Float[Tensor, "B N E"] | None
    belief: Float[Tensor, "B L"] | None = None

    def embedded(self) -> Float[Tensor, "B N E"]:
        """The embeddings of the nodes, for who needs them."""
        assert self.nodes is not None, "nodes are embedded only where latents are read"
        return self.nodes


class RoutingModel(WorldModel):
    """A world model in which observations and actions look up embeddings of nodes.

    The reward head sees a move's geometry; what it may read beside it is the latent, or a belief about hidden costs.
    """

    HEADS = ("reward", "cont", "mask", "current_node", "current_pos", "coords")

    def __init__(self, task: RoutingTask, settings: ModelSettings) -> None:
        """Build encoder, belief, RSSM and every head whose loss scale is not 0.

        Args:
            task: what there is to model.
            settings: the config section `model`.

        Raises:
            UserError: the settings do not fit the task.
        """
        super().__init__(task, settings)
        self.rules: type[Rules] = task.rules
        self.memory_spaces = {}
        scales = asdict(settings.loss_scales)
        scales = {name: scale for name, scale in scales.items() if name in ("dyn", "rep", *self.HEADS)}
        self.loss_scales = {name: scale for name, scale in scales.items() if scale}
        self.routing_encoder = RoutingEncoder(
            self.rules.num_node_features,
            state_features=self.rules.num_state_features,
            units=settings.units,
            **asdict(settings.encoder),
        )
        self.belief = self._make_belief(settings)
        # torch.compile follows no GRU of PyTorch's.
        self.traceable = self.belief is None
        self.belief_size = 0 if self.belief is None else self.belief.size
        self.rssm = RSSM(self.routing_encoder.node_size, self.routing_encoder.embed_size, **asdict(settings.rssm))
        self.reward_latent = settings.reward_latent
        # A policy that knows what is believed is always told what that means for every move.
        self.shows_moves = settings.show_moves or self.belief is not None
        self.position_as_node = settings.current_pos == "node"
        self.move_error = settings.move_error
        self.heads = nn.ModuleDict(self._make_heads(settings))
        self.separate_reward = "reward" in self.heads
        if settings.show_moves and (settings.reward_latent or not self.separate_reward):
            raise UserError(
                "model.show_moves shows what moves cost by their ends: it needs model.reward_latent: false and"
                " model.loss_scales.reward above 0"
            )
        self._finish(settings)

    @property
    def num_members(self) -> int:
        """How many move heads it has: those of an ensemble, or one."""
        head = self.heads["reward"]
        assert isinstance(head, MoveHead)
        return head.members

    def _make_belief(self, settings: ModelSettings) -> Belief | None:
        costs = self.rules.costs
        if costs.shown == "factors" and not settings.belief:
            raise UserError("cost_shown: factors is read by a belief alone: set model.belief: true")
        if not settings.belief:
            return None
        if not costs.hidden:
            raise UserError("model.belief is about hidden costs: choose cost: stretch, or model.belief: false")
        if settings.reward_latent:
            raise UserError("the move head reads a belief or the latent: set model.reward_latent: false")
        shown = costs.hidden if costs.shown == "factors" else 0
        return Belief(shown, size=settings.units, compares=bool(costs.num_places))

    def _make_heads(self, settings: ModelSettings) -> dict[str, nn.Module]:
        feat_size, units = self.rssm.feat_size, settings.units
        moves: dict[str, Any] = {
            "latent_size": feat_size if self.reward_latent else self.belief_size,
            "units": settings.move_units,
            "layers": settings.move_layers,
            "members": settings.move_heads,
            "waves": settings.move_waves,
            "places": self.rules.costs.num_places,
            "place_size": settings.place_units,
            "unseen": self.rules.costs.unseen_places,
            "shown": self.rules.shows_costs,
        }
        makers = {
            "reward": lambda: MoveHead(**moves),
            "cont": lambda: MLP(feat_size, 1, units=units, layers=1),
            "mask": lambda: NodeHead(feat_size, self.routing_encoder.node_size, units=units),
            "current_node": lambda: NodeHead(feat_size, self.routing_encoder.node_size, units=units),
            "current_pos": lambda: MLP(feat_size, 1 if self.position_as_node else 2, units=units, layers=1),
            "coords": lambda: MLP(feat_size, 2 * self.task.num_actions, units=units, layers=1),
        }
        return {name: make() for name, make in makers.items() if name in self.loss_scales}

    def context(
        self, instance: Instance, belief: Float[Tensor, "B L"] | None = None, *, embedded: bool = True
    ) -> RoutingContext:
        """The static part of B instances; its nodes are embedded on request, since only latents need that."""
        nodes = None
        if embedded:
            nodes = self.routing_encoder.nodes(self.rules.node_features(instance), instance.valid)
        return RoutingContext(instance=instance, nodes=nodes, belief=belief)

    def node_set(self, instance: Instance, belief: Float[Tensor, "B L"] | None = None) -> NodeSet:
        """What actor and critic see of B instances, of what is believed of their hidden costs, and of moves' costs."""
        # Of a model that believes, nothing is known of moves without a belief.
        is_told = self.shows_moves and (belief is None) == (self.belief is None)
        moves = self.predict_moves(instance, belief) if is_told else None
        return NodeSet.of(self.rules, instance)._replace(belief=belief, moves=moves)

    def encode(self, obs: dict[str, Tensor], context: RoutingContext, view: View) -> Float[Tensor, "*B U"]:
        """Embed observations, of which the view says all that there is to see beside the nodes."""
        return self.routing_encoder(context.embedded(), view)

    def embed_action(self, action: Int[Tensor, "B *Q"], context: RoutingContext) -> Float[Tensor, "B *Q A"]:
        """The embeddings of the nodes chosen."""
        return take_nodes(context.embedded(), action)

    def embed_choice(self, choice: Float[Tensor, "B Q N"], context: RoutingContext) -> Float[Tensor, "B Q A"]:
        return choice @ context.embedded()

    def observe(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> Observed:
        """Infer the latents of whole episodes."""
        context = self.context(self.first_instance(batch))
        embed = self.encode(batch, context, self.view(batch))
        action = self.embed_action(batch["prev_action"], context)
        latents, posterior, prior = self.rssm.observe(embed, action, batch["is_first"], noise)
        return Observed(latents, posterior, prior, context)

    def first_instance(self, batch: dict[str, Tensor]) -> Instance:
        """The instances of whole episodes [B, T, ...], each from its first row."""
        return self.rules.restore({key: value[:, 0] for key, value in batch.items()})[0]

    def view(self, batch: dict[str, Tensor]) -> View:
        """What networks see of observed states beside the latent."""
        _, state = self.rules.restore(batch)
        return View.of(self.rules, state, batch[ACTION_MASK])

    def believe(
        self, obs: dict[str, Tensor], instance: Instance, before: Float[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B T L"]:
        """The belief about hidden costs after each row of observations [B, T, ...] of one episode.

        `before` is the belief before the first of these rows; None where the episode begins there.
        """
        assert self.belief is not None, "this model keeps no belief"
        origin = take_nodes(instance.coords, obs[LAST_NODE])
        target = take_nodes(instance.coords, obs[CURRENT_NODE])
        expected = None
        if self.belief.compares:
            with torch.no_grad():
                places = places_of(instance, obs[LAST_NODE], obs[CURRENT_NODE])
                usual = self._believed_of(origin[:, :1])
                expected = -self.predict_move(origin, target, usual, places)
        return self.belief(origin, target, obs[LAST_COST].squeeze(-1), obs.get(FACTORS), before, expected=expected)

    def first_belief(self, instance: Instance) -> Float[Tensor, "B L"] | None:
        """The belief before any move, where nothing was observed; None where there is none to keep."""
        return None if self.belief is None else self._believed_of(instance.coords[:, :1])[:, 0]

    def _believed_of(self, here: Float[Tensor, "B 1 2"]) -> Float[Tensor, "B 1 L"]:
        """What is believed where nobody has moved from yet."""
        assert self.belief is not None
        return self.belief(here, here, torch.zeros_like(here[..., 0]), None)

    def begin(self, context: RoutingContext, state: State, noise: Float[Tensor, "B Q S"] | None) -> Latent:
        """Latents after the first observation of episodes that begin in `state`, [B, Q]."""
        embed = self._embed_state(context, state)
        rows = embed.shape[0]
        no_action = embed.new_zeros(rows, context.embedded().shape[-1])
        is_first = torch.ones(rows, dtype=torch.bool, device=embed.device)
        noise = None if noise is None else noise.flatten(0, 1)
        latent, _ = self.rssm.observe_step(self.rssm.initial((rows,)), no_action, embed, is_first, noise)
        return Latent(*(part.unflatten(0, state.current.shape) for part in latent))

    def observe_state(
        self, latent: Latent, action: Int[Tensor, "B Q"], context: RoutingContext, state: State
    ) -> Latent:
        """The likeliest latents after `action` has led to `state`, [B, Q]."""
        embed = self._embed_state(context, state)
        embedded = self.embed_action(action, context).flatten(0, 1)
        is_first = torch.zeros(embed.shape[0], dtype=torch.bool, device=embed.device)
        before = Latent(*(part.flatten(0, 1) for part in latent))
        after, _ = self.rssm.observe_step(before, embedded, embed, is_first, None)
        return Latent(*(part.unflatten(0, action.shape) for part in after))

    def _embed_state(self, context: RoutingContext, state: State) -> Float[Tensor, "R U"]:
        view = View.of(self.rules, state, self.rules.action_mask(state))
        return self.encode({}, context, view).flatten(0, 1)

    def move_loss(
        self, batch: dict[str, Tensor], instance: Instance, feat: Float[Tensor, "B T F"] | None
    ) -> Float[Tensor, ""]:
        """Error of the move head on the moves of replayed episodes; see `moves_of`."""
        return self.loss_on_moves(self.moves_of(batch, instance, feat))

    def moves_of(self, batch: dict[str, Tensor], instance: Instance, feat: Float[Tensor, "B T F"] | None) -> Moves:
        """Those of replayed episodes: from the latent before each move, and the move, to the next row's reward.

        A belief answers for all the moves of its episode.
        """
        begin, end = batch[CURRENT_NODE][:, :-1], batch["action"][:, :-1]
        moves = Moves(
            take_nodes(instance.coords, begin),
            take_nodes(instance.coords, end),
            batch["reward"][:, 1:],
            # The last row's action was never carried out, and the next episode's first reward answers no action.
            (self._row_weight(batch)[:, 1:] * ~batch["is_first"][:, 1:]).float(),
            places_of(instance, begin, end),
            feat[:, :-1] if feat is not None and self.reward_latent else None,
            shown_of(self.rules.shown_costs(instance), begin, end),
        )
        if self.belief is None:
            return moves
        # A belief that is asked about the next move only would not learn to remember, so it is asked about every later
        # one, too; and about those that it has seen, by which it finds out sooner that costs tell of something hidden.
        each = each_part(moves, lambda part: part[:, None])
        weight = moves.weight[:, None] * moves.weight[:, :, None]
        return each._replace(weight=weight, latent=self.believe(batch, instance)[:, :-1, None])

    def loss_on_moves(self, moves: Moves) -> Float[Tensor, ""]:
        """Error of the move head on moves that were made, a weighted mean; every member of an ensemble learns all."""

        balance = here().balance(moves.weight)

        def error(places: Int[Tensor, "*B 2"] | None) -> Float[Tensor, ""]:
            wrong = self.heads["reward"](moves.origin, moves.target, moves.latent, places, moves.shown) - moves.reward
            wrong = wrong.square() if self.move_error == "squared" else wrong.abs()
            return balance((wrong * moves.weight).sum() / (len(wrong) * moves.weight.sum().clamp(min=1)))

        if moves.places is None:
            return error(None)
        # Where a place is unknown, the head has to do with where it lies.
        return (1 - UNKNOWN_SHARE) * error(moves.places) + UNKNOWN_SHARE * error(None)

    def reward_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Float[Tensor, ""], Metrics]:
        """The scaled loss of the move head alone, and metrics; `generator` draws latents where the head reads them."""
        feat = None
        if self.reward_latent:
            with torch.no_grad():
                noise = uniform((*batch["reward"].shape, self.rssm.stoch_size), generator)
                feat = self.observe(batch, noise).latents.feat()
        return self._scaled(self.move_loss(batch, self.first_instance(batch), feat))

    def study(self, moves: Moves) -> tuple[Float[Tensor, ""], Metrics]:
        return self._scaled(self.loss_on_moves(moves))

    def _scaled(self, loss: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Metrics]:
        """The move head's loss as it counts, and its error in the unit of rewards."""
        error = loss.detach()
        return self.loss_scales["reward"] * loss, {
            "move_error": error.sqrt() if self.move_error == "squared" else error
        }

    @torch.no_grad()
    def predict_logged(self, moves: Moves) -> Float[Tensor, "K M"]:
        return self.heads["reward"](moves.origin, moves.target, moves.latent, moves.places, moves.shown)

    def predict_move(
        self,
        origin: Float[Tensor, "*#B 2"],
        target: Float[Tensor, "*#B 2"],
        latent: Float[Tensor, "*#B F"] | None,
        places: Int[Tensor, "*#B 2"] | None = None,
        shown: Float[Tensor, "*#B"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """The reward that the move head expects of moves between two positions, by a latent feature or a belief.

        `places` are those of both ends, where nodes are places and somebody knows which; `shown` is what observations
        say that the moves cost.
        """
        return self.heads["reward"](origin, target, latent, places, shown).mean(0)

    def predict_moves(self, instance: Instance, belief: Float[Tensor, "B L"] | None) -> Float[Tensor, "B N N"]:
        """What it expects of every move from a node (row) to a node (column) of each instance."""
        return self.predict_moves_each(instance, belief).mean(0)

    @torch.no_grad()
    def predict_moves_each(
        self, instance: Instance, belief: Float[Tensor, "B L"] | None, origins: slice = slice(None)
    ) -> Float[Tensor, "K B M N"]:
        """The same, as each member of the head's ensemble expects it, from the nodes `origins` alone."""
        coords, place = instance.coords, instance.place
        if place is not None:
            place = torch.stack(torch.broadcast_tensors(place[:, origins, None], place[:, None]), -1)
        known, shown = None if belief is None else belief[:, None, None], self.rules.shown_costs(instance)
        shown = None if shown is None else shown[:, origins]
        return self.heads["reward"](coords[:, origins, None], coords[:, None], known, place, shown)

    @torch.no_grad()
    def predict_legs_each(
        self, instance: Instance, belief: Float[Tensor, "B L"] | None, tour: Int[Tensor, "B M"]
    ) -> Float[Tensor, "K B M"]:
        """What each member expects of the moves of closed tours, which cost nothing where they stay."""
        begin, end = tour, tour.roll(-1, -1)
        known = None if belief is None else belief[:, None]
        ends = take_nodes(instance.coords, begin), take_nodes(instance.coords, end)
        shown = shown_of(self.rules.shown_costs(instance), begin, end)
        rewards = self.heads["reward"](*ends, known, places_of(instance, begin, end), shown)
        return rewards.masked_fill((ends[0] == ends[1]).all(-1), 0.0)

    def predict_mask(self, feat: Feat, context: RoutingContext) -> Bool[Tensor, "B *Q N"]:
        logits, valid = self.heads["mask"](feat, context.embedded()), context.instance.valid
        if valid is not None:
            valid = valid.view(len(valid), *[1] * (logits.ndim - 2), -1)
            logits = logits.masked_fill(~valid, -torch.inf)
        return (logits > 0).scatter(-1, logits.argmax(-1, keepdim=True), True)

    def _head_losses(
        self, batch: dict[str, Tensor], observed: Observed, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Losses, Metrics]:
        context: RoutingContext = observed.context
        losses: Losses = {}
        metrics: Metrics = {}
        if "reward" in self.heads:
            losses["reward"] = self.move_loss(batch, context.instance, feat)
        if "cont" in self.heads:
            losses["cont"] = self._cont_loss(batch, feat, mean, discount=1.0)
        if "mask" in self.heads:
            losses["mask"], metrics["mask_accuracy"] = self._mask_loss(batch, context, feat, mean)
        if "current_node" in self.heads:
            losses["current_node"], metrics["current_node_accuracy"] = self._node_loss(batch, context, feat, mean)
        if "current_pos" in self.heads:
            if self.position_as_node:
                target = batch[CURRENT_NODE][..., None].float()
            else:
                target = take_nodes(context.instance.coords, batch[CURRENT_NODE])
            losses["current_pos"] = mean(-SymlogGaussian(self.heads["current_pos"](feat)).log_prob(target))
        if "coords" in self.heads:
            target = context.instance.coords.flatten(1)[:, None].expand(-1, feat.shape[1], -1)
            losses["coords"] = mean(-SymlogGaussian(self.heads["coords"](feat)).log_prob(target))
        return losses, metrics

    def _mask_loss(
        self, batch: dict[str, Tensor], context: RoutingContext, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of the mask head over real nodes, and the share of entries that it has right."""
        dist, valid = BernoulliDist(self.heads["mask"](feat, context.embedded())), context.instance.valid
        log_prob = dist.log_prob(batch[ACTION_MASK])
        if valid is None:
            loss = mean(-log_prob.mean(-1))
        else:
            loss = mean(-(log_prob * valid[:, None]).sum(-1) / valid.sum(-1, keepdim=True))
        return loss, mean(masked_share(dist.mode() == batch[ACTION_MASK], valid)).detach()

    def _node_loss(
        self, batch: dict[str, Tensor], context: RoutingContext, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of the head that names the current node, and how often it is right."""
        logits, valid = self.heads["current_node"](feat, context.embedded()), context.instance.valid
        node = OneHotDist(logits, mask=None if valid is None else valid[:, None].expand_as(logits))
        hit = (node.mode() == batch[CURRENT_NODE]).float()
        return mean(-node.log_prob(batch[CURRENT_NODE])), mean(hit)

    def _row_weight(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        """Rows beyond the first episode of a whole-episode batch carry no weight."""
        return (batch["is_first"].cumsum(1) <= 1).float()
