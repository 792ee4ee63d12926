"""What SAC minimises: losses of Q functions, policy and temperature, for continuous and for masked discrete actions.

Soft actor-critic after Haarnoja et al. (2018), "Soft actor-critic algorithms and applications", and, where actions are
discrete, Christodoulou (2019) with every expectation taken over legal actions only.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from config import UserError
from envs.tasks import ACTION_MASK, ObservationTask
from parts.acting import Sight, next_node
from parts.actors import TSPPointerActor, require_costs, saturation
from parts.views import NodeSet, View
from routing.rules import Rules
from settings.learning import PointerSettings
from settings.sac import SoftSettings
from soft.networks import (
    ActionValues,
    ObservationVector,
    PointerValues,
    TanhNormalPolicy,
    Temperature,
    TwinMLP,
    relu_mlp,
)
from system.ranks import here
from tools import OneHotDist, ReturnScale, follow_slowly, uniform

Metrics = dict[str, Tensor]


class Soft(nn.Module, ABC):
    """Policy, twin Q functions, their slow copies and the temperature. A subclass says what they are and minimise."""

    policy: Any
    values: Any
    target_values: Any

    def __init__(self, settings: SoftSettings, *, discount: float, device: torch.device) -> None:
        super().__init__()
        # What reads observations, if anything does; as in Yarats et al. (2021), the loss of the Q functions trains it.
        self.read: Any = nn.Module()
        self.discount, self.tau = discount, settings.tau
        self.temperature = Temperature(settings.alpha, device=device)

    @abstractmethod
    def act(
        self, sight: Sight, static: dict[str, Tensor], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Tensor]]:
        """An action for every environment, and what the policy remembers of each for the rest of the episode."""

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[dict[str, Tensor], Metrics]:
        """The losses `q`, `policy` and `alpha` of a batch of sequences [B, T], and metrics."""

    def judging(self) -> dict[str, nn.Module]:
        """What the loss of the Q functions trains, by the name that reports have for it."""
        return {"q": self.values, **({"read": self.read} if [*self.read.parameters()] else {})}

    @torch.no_grad()
    def follow(self, applied: dict[str, Tensor]) -> None:
        """Let the slow Q functions follow an update that was applied (1) or skipped (0), by optimiser."""
        slow = [*self.target_values.parameters(), *self.target_read.parameters()]
        follow_slowly(slow, [*self.values.parameters(), *self.read.parameters()], self.tau * applied["q"])

    def _finish(self, device: torch.device) -> None:
        """Move everything to its device and make the slow copies."""
        self.to(device)
        self.target_values = copy.deepcopy(self.values).requires_grad_(False)
        self.target_read = copy.deepcopy(self.read).requires_grad_(False)

    def _metrics(self, q: Float[Tensor, "2 *B"], weight: Float[Tensor, "*B"], entropy: Float[Tensor, ""]) -> Metrics:
        """Of the rows that count: `weight` sums to 1 over them."""
        q = q.detach()
        mean = 0.5 * (weight * q).sum()
        return {
            "train/q_mean": mean,
            "train/q_std": (0.5 * (weight * (q - mean).square()).sum()).sqrt(),
            "train/alpha": self.temperature().detach(),
            "actor_entropy": entropy.detach(),
        }


class ContinuousSoft(Soft):
    """SAC for continuous actions, with one Q function each of mean squared error or as a symexp two-hot.

    Under `symlog_disc` Q is the plain discounted return, without a bonus for entropy, and the policy's objective
    divides it by a running mean of |Q|, where that is above 1: the temperature then weighs against numbers of about 1,
    however large the rewards. Small ones are not made larger.
    """

    def __init__(self, task: ObservationTask, settings: SoftSettings, *, discount: float, device: torch.device) -> None:
        super().__init__(settings, discount=discount, device=device)
        self.read = ObservationVector(task.observations, units=settings.units, depth=settings.depth)
        (actions,) = task.actions.sizes
        sizes = {"units": settings.units, "layers": settings.layers}
        self.two_hot = settings.critic == "symlog_disc"
        self.policy = TanhNormalPolicy(self.read.size, actions, **sizes)
        self.values = ActionValues(self.read.size, actions, bins=settings.bins if self.two_hot else None, **sizes)
        self.scale = ReturnScale("mean_abs" if self.two_hot else "none")
        self.action_size, self.target_entropy = actions, -float(actions)
        self._finish(device)

    def act(
        self, sight: Sight, static: dict[str, Tensor], *, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "E A"], dict[str, Tensor]]:
        dist = self.policy(self.read(sight.obs))
        if generator is None:
            return dist.mode(), static
        return dist.sample(_normal(dist.mean.shape, generator))[0], static

    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[dict[str, Tensor], Metrics]:
        now, later = ({name: batch[name][:, row] for name in self.read.keys} for row in (0, 1))
        obs = self.read(now)
        action = batch["action"][:, 0].clamp(-1, 1)
        weight = _share(~batch["is_first"][:, 1])
        noise = _normal((2, *action.shape), generator)
        alpha = self.temperature().detach()
        with torch.no_grad():
            next_action, next_log_prob = self.policy(self.read(later)).sample(noise[0])
            next_value = self.values.mean(self.target_values(self.target_read(later), next_action)).amin(0)
            if not self.two_hot:
                next_value = next_value - alpha * next_log_prob
            goes_on = (~batch["is_terminal"][:, 1]).float()
            target = batch["reward"][:, 1] + self.discount * goes_on * next_value
        outputs = self.values(obs, action)
        seen = obs.detach()
        chosen, log_prob = self.policy(seen).sample(noise[1])
        chosen_value = self.values.mean(self.values(seen, chosen, frozen=True)).amin(0)
        if self.two_hot:
            self.scale.update(chosen_value.detach())
        entropy = -(weight * log_prob).sum()
        # Where no row counts, no entropy is missing.
        missing = entropy.detach() - weight.sum() * self.target_entropy
        losses = {
            "q": (weight * self.values.loss(outputs, target)).sum(),
            "policy": -alpha * entropy - (weight * chosen_value).sum() / self.scale.scale(),
            "alpha": self.temperature.log_alpha * missing,
        }
        return losses, self._metrics(self.values.mean(outputs.detach()), weight, entropy)

    @torch.no_grad()
    def follow(self, applied: dict[str, Tensor]) -> None:
        super().follow(applied)
        if self.two_hot:
            self.scale.revert_unless(applied["policy"])


class Judged(NamedTuple):
    """What policy and Q functions make of the rows of a batch."""

    dist: OneHotDist
    scores: Float[Tensor, "B T N"] | None  # of a pointer, before its tanh
    mask: Bool[Tensor, "B T N"]
    value: Float[Tensor, "2 B T N"]  # 0 for an illegal action
    slow_value: Float[Tensor, "2 B T N"]  # likewise

    @classmethod
    def over_legal(
        cls,
        dist: OneHotDist,
        scores: Float[Tensor, "B T N"] | None,
        mask: Bool[Tensor, "B T N"],
        value: Float[Tensor, "2 B T N"],
        slow_value: Float[Tensor, "2 B T N"],
    ) -> Judged:
        """Take values of all actions, whatever those of illegal ones are."""
        return cls(dist, scores, mask, value.masked_fill(~mask, 0.0), slow_value.masked_fill(~mask, 0.0))


class DiscreteSoft(Soft):
    """SAC for discrete actions of which some may be illegal: expectations run over the legal ones only, everywhere.

    The entropy aimed at depends on the state: a share of log(number of legal actions). A state with one legal action
    has nothing to choose and doesn't train the temperature. A subclass says how rows are judged.
    """

    def __init__(self, settings: SoftSettings, *, discount: float, device: torch.device) -> None:
        super().__init__(settings, discount=discount, device=device)
        if settings.critic != "mse":
            raise UserError(f"sac.critic is {settings.critic!r}, which is for continuous actions; this task needs mse")
        self.entropy_share = settings.entropy_share

    @abstractmethod
    def judge(self, batch: dict[str, Tensor]) -> Judged:
        """What policy, Q functions and their slow copies make of the rows of a batch."""

    def losses(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[dict[str, Tensor], Metrics]:
        dist, scores, mask, value, slow_value = self.judge(batch)
        alpha = self.temperature().detach()
        entropy = dist.entropy()  # [B, T]
        with torch.no_grad():
            soft_value = (dist.probs * slow_value.amin(0)).sum(-1) + alpha * entropy
            goes_on = (~batch["is_terminal"][:, 1:]).float()
            target = batch["reward"][:, 1:] + self.discount * goes_on * soft_value[:, 1:]
        first = batch["is_first"]
        weight = _share(~first[:, 1:] & (first[:, 1:].cumsum(1) == 0))
        taken = value[:, :, :-1].gather(-1, batch["action"][None, :, :-1, None].expand(value.shape[0], -1, -1, 1))
        q = taken.squeeze(-1)
        expected = (dist.probs * value.detach().amin(0)).sum(-1)
        legal = mask[:, :-1].sum(-1)
        choice = _share((weight > 0) & (legal > 1))
        metrics: Metrics = {}
        penalty = torch.zeros((), device=q.device)
        if scores is not None:
            reached = mask[:, :-1] & (weight > 0)[..., None]
            penalty, metrics["actor_saturation"] = saturation(scores[:, :-1], reached)
            penalty = here().balance(reached)(penalty)
        missing = entropy[:, :-1].detach() - self.entropy_share * legal.clamp(min=1).log()
        losses = {
            "q": (weight * 0.5 * (q - target).square().sum(0)).sum(),
            "policy": penalty - (weight * (expected + alpha * entropy)[:, :-1]).sum(),
            "alpha": self.temperature.log_alpha * (choice * missing).sum(),
        }
        metrics |= self._metrics(q, weight, (choice * entropy[:, :-1]).sum())
        return losses, metrics | {"target_entropy": (choice * self.entropy_share * legal.clamp(min=1).log()).sum()}


class VectorSoft(DiscreteSoft):
    """SAC for a discrete action in any task that is no routing."""

    def __init__(self, task: ObservationTask, settings: SoftSettings, *, discount: float, device: torch.device) -> None:
        super().__init__(settings, discount=discount, device=device)
        self.read = ObservationVector(task.observations, units=settings.units, depth=settings.depth)
        sizes = {"units": settings.units, "layers": settings.layers}
        self.policy = relu_mlp(self.read.size, task.num_actions, **sizes)
        self.values = TwinMLP(self.read.size, task.num_actions, **sizes)
        self._finish(device)

    def act(
        self, sight: Sight, static: dict[str, Tensor], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, " E"], dict[str, Tensor]]:
        dist = OneHotDist(self.policy(self.read(sight.obs)), mask=sight.obs.get(ACTION_MASK))
        return dist.mode() if generator is None else dist.sample(uniform(sight.is_first.shape, generator)), static

    def judge(self, batch: dict[str, Tensor]) -> Judged:
        obs = self.read(batch)
        logits = self.policy(obs.detach())
        mask = batch.get(ACTION_MASK, torch.ones_like(logits, dtype=torch.bool))
        flat = obs.flatten(0, 1)
        value = self.values(flat).unflatten(1, obs.shape[:2])
        with torch.no_grad():
            slow_value = self.target_values(self.target_read(batch).flatten(0, 1)).unflatten(1, obs.shape[:2])
        return Judged.over_legal(OneHotDist(logits, mask=mask), None, mask, value, slow_value)


class RoutingSoft(DiscreteSoft):
    """SAC for routing, with the Dreamer's pointer as policy and its node encoder under the Q functions."""

    def __init__(
        self,
        rules: type[Rules],
        settings: SoftSettings,
        *,
        pointer: PointerSettings,
        discount: float,
        device: torch.device,
    ) -> None:
        super().__init__(settings, discount=discount, device=device)
        self.rules = rules
        require_costs(pointer.cost_units, shown=rules.shows_costs)
        sizes = {**asdict(pointer), "latent": 0, "state_features": rules.num_state_features}
        self.policy = TSPPointerActor(0, rules.num_node_features, unimix=0.0, **sizes)
        self.values = PointerValues(rules.num_node_features, pointer=sizes)
        self._finish(device)

    def act(
        self, sight: Sight, static: dict[str, Tensor], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, " E"], dict[str, Tensor]]:
        return next_node(self.policy, self.rules, sight, static, generator=generator)

    def judge(self, batch: dict[str, Tensor]) -> Judged:
        instance, _ = self.rules.restore({key: value[:, 0] for key, value in batch.items()})
        _, state = self.rules.restore(batch)
        nodes, view = NodeSet.of(self.rules, instance), View.of(self.rules, state, batch[ACTION_MASK])
        scores = self.policy.scores(None, self.policy.tables(nodes), view)
        value = self.values(nodes, view)
        with torch.no_grad():
            slow_value = self.target_values(nodes, view)
        dist = self.policy.distribution(scores, view)
        return Judged.over_legal(dist, scores, batch[ACTION_MASK], value, slow_value)


def _share(counts: Bool[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Weights that sum to 1 over what counts, or are 0 throughout."""
    weight = counts.float()
    return here().balance(weight)(weight / weight.sum().clamp(min=1.0))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
