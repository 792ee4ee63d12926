"""The world model, and the behaviour that is learnt inside it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from envs.routing import TSPInstance, TSPState
from envs.tasks import Task
from guard import Guard
from imagination import Imagination, Noise, Start, Trajectory, expand_instance, imagine
from networks import (
    MLP,
    RSSM,
    Critic,
    Latent,
    MaskedActor,
    MoveHead,
    NodeHead,
    PointerTables,
    RoutingEncoder,
    RoutingView,
    TSPPointerActor,
    VectorEncoder,
    take_nodes,
)
from optimizer import Optimizer
from tools import (
    BernoulliDist,
    OneHotDist,
    ReturnScale,
    SymexpTwoHot,
    SymlogGaussian,
    lambda_return,
    leave_one_out,
    symexp_bins,
    uniform,
)

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]


class RoutingContext(NamedTuple):
    """What never changes within an episode, encoded once for B instances."""

    instance: TSPInstance
    nodes: Float[Tensor, "B N E"]


class WorldModel(nn.Module):
    """An RSSM with an encoder and heads that fit the task.

    Routing: nodes are static context, encoded once per episode; observations and actions look them up. Any other
    task: vectors in, one-hot actions, and a decoder for the vectors.
    """

    bins: Tensor
    HEADS = ("reward", "cont", "mask", "current_node", "current_pos", "coords")

    def __init__(self, task: Task, settings: Any) -> None:
        """Build encoder, RSSM and every head whose loss scale is not 0.

        Args:
            task: what there is to model.
            settings: the config section `model`.

        Raises:
            ValueError: a loss scale names no head, or is given for one that this task cannot have.
        """
        super().__init__()
        self.task, self.rules = task, task.rules
        self.free_nats = settings.free_nats
        scales = settings.loss_scales.to_dict()
        units, layers = settings.units, settings.layers
        self.vector_encoder: VectorEncoder | None = None
        self.routing_encoder: RoutingEncoder | None = None
        if self.rules is None:
            self.vector_encoder = VectorEncoder(task.vectors, units=units, layers=layers)
            action_size, embed_size, node_size = task.num_actions, self.vector_encoder.embed_size, 0
            for name in ("mask", "current_node", "current_pos", "coords"):
                scales.pop(name)
        else:
            encoder = RoutingEncoder(self.rules.num_node_features, units=units, **settings.encoder.to_dict())
            self.routing_encoder = encoder
            action_size, embed_size, node_size = encoder.node_size, encoder.embed_size, encoder.node_size
            scales.pop("decoder")
        self.loss_scales = {name: scale for name, scale in scales.items() if scale}
        self.rssm = RSSM(action_size, embed_size, **settings.rssm.to_dict())
        feat_size = self.rssm.feat_size
        self.reward_latent = settings.reward_latent
        self.position_as_node = settings.current_pos == "node"
        self.register_buffer("bins", symexp_bins(settings.bins, device="cpu"))
        heads: dict[str, nn.Module] = {}
        if "reward" in self.loss_scales:
            if self.rules is None:
                heads["reward"] = MLP(feat_size, settings.bins, units=units, layers=1, zero_output=True)
            else:
                latent_size = feat_size if self.reward_latent else 0
                heads["reward"] = MoveHead(latent_size=latent_size, units=settings.move_units, layers=2)
        if "cont" in self.loss_scales:
            heads["cont"] = MLP(feat_size, 1, units=units, layers=1)
        for name in ("mask", "current_node"):
            if name in self.loss_scales:
                heads[name] = NodeHead(feat_size, node_size, units=units)
        if "current_pos" in self.loss_scales:
            heads["current_pos"] = MLP(feat_size, 1 if self.position_as_node else 2, units=units, layers=1)
        if "coords" in self.loss_scales:
            heads["coords"] = MLP(feat_size, 2 * task.num_actions, units=units, layers=1)
        if "decoder" in self.loss_scales:
            sizes = sum(task.vectors.values())
            heads["decoder"] = MLP(feat_size, sizes, units=units, layers=layers)
        self.heads = nn.ModuleDict(heads)

    def context(self, instance: TSPInstance) -> RoutingContext:
        """Encode the static part of B instances."""
        assert self.rules is not None and self.routing_encoder is not None, "only routing has static context"
        return RoutingContext(instance=instance, nodes=self.routing_encoder.nodes(self.rules.node_features(instance)))

    def episode_context(self, batch: dict[str, Tensor]) -> tuple[RoutingContext | None, RoutingView | None]:
        """Context and view of a batch of whole episodes; nothing of either for a task without rules."""
        if self.rules is None:
            return None, None
        instance, _ = self.rules.restore({key: value[:, 0] for key, value in batch.items()})
        first = torch.zeros_like(batch["current_node"])
        view = RoutingView(first=first, current=batch["current_node"], action_mask=batch["action_mask"])
        return self.context(instance), view

    def encode(
        self, obs: dict[str, Tensor], context: RoutingContext | None, view: RoutingView | None
    ) -> Float[Tensor, "*B U"]:
        """Embed observations."""
        if self.vector_encoder is not None:
            return self.vector_encoder(obs)
        assert self.routing_encoder is not None and context is not None and view is not None
        return self.routing_encoder(context.nodes, view)

    def embed_action(
        self, action: Int[Tensor, "B *Q"], context: RoutingContext | None
    ) -> Float[Tensor, "B *Q A"]:
        """What the RSSM sees of an action: the embedding of the node chosen, or a one-hot vector."""
        if context is None:
            return functional.one_hot(action, self.task.num_actions).float()
        return take_nodes(context.nodes, action)

    def observe(
        self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]
    ) -> tuple[Latent, OneHotDist, OneHotDist, RoutingContext | None]:
        """Latents [B, T] of replayed sequences, with their posterior and prior, and the sequences' context."""
        context, view = self.episode_context(batch)
        embed = self.encode(batch, context, view)
        action = self.embed_action(batch["prev_action"], context)
        latents, posterior, prior = self.rssm.observe(embed, action, batch["is_first"], noise)
        return latents, posterior, prior, context

    def begin(self, context: RoutingContext, state: TSPState, noise: Float[Tensor, "B Q S"] | None) -> Latent:
        """Latents after the first observation of episodes that begin in `state`, [B, Q]."""
        assert self.rules is not None
        view = RoutingView(first=state.first, current=state.current, action_mask=self.rules.action_mask(state))
        embed = self.encode({}, context, view).flatten(0, 1)
        rows = embed.shape[0]
        no_action = embed.new_zeros(rows, context.nodes.shape[-1])
        is_first = torch.ones(rows, dtype=torch.bool, device=embed.device)
        noise = None if noise is None else noise.flatten(0, 1)
        latent, _ = self.rssm.observe_step(self.rssm.initial((rows,)), no_action, embed, is_first, noise)
        return Latent(*(part.unflatten(0, state.current.shape) for part in latent))

    def loss(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> tuple[Losses, Metrics]:
        """The losses of one batch, each a mean over rows, in the order in which values flow.

        Rows beyond the first episode of a whole-episode batch carry no weight.
        """
        latents, posterior, prior, context = self.observe(batch, noise)
        feat = latents.feat()
        weight = self._row_weight(batch)
        losses, metrics = {}, {}

        def mean(values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
            return (values * weight).sum() / weight.sum()

        # DreamerV3, eq. 3: each side of the KL is pulled towards the other's detached value, free below `free_nats`.
        losses["dyn"] = mean(posterior.detach().kl(prior).sum(-1).clamp(min=self.free_nats))
        losses["rep"] = mean(posterior.kl(prior.detach()).sum(-1).clamp(min=self.free_nats))
        metrics["prior_entropy"] = prior.entropy().sum(-1).mean()
        metrics["posterior_entropy"] = posterior.entropy().sum(-1).mean()
        if "reward" in self.heads:
            if context is None:
                losses["reward"] = mean(-self._two_hot(feat).log_prob(batch["reward"]))
            else:
                losses["reward"] = self.move_loss(batch, context.instance, feat)
        if "cont" in self.heads:
            cont = BernoulliDist(self.heads["cont"](feat).squeeze(-1))
            losses["cont"] = mean(-cont.log_prob(~batch["is_terminal"]))
        if "decoder" in self.heads:
            target = torch.cat([batch[key].float() for key in sorted(self.task.vectors)], -1)
            losses["decoder"] = mean(-SymlogGaussian(self.heads["decoder"](feat)).log_prob(target))
        if context is not None:
            self._routing_losses(batch, context, feat, mean, losses, metrics)
        assert set(losses) == set(self.loss_scales), f"losses {set(losses)} differ from scales {set(self.loss_scales)}"
        for name, value in losses.items():
            metrics[f"{name}_loss"] = value.detach()
        return losses, metrics

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
            losses["mask"] = mean(-dist.log_prob(batch["action_mask"]).mean(-1))
            metrics["mask_accuracy"] = mean((dist.mode() == batch["action_mask"]).float().mean(-1)).detach()
        if "current_node" in self.heads:
            node = OneHotDist(self.heads["current_node"](feat, nodes))
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
        self, batch: dict[str, Tensor], instance: TSPInstance, feat: Float[Tensor, "B T F"] | None
    ) -> Float[Tensor, ""]:
        """Squared error of the move head: from the latent before each move, and the move, to the next row's reward."""
        origin = take_nodes(instance.coords, batch["current_node"][:, :-1])
        target = take_nodes(instance.coords, batch["action"][:, :-1])
        predicted = self.predict_move(origin, target, None if feat is None else feat[:, :-1])
        # The last row's action was never carried out, and the next episode's first reward answers no action.
        weight = (self._row_weight(batch)[:, 1:] * ~batch["is_first"][:, 1:]).float()
        return ((predicted - batch["reward"][:, 1:]).square() * weight).sum() / weight.sum().clamp(min=1)

    def predict_move(
        self, origin: Float[Tensor, "*B 2"], target: Float[Tensor, "*B 2"], feat: Float[Tensor, "*B F"] | None
    ) -> Float[Tensor, "*B"]:
        """The reward that the move head expects of moves between two positions."""
        return self.heads["reward"](origin, target, feat if self.reward_latent else None)

    def predict_reward(self, feat: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """The reward that arrives with a latent, for tasks without rules."""
        return self._two_hot(feat).mean()

    def predict_cont(self, feat: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """The probability that the episode goes on, for tasks without rules."""
        return BernoulliDist(self.heads["cont"](feat).squeeze(-1)).mean()

    def predict_mask(self, feat: Float[Tensor, "B *Q F"], context: RoutingContext) -> Bool[Tensor, "B *Q N"]:
        """The action mask that the mask head decodes; its best logit is always kept open."""
        logits = self.heads["mask"](feat, context.nodes)
        return (logits > 0).scatter(-1, logits.argmax(-1, keepdim=True), True)

    def _two_hot(self, feat: Float[Tensor, "*B F"]) -> SymexpTwoHot:
        return SymexpTwoHot(self.heads["reward"](feat), self.bins)

    def _row_weight(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        if self.rules is None:
            return torch.ones_like(batch["reward"])
        return (batch["is_first"].cumsum(1) <= 1).float()


def make_actor(task: Task, feat_size: int, settings: Any) -> TSPPointerActor | MaskedActor:
    """The actor that the config section `actor` describes.

    Raises:
        ValueError: an unknown type, or a pointer for a task without nodes.
    """
    if settings.type == "tsp_pointer":
        if task.rules is None:
            raise ValueError("actor.type tsp_pointer points at nodes, and this task has none; choose mlp or masked")
        pointer = settings.pointer.to_dict()
        return TSPPointerActor(feat_size, task.rules.num_node_features, unimix=settings.unimix, **pointer)
    if settings.type in ("masked", "mlp"):
        # The two differ in name only: the mask is an argument of the distribution, and there whenever the task has one.
        return MaskedActor(
            feat_size, task.num_actions, units=settings.units, layers=settings.layers, unimix=settings.unimix
        )
    raise ValueError(f"actor.type is {settings.type!r}; choose tsp_pointer, masked or mlp")


class ImagBehavior(nn.Module):
    """Actor and critic, learnt from imagined trajectories."""

    def __init__(
        self, task: Task, model: WorldModel, *, imagination: Imagination, actor: Any, critic: Any, schedule: Any,
        guard: Guard,
    ) -> None:
        """Build actor, critic and their optimisers.

        Args:
            task: what is to be solved.
            model: its sizes decide those of actor and critic; it is handed to every call, not kept.
            imagination: how to imagine.
            actor: the config section of that name.
            critic: likewise.
            schedule: the config section of the learning rates' schedule.
            guard: told of everything that is not finite.

        Raises:
            ValueError: the parts do not fit the task or one another.
        """
        super().__init__()
        if task.rules is None and (imagination.horizon == "episode" or imagination.reward != "head"):
            raise ValueError("a task without rules needs imag_horizon as a number of steps and imag_reward: head")
        if imagination.mask == "predicted" and "mask" not in model.heads:
            raise ValueError("imag_mask: predicted needs the mask head: set model.loss_scales.mask above 0")
        if imagination.reward == "head" and "reward" not in model.heads:
            raise ValueError("imag_reward: head needs the reward head: set model.loss_scales.reward above 0")
        self.task, self.imagination = task, imagination
        self.entropy, self.entropy_final = actor.entropy, actor.entropy_final
        feat_size = model.rssm.feat_size
        self.actor = make_actor(task, feat_size, actor)
        node_features = None if task.rules is None else task.rules.num_node_features
        self.critic_latent = critic.latent or task.rules is None
        self.critic = Critic(
            feat_size if self.critic_latent else 0,
            node_features,
            units=critic.units,
            layers=critic.layers,
            bins=critic.bins,
        )
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_scale, self.critic_share = critic.slow_rate, critic.slow_scale, critic.share
        self.scale = ReturnScale(actor.advantage_scale, floor=actor.advantage_floor)
        self.needs_latent = bool(
            self.actor.latent_size
            or self.critic_latent
            or imagination.mask == "predicted"
            or imagination.gradient != "reinforce"
            or (imagination.reward == "head" and model.reward_latent)
        )
        self.custom_reward = load_function(imagination.reward) if ":" in imagination.reward else None
        self.guard = guard
        schedule = schedule.to_dict()
        self.actor_optimizer = Optimizer(
            "actor", {"actor": self.actor}, guard=guard, lr=actor.lr, clip=actor.grad_clip, **schedule
        )
        self.critic_optimizer = Optimizer(
            "critic", {"critic": self.critic}, guard=guard, lr=critic.lr, clip=critic.grad_clip, **schedule
        )

    def update(
        self,
        model: WorldModel,
        batch: dict[str, Tensor],
        *,
        progress: float,
        reward_range: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> Metrics:
        """Imagine from a batch, and improve actor and critic once.

        Args:
            model: the world to imagine in.
            batch: replayed sequences; whole episodes in routing.
            progress: the share of the run that is over, for schedules.
            reward_range: the smallest and largest reward in replay, 0-d.
            generator: draws all noise.
        """
        choice = self.imagination
        start = self.start(model, batch, generator)
        tables = self._tables(model, start.context)
        differentiable = choice.gradient != "reinforce"
        horizon = model.rules.episode_steps(self.task.num_actions) if choice.horizon == "episode" else choice.horizon
        noise = self._noise(model, start.weight.shape, horizon, generator)
        # Without a graph the roll-out is cheap, and all its decisions are scored in one pass afterwards.
        trajectory = imagine(
            model,
            self.actor,
            start=start,
            tables=tables if differentiable or tables is None else tables.detach(),
            noise=noise,
            horizon=horizon,
            mask=choice.mask,
            differentiable=differentiable,
        )
        with torch.set_grad_enabled(differentiable):
            reward = self.reward(model, trajectory, start)
        weight = trajectory.alive * choice.discount ** torch.arange(horizon, device=reward.device)
        targets, advantage, metrics = self.targets(model, trajectory, start, reward, reward_range)
        metrics |= self._update_critic(model, trajectory, start, targets.detach(), weight, progress)
        metrics |= self._update_actor(trajectory, tables, targets, advantage, weight, progress)
        return metrics | self._legality(trajectory)

    @torch.no_grad()
    def imagine_greedily(
        self, model: WorldModel, instance: TSPInstance
    ) -> tuple[Trajectory, Float[Tensor, "B 1 H"]]:
        """The likeliest whole episode of each instance, and what the model expects it to earn."""
        assert model.rules is not None
        context = model.context(instance)
        size, num_nodes = instance.coords.shape[:2]
        state = model.rules.reset(expand_instance(instance, torch.Size((size, 1))))
        latent = model.begin(context, state, None) if self.needs_latent else None
        start = Start(latent, state, context, torch.ones((size, 1), device=instance.coords.device))
        trajectory = imagine(
            model,
            self.actor,
            start=start,
            tables=self._tables(model, context),
            noise=None,
            horizon=model.rules.episode_steps(num_nodes),
            mask=self.imagination.mask,
        )
        return trajectory, self.reward(model, trajectory, start)

    def _tables(self, model: WorldModel, context: RoutingContext | None) -> PointerTables | None:
        if context is None or model.rules is None or not isinstance(self.actor, TSPPointerActor):
            return None
        return self.actor.encode(model.rules.node_features(context.instance))

    def start(self, model: WorldModel, batch: dict[str, Tensor], generator: torch.Generator) -> Start:
        """Where to imagine from: `imag_tours` trajectories from each episode's start, or from every replayed row."""
        choice, tours = self.imagination, self.imagination.tours
        rules = model.rules
        size, rows = batch["reward"].shape
        noise_size = model.rssm.stoch_size
        with torch.no_grad():
            if rules is not None and choice.start == "episodes":
                instance, _ = rules.restore({key: value[:, 0] for key, value in batch.items()})
                if choice.augment:
                    instance = rules.augment(instance, generator)
                context = model.context(instance)
                first = None
                if choice.first == "any":
                    spread = torch.arange(tours, device=batch["reward"].device) * self.task.num_actions // tours
                    first = spread.expand(size, -1)
                state = rules.reset(expand_instance(instance, torch.Size((size, tours))), first)
                latent = None
                if self.needs_latent:
                    latent = model.begin(context, state, uniform((size, tours, noise_size), generator))
                return Start(latent, state, context, torch.ones((size, tours), device=batch["reward"].device))
            latents, _, _, context = model.observe(batch, uniform((size, rows, noise_size), generator))
            weight = (~batch["is_terminal"]).float()
            state = None
            if rules is not None:
                _, state = rules.restore(batch)
                state = type(state)(*(part.repeat_interleave(tours, 1) for part in state))
                weight = weight * (batch["is_first"].cumsum(1) <= 1)
            latent = Latent(*(part.repeat_interleave(tours, 1) for part in latents))
            return Start(latent, state, context, weight.repeat_interleave(tours, 1))

    def reward(self, model: WorldModel, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What the imagined actions earn, by the head, the true cost, or the user's function; 0 once an episode ended."""
        choice = self.imagination
        feat, state, action = trajectory.feat, trajectory.state, trajectory.action
        if model.rules is None:
            assert feat is not None
            return model.predict_reward(feat[:, :, 1:])
        assert state is not None and start.context is not None and trajectory.true_mask is not None
        instance = start.context.instance
        before = type(state)(*(part[:, :, :-1] for part in state))
        if choice.reward == "head":
            if trajectory.positions is not None:
                origin, target = trajectory.positions
            else:
                origin = take_nodes(instance.coords, before.current)
                target = take_nodes(instance.coords, action)
            reward = model.predict_move(origin, target, None if feat is None else feat[:, :, :-1])
        else:
            expanded = expand_instance(instance, action.shape)
            if self.custom_reward is not None:
                reward = self.custom_reward(expanded, before, action)
            else:
                reward = -model.rules.cost(expanded, before, action)
        if choice.penalty:
            legal = trajectory.true_mask[:, :, :-1].gather(-1, action[..., None]).squeeze(-1)
            reward = reward - choice.penalty * (~legal)
        return reward * trajectory.alive

    def targets(
        self,
        model: WorldModel,
        trajectory: Trajectory,
        start: Start,
        reward: Float[Tensor, "B Q H"],
        reward_range: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "B Q H"], Float[Tensor, "B Q H"], Metrics]:
        """Return targets, advantages (scaled, without a graph), and metrics of both."""
        choice = self.imagination
        discount = choice.discount * trajectory.cont
        metrics: Metrics = {}
        if choice.baseline == "critic":
            nodes = self._critic_nodes(model, start.context, self.critic)
            with torch.set_grad_enabled(trajectory.positions is not None or choice.gradient != "reinforce"):
                value = self._value(self.critic, trajectory, nodes, slice(None)).mean()
            metrics |= _statistics("value", value)
            returns = lambda_return(reward, value, discount, lambda_=choice.lambda_)
        else:
            # The episode ends within the horizon, so nothing is left to bootstrap from.
            value = torch.zeros(1, device=reward.device).expand(*reward.shape[:-1], reward.shape[-1] + 1)
            returns = lambda_return(reward, value, discount, lambda_=1.0)
        low, high = self.bounds(model, trajectory, start, reward_range)
        if low is not None:
            clipped = torch.maximum(torch.minimum(returns, high), low)
            outside = ((clipped != returns) * trajectory.alive).sum() / trajectory.alive.sum()
            metrics["target_clip_rate"] = outside.detach()
            returns = clipped
        detached = returns.detach()
        metrics |= _statistics("target", detached)
        self.scale.update(detached[:, :, 0] if choice.horizon == "episode" else detached)
        if choice.baseline == "critic":
            baseline = value[:, :, :-1].detach()
            advantage = detached - baseline
        else:
            whole = detached[:, :, 0].unflatten(1, (-1, choice.tours))
            baseline = leave_one_out(whole.flatten(0, 1)).view_as(detached[:, :, 0])
            advantage = (detached[:, :, 0] - baseline)[..., None].expand_as(detached)
        advantage = advantage / self.scale.scale()
        metrics["advantage_scale"] = self.scale.scale()
        metrics["advantage_std"] = advantage.std()
        metrics["imag_return"] = (reward.detach() * trajectory.alive).sum(-1).mean()
        return returns, advantage, metrics

    def bounds(
        self, model: WorldModel, trajectory: Trajectory, start: Start, reward_range: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The range that returns can lie in, [B, Q, H] or 0-d; None where none is known.

        Simulated: the legs that remain times this instance's longest, and 0 above. Learned: the legs that remain times
        1.5 times the largest move cost in replay, and likewise above if a positive reward was seen. A penalty widens
        the range by its largest sum.
        """
        choice = self.imagination
        if choice.target_clip == "none":
            return None, None
        if not isinstance(choice.target_clip, str):
            low, high = choice.target_clip
            device = trajectory.action.device
            return torch.full((), low, device=device), torch.full((), high, device=device)
        if model.rules is None or self.custom_reward is not None:
            return None, None
        assert trajectory.state is not None and start.context is not None
        before = type(trajectory.state)(*(part[:, :, :-1] for part in trajectory.state))
        legs = model.rules.remaining_legs(before).float()
        if choice.reward == "simulated":
            worst = model.rules.longest_leg(start.context.instance)[:, None, None]
            best = torch.zeros_like(worst)
        else:
            smallest, largest = reward_range
            worst = 1.5 * (-smallest).clamp(min=0)
            best = 1.5 * largest.clamp(min=0)
        return -legs * worst - choice.penalty * legs.shape[-1], legs * best

    def _update_actor(
        self,
        trajectory: Trajectory,
        tables: PointerTables | None,
        targets: Float[Tensor, "B Q H"],
        advantage: Float[Tensor, "B Q H"],
        weight: Float[Tensor, "B Q H"],
        progress: float,
    ) -> Metrics:
        choice = self.imagination
        if trajectory.log_prob is not None and trajectory.entropy is not None:
            log_prob, entropy = trajectory.log_prob, trajectory.entropy
        else:
            feat = None if trajectory.feat is None else trajectory.feat[:, :, :-1]
            dist = self.actor(feat, tables, trajectory.view(slice(0, -1)))
            log_prob, entropy = dist.log_prob(trajectory.action), dist.entropy()
        reinforce = log_prob * advantage
        objective = reinforce
        if choice.gradient == "dynamics":
            objective = targets / self.scale.scale()
        elif choice.gradient == "both":
            objective = (1 - choice.gradient_mix) * reinforce + choice.gradient_mix * targets / self.scale.scale()
        coefficient = self.entropy + (self.entropy_final - self.entropy) * progress
        total = weight.sum()
        loss = -((objective + coefficient * entropy) * weight).sum() / total
        _, metrics = self.actor_optimizer.step(loss, progress=progress)
        metrics["actor_entropy"] = ((entropy.detach() * weight).sum() / total)
        return metrics

    def _update_critic(
        self,
        model: WorldModel,
        trajectory: Trajectory,
        start: Start,
        targets: Float[Tensor, "B Q H"],
        weight: Float[Tensor, "B Q H"],
        progress: float,
    ) -> Metrics:
        """Fit the critic to the targets, and to its own slow copy (DreamerV3, eq. 8)."""
        if self.imagination.baseline == "leave_one_out":
            # Nobody waits for this critic: it learns from a share of the instances, and one tour of each start.
            count = max(1, round(self.critic_share * targets.shape[0]))
            trajectory, start = _thin(trajectory, start, count, self.imagination.tours)
            targets = targets[:count, :: self.imagination.tours]
            weight = weight[:count, :: self.imagination.tours]
        nodes = self._critic_nodes(model, start.context, self.critic)
        dist = self._value(self.critic, trajectory, nodes, slice(0, -1), detach=True)
        with torch.no_grad():
            slow_nodes = self._critic_nodes(model, start.context, self.slow_critic)
            slow = self._value(self.slow_critic, trajectory, slow_nodes, slice(0, -1)).mean()
        loss = -dist.log_prob(targets) - self.slow_scale * dist.log_prob(slow)
        loss = (loss * weight).sum() / weight.sum()
        applied, metrics = self.critic_optimizer.step(loss, progress=progress)
        torch._foreach_lerp_(
            list(self.slow_critic.parameters()), [p.detach() for p in self.critic.parameters()], self.slow_rate * applied
        )
        error = (dist.mean().detach() - targets).square()
        metrics["critic_error"] = ((error * weight).sum() / weight.sum()).sqrt()
        if self.imagination.baseline == "leave_one_out":
            metrics |= _statistics("value", dist.mean().detach())
        return metrics

    def _critic_nodes(
        self, model: WorldModel, context: RoutingContext | None, critic: Critic
    ) -> Float[Tensor, "B N E"] | None:
        if context is None or model.rules is None:
            return None
        return critic.encode(model.rules.node_features(context.instance))

    def _value(
        self,
        critic: Critic,
        trajectory: Trajectory,
        nodes: Float[Tensor, "B N E"] | None,
        steps: slice,
        *,
        detach: bool = False,
    ) -> SymexpTwoHot:
        feat = trajectory.feat if self.critic_latent else None
        if feat is not None:
            feat = feat[:, :, steps].detach() if detach else feat[:, :, steps]
        return critic(feat, nodes, trajectory.view(steps))

    def _legality(self, trajectory: Trajectory) -> Metrics:
        """How often actions were illegal, and how well the actor's mask agreed with the rules', step by step."""
        mask, true_mask = trajectory.mask, trajectory.true_mask
        if mask is None or true_mask is None:
            return {}
        legal = true_mask[:, :, :-1].gather(-1, trajectory.action[..., None]).squeeze(-1)
        alive = trajectory.alive
        metrics = {"miss_rate": ((~legal) * alive).sum() / alive.sum()}
        steps = range(mask.shape[2] - 1) if self.imagination.mask == "predicted" else range(1)
        for step in steps:
            metrics[f"imag_mask_step_{step}"] = (mask[:, :, step] == true_mask[:, :, step]).float().mean()
            metrics[f"imag_legal_step_{step}"] = true_mask[:, :, step].sum(-1).float().mean()
        return metrics

    def _noise(
        self, model: WorldModel, shape: torch.Size, horizon: int, generator: torch.Generator
    ) -> Noise:
        latent_size = model.rssm.stoch_size if self.needs_latent else 0
        return Noise(
            latent=uniform((horizon, *shape, latent_size), generator), action=uniform((horizon, *shape), generator)
        )


def load_function(name: str) -> Callable[..., Tensor]:
    """The function that `module:function` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"imag_reward names {name!r}, which cannot be loaded: {error}") from error


def _statistics(name: str, values: Tensor) -> Metrics:
    values = values.detach()
    return {f"{name}_min": values.min(), f"{name}_max": values.max(), f"{name}_mean": values.mean()}


def _thin(trajectory: Trajectory, start: Start, count: int, tours: int) -> tuple[Trajectory, Start]:
    """The first `count` instances, and the first of every `tours` trajectories."""

    def thin(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, tuple):
            parts = [thin(each) for each in part]
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        return part[:count, ::tours]

    context = start.context
    if context is not None:
        instance = type(context.instance)(*(part[:count] for part in context.instance))
        context = type(context)(instance=instance, nodes=context.nodes[:count])
    return thin(trajectory), start._replace(context=context)
