"""The world model: an RSSM with an encoder and heads that fit the task, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from config import UserError
from envs.costs import FACTORS, LAST_COST, LAST_NODE
from envs.rules import CURRENT_NODE, Instance, State
from envs.tasks import ACTION_MASK, Task, wrong_share
from layers import MLP, embed_actions, initialise, use_layer_norm
from moves import Belief, MoveHead
from networks import RSSM, Latent, NodeHead, RoutingEncoder
from observations import ObservationDecoder, ObservationEncoder, select
from sets import masked_share
from tools import BernoulliDist, OneHotDist, SymexpTwoHot, SymlogGaussian, symexp_bins
from views import View, take_nodes

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]


class RoutingContext(NamedTuple):
    """What never changes within an episode, encoded once for B instances."""

    instance: Instance
    nodes: Float[Tensor, "B N E"]


class Observed(NamedTuple):
    """Replayed sequences as the model sees them: latents [B, T] with their posterior and prior, and context."""

    latents: Latent
    posterior: OneHotDist
    prior: OneHotDist
    context: RoutingContext | None


class WorldModel(nn.Module):
    """An RSSM with an encoder and heads that fit the task.

    Routing: nodes are static context, encoded once per episode; observations and actions look them up. Any other
    task: an encoder and a decoder chosen per key of the observation, and actions as they are.
    """

    bins: Tensor
    HEADS = ("reward", "cont", "mask", "current_node", "current_pos", "coords")

    def __init__(self, task: Task, settings: Any, *, discount: float = 1.0) -> None:
        """Build encoder, RSSM and every head whose loss scale is not 0.

        Args:
            task: what there is to model.
            settings: the config section `model`.
            discount: folded into what the `cont` head predicts of a task without routing rules (DreamerV3).

        Raises:
            UserError: the settings do not fit the task.
        """
        super().__init__()
        self.task, self.rules, self.discount = task, task.rules, discount
        self.free_nats = settings.free_nats
        scales = settings.loss_scales.to_dict()
        units, layers = settings.units, settings.layers
        self.encoder: ObservationEncoder | None = None
        self.decoder: ObservationDecoder | None = None
        self.routing_encoder: RoutingEncoder | None = None
        if self.rules is None:
            encoded = select(task.encoded, settings.encode_keys)
            self.encoder = ObservationEncoder(encoded, units=units, layers=layers, depth=settings.depth)
            action_size, embed_size, node_size = task.actions.embed_size, self.encoder.embed_size, 0
            for name in ("current_node", "current_pos", "coords"):
                scales.pop(name)
            if not task.actions.masked:
                scales.pop("mask")
        else:
            encoder = RoutingEncoder(
                self.rules.num_node_features,
                state_features=self.rules.num_state_features,
                units=units,
                **settings.encoder.to_dict(),
            )
            self.routing_encoder = encoder
            action_size, embed_size, node_size = encoder.node_size, encoder.embed_size, encoder.node_size
            scales.pop("decoder")
        self.loss_scales = {name: scale for name, scale in scales.items() if scale}
        self.belief: Belief | None = None
        self.belief_size = 0
        if self.rules is not None and self.rules.costs.shown == "factors" and not settings.belief:
            raise UserError("cost_shown: factors is read by a belief alone: set model.belief: true")
        if settings.belief:
            if self.rules is None or not self.rules.costs.hidden:
                raise UserError("model.belief is about hidden costs: choose cost: stretch, or model.belief: false")
            costs = self.rules.costs
            if settings.reward_latent:
                raise UserError("the move head reads a belief or the latent: set model.reward_latent: false")
            self.belief = Belief(costs.hidden if costs.shown == "factors" else 0, size=units)
            self.belief_size = units
        self.rssm = RSSM(action_size, embed_size, **settings.rssm.to_dict())
        feat_size = self.rssm.feat_size
        if "decoder" in self.loss_scales:
            decoded = select(task.observations, settings.decode_keys)
            self.decoder = ObservationDecoder(decoded, feat_size, units=units, layers=layers, depth=settings.depth)
        self.reward_latent = settings.reward_latent
        self.position_as_node = settings.current_pos == "node"
        self.register_buffer("bins", symexp_bins(settings.bins, device=torch.get_default_device()))
        heads: dict[str, nn.Module] = {}
        if "reward" in self.loss_scales:
            if self.rules is None:
                heads["reward"] = MLP(feat_size, settings.bins, units=units, layers=1, zero_output=True)
            else:
                latent_size = feat_size if self.reward_latent else self.belief_size
                heads["reward"] = MoveHead(latent_size=latent_size, units=settings.move_units, layers=2)
        if "cont" in self.loss_scales:
            heads["cont"] = MLP(feat_size, 1, units=units, layers=1)
        if "mask" in self.loss_scales and self.rules is None:
            heads["mask"] = MLP(feat_size, task.num_actions, units=units, layers=1)
        for name in ("mask", "current_node"):
            if name in self.loss_scales and self.rules is not None:
                heads[name] = NodeHead(feat_size, node_size, units=units)
        if "current_pos" in self.loss_scales:
            heads["current_pos"] = MLP(feat_size, 1 if self.position_as_node else 2, units=units, layers=1)
        if "coords" in self.loss_scales:
            heads["coords"] = MLP(feat_size, 2 * task.num_actions, units=units, layers=1)
        self.heads = nn.ModuleDict(heads)
        if settings.norm == "layer":
            use_layer_norm(self)
        if settings.initialisation == "published":
            initialise(self)

    def context(self, instance: Instance) -> RoutingContext:
        """Encode the static part of B instances."""
        assert self.rules is not None and self.routing_encoder is not None, "only routing has static context"
        nodes = self.routing_encoder.nodes(self.rules.node_features(instance), instance.valid)
        return RoutingContext(instance=instance, nodes=nodes)

    def episode_context(self, batch: dict[str, Tensor]) -> tuple[RoutingContext | None, View | None]:
        """Context and view of a batch of whole routing episodes; nothing of either for any other task."""
        if self.rules is None:
            return None, None
        instance, _ = self.rules.restore({key: value[:, 0] for key, value in batch.items()})
        _, state = self.rules.restore(batch)
        return self.context(instance), View.of(self.rules, state, batch[ACTION_MASK])

    def encode(
        self, obs: dict[str, Tensor], context: RoutingContext | None, view: View | None
    ) -> Float[Tensor, "*B U"]:
        """Embed observations; without any, in routing, those of episodes that begin."""
        if self.encoder is not None:
            return self.encoder(obs)
        assert self.routing_encoder is not None and context is not None and view is not None
        return self.routing_encoder(context.nodes, view)

    def believe(
        self, obs: dict[str, Tensor], instance: Instance, before: Float[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B T L"]:
        """The belief about hidden costs after each row of observations [B, T, ...] of one episode.

        `before` is the belief before the first of these rows; None where the episode begins there.
        """
        assert self.belief is not None, "this model keeps no belief"
        origin = take_nodes(instance.coords, obs[LAST_NODE])
        target = take_nodes(instance.coords, obs[CURRENT_NODE])
        return self.belief(origin, target, obs[LAST_COST].squeeze(-1), obs.get(FACTORS), before)

    def first_belief(self, instance: Instance) -> Float[Tensor, "B L"] | None:
        """The belief before any move, where nothing was observed; None where there is none to keep."""
        if self.belief is None:
            return None
        here = instance.coords[:, :1]
        return self.belief(here, here, torch.zeros_like(here[..., 0]), None)[:, 0]

    def embed_action(self, action: Tensor, context: RoutingContext | None) -> Float[Tensor, "B *Q A"]:
        """What the RSSM sees of actions [B, *Q, *shape]; in routing, the embedding of the node chosen."""
        if context is None:
            return embed_actions(self.task.actions, action)
        return take_nodes(context.nodes, action)

    def observe(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> Observed:
        """Infer the latents of replayed sequences."""
        context, view = self.episode_context(batch)
        embed = self.encode(batch, context, view)
        action = self.embed_action(batch["prev_action"], context)
        initial = self.recall(batch)
        latents, posterior, prior = self.rssm.observe(embed, action, batch["is_first"], noise, initial)
        return Observed(latents, posterior, prior, context)

    @property
    def memory_spaces(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what replay keeps of each row's latent, so that a window can go on from it."""
        return {
            "context_deter": ((self.rssm.deter_size,), torch.float16),
            "context_stoch": ((self.rssm.stoch_size,), torch.int16),
        }

    def memory(self, latent: Latent) -> dict[str, Tensor]:
        """A latent as replay keeps it; what is not finite is forgotten."""
        return {
            "context_deter": latent.deter.detach().nan_to_num(0.0, 0.0, 0.0).half(),
            "context_stoch": latent.stoch.detach().argmax(-1).short(),
        }

    def recall(self, batch: dict[str, Tensor]) -> Latent | None:
        """The latent of the row before each sequence, as replay kept it; None where it keeps none."""
        if "context_deter" not in batch:
            return None
        stoch = functional.one_hot(batch["context_stoch"].long(), self.rssm.classes).float()
        return Latent(deter=batch["context_deter"].float(), stoch=stoch)

    def begin(self, context: RoutingContext, state: State, noise: Float[Tensor, "B Q S"] | None) -> Latent:
        """Latents after the first observation of episodes that begin in `state`, [B, Q]."""
        embed = self._embed_state(context, state)
        rows = embed.shape[0]
        no_action = embed.new_zeros(rows, context.nodes.shape[-1])
        is_first = torch.ones(rows, dtype=torch.bool, device=embed.device)
        noise = None if noise is None else noise.flatten(0, 1)
        latent, _ = self.rssm.observe_step(self.rssm.initial((rows,)), no_action, embed, is_first, noise)
        return Latent(*(part.unflatten(0, state.current.shape) for part in latent))

    def follow(self, latent: Latent, action: Int[Tensor, "B Q"], context: RoutingContext, state: State) -> Latent:
        """The likeliest latents after `action` has led to `state`, [B, Q]."""
        embed = self._embed_state(context, state)
        embedded = self.embed_action(action, context).flatten(0, 1)
        is_first = torch.zeros(embed.shape[0], dtype=torch.bool, device=embed.device)
        before = Latent(*(part.flatten(0, 1) for part in latent))
        after, _ = self.rssm.observe_step(before, embedded, embed, is_first, None)
        return Latent(*(part.unflatten(0, action.shape) for part in after))

    def _embed_state(self, context: RoutingContext, state: State) -> Float[Tensor, "R U"]:
        assert self.rules is not None
        view = View.of(self.rules, state, self.rules.action_mask(state))
        return self.encode({}, context, view).flatten(0, 1)

    def loss(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> tuple[Losses, Metrics, Observed]:
        """The losses of one batch, each a mean over rows, in the order in which values flow; metrics; the latents.

        Rows beyond the first episode of a whole-episode batch carry no weight.
        """
        observed = self.observe(batch, noise)
        latents, posterior, prior, context = observed
        feat = latents.feat()
        weight = self._row_weight(batch)
        losses, metrics = {}, {}

        def mean(values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
            return (values * weight).sum() / weight.sum()

        # DreamerV3, eq. 3: each side of the KL is pulled towards the other's detached value, free below `free_nats`.
        losses["dyn"] = mean(posterior.detach().kl(prior).sum(-1).clamp(min=self.free_nats))
        losses["rep"] = mean(posterior.kl(prior.detach()).sum(-1).clamp(min=self.free_nats))
        metrics["prior_entropy"] = prior.entropy().sum(-1).mean().detach()
        metrics["posterior_entropy"] = posterior.entropy().sum(-1).mean().detach()
        if "reward" in self.heads:
            if context is None:
                losses["reward"] = mean(-self._two_hot(feat).log_prob(batch["reward"]))
            else:
                losses["reward"] = self.move_loss(batch, context.instance, feat)
        if "cont" in self.heads:
            cont = BernoulliDist(self.heads["cont"](feat).squeeze(-1))
            discount = self.discount if self.rules is None else 1.0
            losses["cont"] = mean(-cont.log_prob((~batch["is_terminal"]).float() * discount))
        if self.decoder is not None:
            per_key = {name: mean(loss) for name, loss in self.decoder.losses(feat, batch).items()}
            losses["decoder"] = torch.stack(list(per_key.values())).sum()
            metrics |= {f"decoder_{name}_loss": loss.detach() for name, loss in per_key.items()}
        if context is None and "mask" in self.heads:
            dist = BernoulliDist(self.heads["mask"](feat))
            losses["mask"] = mean(-dist.log_prob(batch[ACTION_MASK]).mean(-1))
            if self.task.mask_rules is not None:
                metrics["mask_rules_wrong"] = wrong_share(self.task.mask_rules, batch)
            # Seen from the observation itself, and from the step before it, as imagination sees it.
            imagined = Latent(latents.deter, prior.one_hot(prior.mode())).feat()
            for name, basis in (("mask", feat), ("mask_imagined", imagined)):
                agreed = self.predict_mask(basis, None) == batch[ACTION_MASK]
                metrics[f"{name}_accuracy"] = mean(agreed.float().mean(-1)).detach()
                metrics[f"{name}_exact"] = mean(agreed.all(-1).float()).detach()
        if context is not None:
            self._routing_losses(batch, context, feat, mean, losses, metrics)
        assert set(losses) == set(self.loss_scales), f"losses {set(losses)} differ from scales {set(self.loss_scales)}"
        for name, value in losses.items():
            metrics[f"{name}_loss"] = value.detach()
        return losses, metrics, observed

    def _routing_losses(
        self,
        batch: dict[str, Tensor],
        context: RoutingContext,
        feat: Float[Tensor, "B T F"],
        mean: Callable[[Tensor], Tensor],
        losses: Losses,
        metrics: Metrics,
    ) -> None:
        nodes, coords = context.nodes, context.instance.coords
        if "mask" in self.heads:
            dist = BernoulliDist(self.heads["mask"](feat, nodes))
            log_prob = dist.log_prob(batch["action_mask"])
            valid = context.instance.valid
            if valid is None:
                losses["mask"] = mean(-log_prob.mean(-1))
            else:
                losses["mask"] = mean(-(log_prob * valid[:, None]).sum(-1) / valid.sum(-1, keepdim=True))
            metrics["mask_accuracy"] = mean(masked_share(dist.mode() == batch["action_mask"], valid)).detach()
        if "current_node" in self.heads:
            logits, valid = self.heads["current_node"](feat, nodes), context.instance.valid
            node = OneHotDist(logits, mask=None if valid is None else valid[:, None].expand_as(logits))
            losses["current_node"] = mean(-node.log_prob(batch["current_node"]))
            hit = (node.mode() == batch["current_node"]).float()
            metrics["current_node_accuracy"] = mean(hit)
        if "current_pos" in self.heads:
            if self.position_as_node:
                target = batch["current_node"][..., None].float()
            else:
                target = take_nodes(coords, batch["current_node"])
            losses["current_pos"] = mean(-SymlogGaussian(self.heads["current_pos"](feat)).log_prob(target))
        if "coords" in self.heads:
            target = coords.flatten(1)[:, None].expand(-1, feat.shape[1], -1)
            losses["coords"] = mean(-SymlogGaussian(self.heads["coords"](feat)).log_prob(target))

    def move_loss(
        self, batch: dict[str, Tensor], instance: Instance, feat: Float[Tensor, "B T F"] | None
    ) -> Float[Tensor, ""]:
        """Squared error of the move head: from the latent before each move, and the move, to the next row's reward.

        A belief answers for all the moves from its row to the end of the episode.
        """
        origin = take_nodes(instance.coords, batch["current_node"][:, :-1])
        target = take_nodes(instance.coords, batch["action"][:, :-1])
        # The last row's action was never carried out, and the next episode's first reward answers no action.
        weight = (self._row_weight(batch)[:, 1:] * ~batch["is_first"][:, 1:]).float()
        reward = batch["reward"][:, 1:]
        latent = feat[:, :-1] if feat is not None and self.reward_latent else None
        if self.belief is not None:
            # A belief that is asked about the next move alone need not remember what it knows.
            origin, target, latent = origin[:, None], target[:, None], self.believe(batch, instance)[:, :-1, None]
            weight, reward = (weight[:, None] * weight[:, :, None]).triu(), reward[:, None]
        predicted = self.predict_move(origin, target, latent)
        return ((predicted - reward).square() * weight).sum() / weight.sum().clamp(min=1)

    def predict_move(
        self, origin: Float[Tensor, "*#B 2"], target: Float[Tensor, "*#B 2"], latent: Float[Tensor, "*#B F"] | None
    ) -> Float[Tensor, "*B"]:
        """The reward that the move head expects of moves between two positions, by a latent feature or a belief."""
        return self.heads["reward"](origin, target, latent)

    @torch.no_grad()
    def predict_moves(self, instance: Instance, belief: Float[Tensor, "B L"] | None) -> Float[Tensor, "B N N"]:
        """What it expects of every move from a node (row) to a node (column) of each instance."""
        coords = instance.coords
        return self.predict_move(coords[:, :, None], coords[:, None], None if belief is None else belief[:, None, None])

    def predict_reward(self, feat: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """The reward that arrives with a latent, for tasks without rules."""
        return self._two_hot(feat).mean()

    def predict_cont(self, feat: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """The probability that the episode goes on times the discount factor, for tasks without routing rules."""
        return BernoulliDist(self.heads["cont"](feat).squeeze(-1)).mean()

    def predict_mask(self, feat: Float[Tensor, "B *Q F"], context: RoutingContext | None) -> Bool[Tensor, "B *Q N"]:
        """The action mask that the mask head decodes; its best logit is always kept open."""
        head = self.heads["mask"]
        logits = head(feat) if context is None else head(feat, context.nodes)
        if context is not None and context.instance.valid is not None:
            valid = context.instance.valid
            valid = valid.view(len(valid), *[1] * (logits.ndim - 2), -1)
            logits = logits.masked_fill(~valid, -torch.inf)
        return (logits > 0).scatter(-1, logits.argmax(-1, keepdim=True), True)

    @torch.no_grad()
    def open_loop(self, sequence: dict[str, Tensor], *, seen: int, noise: Float[Tensor, "B T S"]) -> dict[str, Tensor]:
        """Each key of the observation [B, T, ...] as the model has it: `seen` rows observed, the rest imagined.

        The actions are those of the sequence throughout.
        """
        assert self.decoder is not None, "what is not decoded cannot be shown"
        keys = {*self.task.encoded, "prev_action", "is_first"}
        shown = {name: sequence[name][:, :seen] for name in keys}
        latents = self.observe(shown, noise[:, :seen]).latents
        action = self.embed_action(sequence["prev_action"], None)
        latent = Latent(*(part[:, -1] for part in latents))
        imagined = []
        for step in range(seen, action.shape[1]):
            latent = self.rssm.imagine_step(latent, action[:, step], noise[:, step])
            imagined.append(latent.feat())
        return self.decoder.predict(torch.cat((latents.feat(), torch.stack(imagined, 1)), 1))

    def _two_hot(self, feat: Float[Tensor, "*B F"]) -> SymexpTwoHot:
        return SymexpTwoHot(self.heads["reward"](feat), self.bins)

    def _row_weight(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        if self.rules is None:
            return torch.ones_like(batch["reward"])
        return (batch["is_first"].cumsum(1) <= 1).float()
