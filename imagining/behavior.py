"""The behaviour learnt inside a world model: actor and critic, and what they minimise on imagined trajectories."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import UserError
from envs.tasks import Task
from imagining.chances import chances_of, legal_actions
from imagining.exploration import Explorer
from imagining.imagination import Imagination, Noise, Start, Trajectory, imagine, thin
from imagining.returns import Returns, replayed_returns, statistics
from imagining.world_model import Metrics, Observed
from parts.actors import Actor, MaskedActor, TSPPointerActor, require_costs
from parts.candidates import CandidateActor
from parts.critics import Critic, LatentCritic, NodeCritic
from parts.layers import initialise, use_layer_norm
from parts.views import NodeSet, View
from routing.rules import each_part
from settings.dreamer import ActorSettings, CriticSettings
from tools import Bounds, ReturnScale, SymexpTwoHot, follow_slowly, uniform


class Worth(NamedTuple):
    """What imagined decisions are worth: return targets, scaled advantages (no graph), and how much each counts.

    `expected` is what the critic, where it is the baseline, expects of all H + 1 moments, with the graph of its weights
    to learn by; None where these were frozen.
    """

    targets: Float[Tensor, "B Q H"]
    advantage: Float[Tensor, "B Q H"]
    weight: Float[Tensor, "B Q H"]
    expected: SymexpTwoHot | None = None


def make_actor(task: Task, imagination: Imagination, settings: ActorSettings) -> Actor:
    """The actor that the config section `actor` describes.

    Raises:
        UserError: its type does not fit the task.
    """
    feat_size = imagination.model.rssm.feat_size
    if settings.type == "tsp_pointer":
        if not imagination.node_features:
            raise UserError("actor.type tsp_pointer points at nodes, and this task has none; choose masked")
        require_costs(settings.pointer.cost_units, shown=imagination.shows_costs or imagination.shows_moves)
        sizes = {"state_features": imagination.state_features, "belief": imagination.belief_size}
        pointer = {**sizes, "moves": imagination.shows_moves, **asdict(settings.pointer)}
        return TSPPointerActor(feat_size, imagination.node_features, unimix=settings.unimix, **pointer)
    if settings.type == "candidates":
        if imagination.candidates is None:
            raise UserError(
                "actor.type candidates scores lines to follow, and this task has none that are observed and decoded"
                " (lines and lines_valid, beside an action_mask); choose masked"
            )
        sizes = {
            "units": settings.units,
            "layers": settings.layers,
            "agent_features": imagination.agent_features,
        }
        return CandidateActor(feat_size, imagination.candidates, unimix=settings.unimix, **sizes)
    if imagination.belief_size:
        raise UserError(f"only actor.type: tsp_pointer reads a belief, got {settings.type}: set model.belief: false")
    return MaskedActor(feat_size, task.actions, units=settings.units, layers=settings.layers, unimix=settings.unimix)


def make_critic(imagination: Imagination, settings: CriticSettings) -> Critic:
    """The critic that the config section `critic` describes.

    Raises:
        UserError: it is to learn from replayed rewards, which takes a state that is all in the latent.
    """
    feat_size = imagination.model.rssm.feat_size
    sizes = {"units": settings.units, "layers": settings.layers, "bins": settings.bins}
    if not imagination.node_features:
        return LatentCritic(feat_size, **sizes)
    if settings.replay_scale:
        raise UserError(f"critic.replay_scale is {settings.replay_scale:g}; routing needs it at 0")
    return NodeCritic(
        feat_size if settings.latent else 0,
        imagination.node_features,
        state_features=imagination.state_features,
        **sizes,
    )


class ImagBehavior(nn.Module):
    """Actor and critic, learnt from imagined trajectories."""

    def __init__(
        self,
        task: Task,
        imagination: Imagination,
        *,
        actor: ActorSettings,
        critic: CriticSettings,
        explorer: Explorer | None = None,
        norm: str = "rms",
        initialisation: str = "torch",
    ) -> None:
        """Build actor and critic.

        Args:
            task: what is to be solved.
            imagination: how to imagine, and in which model.
            actor: the config section of that name.
            critic: likewise.
            explorer: adds what is new to what actions earn; None: the task alone counts.
            norm: "rms" or "layer".
            initialisation: "torch" or "published".

        Raises:
            UserError: the parts do not fit the task or one another.
        """
        super().__init__()
        self.task, self.imagination = task, imagination
        self.settings = imagination.settings
        self.returns = Returns(imagination)
        self.entropy, self.entropy_final = actor.entropy, actor.entropy_final
        self.actor, self.critic = make_actor(task, imagination, actor), make_critic(imagination, critic)
        for module in (self.actor, self.critic):
            if norm == "layer":
                use_layer_norm(module)
            if initialisation == "published":
                initialise(module)
        self.explorer = explorer
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_scale, self.critic_share = critic.slow_rate, critic.slow_scale, critic.share
        self.replay_scale = critic.replay_scale
        self.scale = ReturnScale(actor.advantage_scale, floor=actor.advantage_floor)
        self.differentiable = self.settings.gradient != "reinforce"
        self.needs_latent = bool(
            self.actor.latent_size
            or self.critic.latent_size
            or imagination.mask_from == "predicted"
            or self.differentiable
            or imagination.reads_latent
        )

    @property
    def groups(self) -> dict[str, nn.Module]:
        """What learns by a loss of its own, by that loss's name."""
        explorer = {} if self.explorer is None else {"explore": self.explorer.learnt}
        return {"actor": self.actor, "critic": self.critic, **explorer}

    @property
    def starts_from_latents(self) -> bool:
        """Whether imagination begins in the latents of replayed rows, which somebody reads."""
        return self.imagination.starts_at_rows and self.needs_latent

    def losses(
        self,
        batch: dict[str, Tensor],
        observed: Observed | None,
        *,
        progress: float,
        rewards: Bounds,
        generator: torch.Generator,
        replayed: bool = False,
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Imagine from a batch: what actor and critic are to minimise.

        Args:
            batch: replayed sequences; whole episodes in routing.
            observed: their latents; may be None where `starts_from_latents` is False.
            progress: the share of the run that is over, for schedules.
            rewards: the smallest and largest reward in replay, 0-d.
            generator: draws all noise.
            replayed: also let the critic learn from replayed rewards, if it ever does; `observed` then carries the
                graph that leads into the world model.

        Returns:
            The losses `actor`, `critic`, `explore` where there is an explorer and, on request, `replay_value`; and
            metrics.
        """
        latents = observed if self.starts_from_latents else None
        start = self.imagination.start(batch, latents, needs_latent=self.needs_latent, generator=generator)
        nodes = self.imagination.node_set(start.context)
        tables = self.actor.tables(nodes)
        noise = self._noise(start, generator)
        # Only the actor gets the gradient that flows through imagined dynamics.
        with self._judging():
            trajectory = self._roll_out(start, tables, noise)
        entropy = self.entropy + (self.entropy_final - self.entropy) * progress
        # A tensor, since a compiler would take each other number for another program.
        coefficient = torch.full((), entropy, device=noise.action.device)
        losses, metrics, worth = self.losses_of(
            trajectory, tables, start=start, nodes=nodes, rewards=rewards, coefficient=coefficient
        )
        if self.settings.imitation:
            assert observed is not None, "what was done is imitated from replayed latents"
            loss, imitation_metrics = self.imitation_loss(batch, observed)
            losses["actor"] = losses["actor"] + self.settings.imitation * loss
            metrics |= imitation_metrics
        if self.explorer is not None:
            assert observed is not None, "an ensemble learns from replayed latents"
            losses["explore"], explore_metrics = self.explorer.loss(batch, observed)
            metrics |= explore_metrics
            batch = self.explorer.rewarded(batch, observed)
        if replayed and self.replay_scale:
            assert observed is not None, "replayed rows are judged by their latents"
            losses["replay_value"] = self.replay_scale * self.replay_value_loss(batch, observed, worth.targets)
            metrics["replay_value_loss"] = losses["replay_value"].detach()
        return losses, metrics

    def losses_of(
        self,
        trajectory: Trajectory,
        tables: Any,
        *,
        start: Start,
        nodes: NodeSet | None,
        rewards: Bounds,
        coefficient: Float[Tensor, ""],
    ) -> tuple[dict[str, Tensor], Metrics, Worth]:
        """What a trajectory is worth, and the losses `actor` and `critic` on it; metrics.

        Args:
            trajectory: what was imagined.
            tables: the actor's, with their graph.
            start: where it began.
            nodes: what the critic makes tables of.
            rewards: the smallest and largest reward in replay, 0-d.
            coefficient: of the entropy.
        """
        with self._judging():
            worth, metrics = self.worth(trajectory, start, nodes, rewards)
        actor_loss, actor_metrics = self._actor_loss(trajectory, tables, worth, coefficient)
        critic_loss, critic_metrics = self._critic_loss(trajectory, nodes, worth)
        metrics |= actor_metrics | critic_metrics
        metrics |= self.imagination.metrics(trajectory)
        return {"actor": self.settings.policy * actor_loss, "critic": critic_loss}, metrics, worth

    def _judging(self) -> AbstractContextManager[None]:
        """Around what trains nothing but the actor, by the gradient that flows through imagined dynamics, if at all."""
        if not self.differentiable:
            return torch.no_grad()
        judges = (self.imagination.model, self.critic, self.explorer)
        return _frozen(*(judge for judge in judges if judge is not None))

    @torch.no_grad()
    def follow(self, applied: dict[str, Tensor]) -> None:
        """Let slow critic and return statistics follow an update that was applied (1) or skipped (0), by optimiser."""
        if "critic" in applied:
            weight = self.slow_rate * applied["critic"]
            follow_slowly(list(self.slow_critic.parameters()), list(self.critic.parameters()), weight)
            self.scale.revert_unless(applied["actor"])

    def worth(
        self, trajectory: Trajectory, start: Start, nodes: NodeSet | None, rewards: Bounds
    ) -> tuple[Worth, Metrics]:
        """What a trajectory's decisions are worth, and metrics of that."""
        reward, metrics = self._earned(trajectory, start)
        value, expected = None, None
        if self.settings.baseline == "critic":
            # Without a gradient through the dynamics, the critic learns from the very same states.
            with torch.enable_grad():
                expected = self._value(self.critic, trajectory, nodes, slice(None))
            with torch.set_grad_enabled(self.differentiable):
                value = expected.mean()
        targets, return_metrics = self.returns.targets(trajectory, start, reward, value=value, rewards=rewards)
        metrics |= return_metrics
        detached = targets.detach()
        self.scale.update(detached[:, :, 0] if self.settings.horizon == "episode" else detached)
        scale = self.scale.scale()
        given = 0 if start.given is None else start.given.shape[1]
        advantage = self.returns.advantage(detached, None if value is None else value.detach(), given=given) / scale
        steps = torch.arange(reward.shape[-1], device=reward.device)
        weight = trajectory.survival * self.imagination.discount**steps
        if given:
            # Nobody chose these, so that there is nothing to learn about them.
            chosen = torch.ones_like(weight)
            chosen[:, -given:, 0] = 0.0
            weight = weight * chosen
        metrics |= {"advantage_scale": scale, **statistics("advantage", advantage, trajectory.survival)}
        return Worth(targets, advantage, weight, None if self.differentiable else expected), metrics

    def _earned(self, trajectory: Trajectory, start: Start) -> tuple[Float[Tensor, "B Q H"], Metrics]:
        """What imagined actions earn, for what is new in them, too; metrics."""
        reward = self.imagination.reward(trajectory, start)
        if self.explorer is None:
            return reward, {}
        feat = trajectory.feat(slice(1, None))
        assert feat is not None
        bonus = self.explorer.bonus(feat)
        survival = trajectory.survival
        return reward + bonus, {"intrinsic_reward": ((bonus * survival).sum() / survival.sum()).detach()}

    def _roll_out(self, start: Start, tables: Any, noise: Noise) -> Trajectory:
        # All decisions' gradients reach the tables in one pass afterwards.
        if not self.differentiable and tables is not None:
            tables = each_part(tables, Tensor.detach)
        return imagine(
            self.imagination,
            self.actor,
            start=start,
            tables=tables,
            noise=noise,
            horizon=self.imagination.horizon_from(start),
            differentiable=self.differentiable,
            learns=self.actor.learns_in_roll_out,
        )

    def _actor_loss(
        self, trajectory: Trajectory, tables: Any, worth: Worth, coefficient: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Policy gradient by advantages, dynamics gradient through targets, or a mix; and a bonus for entropy."""
        choice, decisions, view = self.settings, trajectory.decisions, trajectory.moments.view.at(slice(0, -1))
        log_prob, entropy = decisions.log_prob, decisions.entropy
        penalty: Tensor | float = 0.0
        metrics: Metrics = {}
        if log_prob is None or entropy is None:
            scores = decisions.scores
            if not self.actor.learns_in_roll_out:
                scores = self.actor.score_again(scores, trajectory.feat(slice(0, -1)), tables, view)
            log_prob, entropy, penalty, metrics = chances_of(
                trajectory.action, scores, self.actor, view, counts=trajectory.survival > 0
            )
        objective = log_prob * worth.advantage
        if choice.gradient == "dynamics":
            objective = worth.targets / self.scale.scale()
        elif choice.gradient == "both":
            through = worth.targets / self.scale.scale()
            objective = (1 - choice.gradient_mix) * objective + choice.gradient_mix * through
        loss = -self.imagination.average(objective + coefficient * entropy, worth.weight) + penalty
        metrics |= self._entropy_metrics(entropy.detach(), trajectory, worth.weight)
        return loss, metrics | {"actor_loss": loss.detach()}

    def _entropy_metrics(
        self, entropy: Float[Tensor, "B Q H"], trajectory: Trajectory, weight: Float[Tensor, "B Q H"]
    ) -> Metrics:
        """The entropy, and its share of the largest that the legal actions allow, where they can be counted."""
        total, mask = weight.sum(), trajectory.moments.view.action_mask
        metrics = {"actor_entropy": (entropy * weight).sum() / total}
        if mask is not None:
            most = (legal_actions(mask[:, :, :-1]).log() * weight).sum()
            metrics["actor_entropy_share"] = (entropy * weight).sum() / most.clamp(min=1e-8)
        elif self.task.actions.kind == "discrete":
            metrics["actor_entropy_share"] = metrics["actor_entropy"] / math.log(self.task.num_actions)
        return metrics

    def _critic_loss(
        self, trajectory: Trajectory, nodes: NodeSet | None, worth: Worth
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Fit the critic to the targets, and to its own slow copy (DreamerV3, eq. 8)."""
        targets, weight = worth.targets.detach(), worth.weight
        is_baseline = self.settings.baseline == "critic"
        if not is_baseline:
            # The critic is not the baseline here, so it learns from a share of the instances, and one tour of each.
            count, tours = max(1, round(self.critic_share * targets.shape[0])), self.settings.tours
            trajectory = thin(trajectory, count, tours)
            targets, weight = targets[:count, ::tours], weight[:count, ::tours]
            nodes = None if nodes is None else each_part(nodes, lambda part: part[:count])
        if worth.expected is None:
            dist = self._value(self.critic, trajectory, nodes, slice(0, -1), detach=True)
        else:
            dist = SymexpTwoHot(worth.expected.logits[:, :, :-1], worth.expected.bins)
        with torch.no_grad():
            slow = self._value(self.slow_critic, trajectory, nodes, slice(0, -1)).mean()
        error = (dist.mean().detach() - targets).square()
        metrics = {"critic_error": ((error * weight).sum() / weight.sum()).sqrt()}
        if not is_baseline:
            metrics |= statistics("value", dist.mean(), weight)
        loss = self._value_loss(dist, targets, slow=slow, weight=weight)
        return loss, metrics | {"critic_loss": loss.detach()}

    def imitation_loss(self, batch: dict[str, Tensor], observed: Observed) -> tuple[Float[Tensor, ""], Metrics]:
        """Minus the log-likelihood of what was done in replayed rows, the last ones of episodes apart; and metrics."""
        view = self.imagination.replayed(batch)
        dist = self.actor(observed.latents.feat().detach(), None, view)
        counts = (~batch["is_last"]).float()
        loss = -(dist.log_prob(batch["action"]) * counts).sum() / counts.sum().clamp(min=1)
        return loss, {"imitation_loss": loss.detach()}

    def replay_value_loss(
        self, batch: dict[str, Tensor], observed: Observed, targets: Float[Tensor, "B Q H"]
    ) -> Float[Tensor, ""]:
        """Fit the critic to what replayed rows went on to earn, gradient into the world model included.

        Each row's return is bootstrapped with the return imagined from the row after it: fully at the last row of an
        episode that a time limit cut, and not at all where it terminated. (DreamerV3, Nature 2025.)
        """
        imagined = targets[:, :: self.settings.tours, 0].detach()
        returns = replayed_returns(batch, imagined, discount=self.settings.discount, lambda_=self.settings.lambda_)
        feat, unseen = observed.latents.feat()[:, :-1], View(None)
        with torch.no_grad():
            slow = self.slow_critic(feat, None, unseen).mean()
        # Another episode follows an episode's last row.
        weight = (~batch["is_last"][:, :-1]).float()
        return self._value_loss(self.critic(feat, None, unseen), returns, slow=slow, weight=weight)

    def _value_loss(
        self,
        dist: SymexpTwoHot,
        targets: Float[Tensor, "*B"],
        *,
        slow: Float[Tensor, "*B"],
        weight: Float[Tensor, "*B"],
    ) -> Float[Tensor, ""]:
        loss = -dist.log_prob(targets) - self.slow_scale * dist.log_prob(slow)
        return self.imagination.average(loss, weight)

    def _value(
        self, critic: Critic, trajectory: Trajectory, nodes: NodeSet | None, steps: slice, *, detach: bool = False
    ) -> SymexpTwoHot:
        """What a critic expects of the states at `steps`; `detach` keeps gradients from the latents."""
        feat = trajectory.feat(steps) if critic.latent_size else None
        if feat is not None and detach:
            feat = feat.detach()
        return critic(feat, critic.tables(nodes), trajectory.moments.view.at(steps))

    def _noise(self, start: Start, generator: torch.Generator) -> Noise:
        shape, horizon = start.weight.shape, self.imagination.horizon_from(start)
        latent_size = self.imagination.model.rssm.stoch_size if self.needs_latent else 0
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
