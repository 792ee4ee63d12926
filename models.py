"""The behaviour that is learnt inside the world model: actor and critic, from imagined trajectories."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import UserError
from envs.rules import Instance
from envs.tasks import Task
from guard import Guard
from imagination import Imagination, Noise, Start, Trajectory, imagine, legality, thin
from layers import initialise, use_layer_norm
from networks import Critic, MaskedActor, PointerTables, TSPPointerActor, saturation
from optimizer import Optimizer
from returns import Returns, replayed_returns, statistics
from starts import episode_starts, start_from
from tools import ReturnScale, SymexpTwoHot, follow_slowly, uniform
from world_model import Metrics, Observed, WorldModel

__all__ = ["ImagBehavior", "WorldModel", "make_actor"]


def make_actor(task: Task, feat_size: int, settings: Any, *, belief_size: int = 0) -> TSPPointerActor | MaskedActor:
    """The actor that the config section `actor` describes; a pointer takes a belief of `belief_size` numbers.

    Raises:
        UserError: an unknown type, or one that does not fit the task.
    """
    if settings.type == "tsp_pointer":
        if task.rules is None:
            raise UserError("actor.type tsp_pointer points at nodes, and this task has none; choose mlp or masked")
        sizes = {"state_features": task.rules.num_state_features, "belief": belief_size, **settings.pointer.to_dict()}
        return TSPPointerActor(feat_size, task.rules.num_node_features, unimix=settings.unimix, **sizes)
    if settings.type in ("masked", "mlp"):
        # The two differ in name only: the mask is an argument of the distribution, and there whenever the task has one.
        return MaskedActor(
            feat_size, task.actions, units=settings.units, layers=settings.layers, unimix=settings.unimix
        )
    raise UserError(f"actor.type is {settings.type!r}; choose tsp_pointer, masked or mlp")


class ImagBehavior(nn.Module):
    """Actor and critic, learnt from imagined trajectories."""

    def __init__(
        self,
        task: Task,
        model: WorldModel,
        *,
        imagination: Imagination,
        actor: Any,
        critic: Any,
        optimizer: dict[str, Any],
        guard: Guard,
        norm: str = "rms",
        initialisation: str = "torch",
    ) -> None:
        """Build actor, critic and their optimisers.

        Args:
            task: what is to be solved.
            model: its sizes decide those of actor and critic; it is handed to every call, not kept.
            imagination: how to imagine.
            actor: the config section of that name.
            critic: likewise.
            optimizer: what actor's and critic's optimisers share: schedule and algorithm.
            guard: told of everything that is not finite.
            norm: "rms" or "layer".
            initialisation: "torch" or "published".

        Raises:
            UserError: the parts do not fit the task or one another.
        """
        super().__init__()
        if task.rules is None and (imagination.horizon == "episode" or imagination.reward != "head"):
            raise UserError("a task without rules needs imag_horizon as a number of steps and imag_reward: head")
        if task.rules is not None and imagination.first == "any" and not task.rules.starts_anywhere:
            raise UserError(f"task {task.rules.name} begins at node 0 only: it needs imag_first: stored")
        costs = None if task.rules is None else task.rules.costs
        if costs is not None and costs.hidden and imagination.reward == "simulated":
            raise UserError(f"costs of {costs.name} depend on what is hidden: they need imag_reward: head")
        if costs is not None and imagination.augment and not costs.symmetric:
            raise UserError(
                f"costs of {costs.name} differ under the square's symmetries: they need imag_augment: false"
            )
        if model.belief_size and (imagination.start != "rows" or imagination.reward != "head"):
            raise UserError(
                "model.belief is what the head expects and the actor knows where imagined tours begin, and there is"
                f" nothing to believe before the first move: it needs imag_reward: head and imag_start: rows, got"
                f" {imagination.reward} and {imagination.start}"
            )
        if model.belief is not None and actor.type != "tsp_pointer":
            raise UserError(f"only actor.type: tsp_pointer reads a belief, got {actor.type}: set model.belief: false")
        if imagination.reward == "head" and "reward" not in model.heads:
            raise UserError("imag_reward: head needs the reward head: set model.loss_scales.reward above 0")
        self.task, self.imagination = task, imagination
        # Where nobody wrote down how the mask changes, it is predicted.
        knows_mask = task.rules is not None or task.mask_rules is not None or not task.actions.masked
        self.mask_from = imagination.mask if knows_mask else "predicted"
        if self.mask_from == "predicted" and "mask" not in model.heads:
            raise UserError("a predicted mask needs the mask head: set model.loss_scales.mask above 0")
        # The `cont` head of a task without routing rules predicts the discount with it.
        self.discount = imagination.discount if task.rules is not None else 1.0
        self.returns = Returns(imagination, discount=self.discount)
        self.entropy, self.entropy_final = actor.entropy, actor.entropy_final
        feat_size = model.rssm.feat_size
        self.actor = make_actor(task, feat_size, actor, belief_size=model.belief_size)
        node_features = None if task.rules is None else task.rules.num_node_features
        self.critic_latent = critic.latent or task.rules is None
        self.critic = Critic(
            feat_size if self.critic_latent else 0,
            node_features,
            state_features=0 if task.rules is None else task.rules.num_state_features,
            units=critic.units,
            layers=critic.layers,
            bins=critic.bins,
        )
        if norm == "layer":
            use_layer_norm(self.actor)
            use_layer_norm(self.critic)
        if initialisation == "published":
            initialise(self.actor)
            initialise(self.critic)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_scale, self.critic_share = critic.slow_rate, critic.slow_scale, critic.share
        self.replay_scale = critic.replay_scale
        self.scale = ReturnScale(actor.advantage_scale, floor=actor.advantage_floor)
        self.needs_latent = bool(
            self.actor.latent_size
            or self.critic_latent
            or self.mask_from == "predicted"
            or imagination.gradient != "reinforce"
            or (imagination.reward == "head" and model.reward_latent)
        )
        self.actor_optimizer = Optimizer(
            "actor", {"actor": self.actor}, guard=guard, lr=actor.lr, clip=actor.grad_clip, **optimizer
        )
        self.critic_optimizer = Optimizer(
            "critic", {"critic": self.critic}, guard=guard, lr=critic.lr, clip=critic.grad_clip, **optimizer
        )

    def losses(
        self,
        model: WorldModel,
        batch: dict[str, Tensor],
        observed: Observed | None,
        *,
        progress: float,
        reward_range: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Imagine from a batch: what actor and critic are to minimise.

        Args:
            model: the world to imagine in.
            batch: replayed sequences; whole episodes in routing.
            observed: the batch's latents where they are known already, with the graph that led to them.
            progress: the share of the run that is over, for schedules.
            reward_range: the smallest and largest reward in replay, 0-d.
            generator: draws all noise.

        Returns:
            The losses `actor`, `critic` and, where the critic learns from replayed rewards too, `replay_value`, which
            reaches the world model through `observed`; and metrics.
        """
        choice = self.imagination
        differentiable = choice.gradient != "reinforce"
        start = self.start(model, batch, observed, generator)
        tables = self.tables(model, start.instance, start.belief)
        horizon = self._horizon()
        noise = self._noise(model, start.weight.shape, horizon, generator)
        # A gradient that flows through imagined dynamics is the actor's alone.
        with _frozen(model, self.critic) if differentiable else torch.no_grad():
            # Without a graph the roll-out is cheap, and all its decisions are scored in one pass afterwards.
            trajectory = imagine(
                model,
                self.actor,
                start=start,
                tables=tables if differentiable or tables is None else tables.detach(),
                noise=noise,
                horizon=horizon,
                mask=self.mask_from,
                differentiable=differentiable,
            )
            reward = self.returns.reward(model, trajectory, start)
            targets, advantage, metrics = self.targets(model, trajectory, start, reward, reward_range)
        weight = trajectory.alive * self.discount ** torch.arange(reward.shape[-1], device=reward.device)
        losses: dict[str, Tensor] = {}
        losses["actor"] = self._actor_loss(trajectory, tables, targets, advantage, weight, progress, metrics)
        losses["critic"] = self._critic_loss(model, trajectory, start, targets.detach(), weight, metrics)
        if self.replay_scale and observed is not None and self.task.rules is None:
            losses["replay_value"] = self.replay_scale * self._replay_value_loss(model, batch, observed, targets)
        return losses, metrics | legality(trajectory, every_step=self.mask_from == "predicted")

    @torch.no_grad()
    def follow(self, applied: dict[str, Tensor]) -> None:
        """Let slow critic and return statistics follow an update that was applied (1) or skipped (0), by optimiser."""
        weight = self.slow_rate * applied["critic"]
        follow_slowly(list(self.slow_critic.parameters()), list(self.critic.parameters()), weight)
        self.scale.revert_unless(applied["actor"])

    @torch.no_grad()
    def imagine_greedily(self, model: WorldModel, instance: Instance) -> tuple[Trajectory, Float[Tensor, "B 1 H"]]:
        """The likeliest whole episode of each instance, and what the model expects it to earn."""
        assert model.rules is not None
        start = episode_starts(model, instance, tours=1, needs_latent=self.needs_latent, generator=None)
        trajectory = imagine(
            model,
            self.actor,
            start=start,
            tables=self.tables(model, start.instance, start.belief),
            noise=None,
            horizon=model.rules.episode_steps(instance.coords.shape[1]),
            mask=self.mask_from,
        )
        return trajectory, self.returns.reward(model, trajectory, start)

    def tables(
        self, model: WorldModel, instance: Instance | None, belief: Float[Tensor, "B L"] | None
    ) -> PointerTables | None:
        """What a pointer needs of instances, and of what is believed of their hidden costs; None for other actors."""
        if instance is None or model.rules is None or not isinstance(self.actor, TSPPointerActor):
            return None
        nodes = model.rules.node_features(instance)
        if belief is None:
            return self.actor.encode(nodes, valid=instance.valid)
        return self.actor.encode(nodes, belief, model.predict_moves(instance, belief), valid=instance.valid)

    def start(
        self, model: WorldModel, batch: dict[str, Tensor], observed: Observed | None, generator: torch.Generator
    ) -> Start:
        """Where to imagine from, given a batch."""
        return start_from(
            model,
            batch,
            observed,
            imagination=self.imagination,
            needs_latent=self.needs_latent,
            generator=generator,
        )

    def targets(
        self,
        model: WorldModel,
        trajectory: Trajectory,
        start: Start,
        reward: Float[Tensor, "B Q H"],
        reward_range: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "B Q H"], Float[Tensor, "B Q H"], Metrics]:
        """Return targets, advantages (scaled, without a graph), and metrics of both."""
        value = None
        if self.imagination.baseline == "critic":
            value = self._value(model, self.critic, trajectory, start, slice(None)).mean()
        returns, metrics = self.returns.targets(
            model, trajectory, start, reward, value=value, reward_range=reward_range
        )
        detached = returns.detach()
        self.scale.update(detached[:, :, 0] if self.imagination.horizon == "episode" else detached)
        scale = self.scale.scale()
        advantage = self.returns.advantage(detached, None if value is None else value.detach()) / scale
        metrics |= {"advantage_scale": scale, **statistics("advantage", advantage, trajectory.alive)}
        return returns, advantage, metrics

    def _actor_loss(
        self,
        trajectory: Trajectory,
        tables: PointerTables | None,
        targets: Float[Tensor, "B Q H"],
        advantage: Float[Tensor, "B Q H"],
        weight: Float[Tensor, "B Q H"],
        progress: float,
        metrics: Metrics,
    ) -> Float[Tensor, ""]:
        choice, penalty = self.imagination, torch.zeros((), device=advantage.device)
        if trajectory.log_prob is not None and trajectory.entropy is not None:
            log_prob, entropy = trajectory.log_prob, trajectory.entropy
        else:
            feat = None if trajectory.feat is None else trajectory.feat[:, :, :-1]
            view = trajectory.view(slice(0, -1))
            if isinstance(self.actor, TSPPointerActor):
                assert view is not None
                scores = self.actor.scores(feat, tables, view)
                dist = self.actor.distribution(scores, view)
                penalty, metrics["actor_saturation"] = saturation(scores, view.action_mask)
            else:
                dist = self.actor(feat, tables, view)
            log_prob, entropy = dist.log_prob(trajectory.action), dist.entropy()
        reinforce = log_prob * advantage
        objective = reinforce
        if choice.gradient == "dynamics":
            objective = targets / self.scale.scale()
        elif choice.gradient == "both":
            objective = (1 - choice.gradient_mix) * reinforce + choice.gradient_mix * targets / self.scale.scale()
        coefficient = self.entropy + (self.entropy_final - self.entropy) * progress
        total = weight.sum()
        metrics["actor_entropy"] = (entropy.detach() * weight).sum() / total
        if trajectory.mask is not None:
            most = (trajectory.mask[:, :, :-1].sum(-1).float().log() * weight).sum()
            metrics["actor_entropy_share"] = (entropy.detach() * weight).sum() / most.clamp(min=1e-8)
        elif self.task.actions.kind == "discrete":
            metrics["actor_entropy_share"] = metrics["actor_entropy"] / math.log(self.task.num_actions)
        loss = -((objective + coefficient * entropy) * weight).sum() / total + penalty
        metrics["actor_loss"] = loss.detach()
        return loss

    def _critic_loss(
        self,
        model: WorldModel,
        trajectory: Trajectory,
        start: Start,
        targets: Float[Tensor, "B Q H"],
        weight: Float[Tensor, "B Q H"],
        metrics: Metrics,
    ) -> Float[Tensor, ""]:
        """Fit the critic to the targets, and to its own slow copy (DreamerV3, eq. 8)."""
        if self.imagination.baseline == "leave_one_out":
            # Nobody waits for this critic: it learns from a share of the instances, and one tour of each start.
            count = max(1, round(self.critic_share * targets.shape[0]))
            trajectory, start = thin(trajectory, start, count, self.imagination.tours)
            targets = targets[:count, :: self.imagination.tours]
            weight = weight[:count, :: self.imagination.tours]
        dist = self._value(model, self.critic, trajectory, start, slice(0, -1), detach=True)
        with torch.no_grad():
            slow = self._value(model, self.slow_critic, trajectory, start, slice(0, -1)).mean()
        error = (dist.mean().detach() - targets).square()
        metrics["critic_error"] = ((error * weight).sum() / weight.sum()).sqrt()
        if self.imagination.baseline == "leave_one_out":
            metrics |= statistics("value", dist.mean(), weight)
        loss = self._value_loss(dist, targets, slow=slow, weight=weight)
        metrics["critic_loss"] = loss.detach()
        return loss

    def _replay_value_loss(
        self,
        model: WorldModel,
        batch: dict[str, Tensor],
        observed: Observed,
        targets: Float[Tensor, "B Q H"],
    ) -> Float[Tensor, ""]:
        """Fit the critic to what replayed rows went on to earn, gradient into the world model included.

        Each row's return is bootstrapped with the return imagined from the row after it: fully at the last row of an
        episode that a time limit cut, and not at all where it terminated. (DreamerV3, Nature 2025.)
        """
        imagined = targets[:, :: self.imagination.tours, 0].detach()
        returns = replayed_returns(batch, imagined, discount=model.discount, lambda_=self.imagination.lambda_)
        feat = observed.latents.feat()[:, :-1]
        with torch.no_grad():
            slow = self.slow_critic(feat, None, None).mean()
        # What follows an episode's last row is another episode.
        weight = (~batch["is_last"][:, :-1]).float()
        return self._value_loss(self.critic(feat, None, None), returns, slow=slow, weight=weight)

    def _value_loss(
        self,
        dist: SymexpTwoHot,
        targets: Float[Tensor, "*B"],
        *,
        slow: Float[Tensor, "*B"],
        weight: Float[Tensor, "*B"],
    ) -> Float[Tensor, ""]:
        loss = -dist.log_prob(targets) - self.slow_scale * dist.log_prob(slow)
        return (loss * weight).sum() / weight.sum().clamp(min=1e-8)

    def _value(
        self,
        model: WorldModel,
        critic: Critic,
        trajectory: Trajectory,
        start: Start,
        steps: slice,
        *,
        detach: bool = False,
    ) -> SymexpTwoHot:
        """What a critic expects of the states at `steps`; `detach` keeps gradients from the latents."""
        feat = trajectory.feat if self.critic_latent else None
        if feat is not None:
            feat = feat[:, :, steps].detach() if detach else feat[:, :, steps]
        view, context = trajectory.view(steps), start.context
        if context is None or model.rules is None:
            return critic(feat, None, view)
        valid = context.instance.valid
        return critic(feat, critic.encode(model.rules.node_features(context.instance), valid), view, valid)

    def _horizon(self) -> int:
        """How many steps to imagine."""
        if isinstance(self.imagination.horizon, int):
            return self.imagination.horizon
        assert self.task.rules is not None, "only routing knows when an episode ends at the latest"
        return self.task.rules.episode_steps(self.task.num_actions)

    def _noise(self, model: WorldModel, shape: torch.Size, horizon: int, generator: torch.Generator) -> Noise:
        latent_size = model.rssm.stoch_size if self.needs_latent else 0
        return Noise(
            latent=uniform((horizon, *shape, latent_size), generator),
            action=uniform((horizon, *shape, *self.task.actions.shape), generator),
        )


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradient reaches the modules' parameters from what is computed within."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
