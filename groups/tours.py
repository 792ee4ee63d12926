"""Routing by a pointer without a model: real tours of new instances, several of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from envs.tasks import RoutingTask
from groups.losses import Scored
from groups.sampler import Sampler, Samples
from parts.acting import Sight, next_node
from parts.actors import TSPPointerActor, require_costs
from parts.precision import halves_kept
from parts.views import NodeSet, View
from routing.rules import Instance, expand_instance
from settings.learning import PointerSettings
from tools import uniform


class Tours(NamedTuple):
    """Whole tours of B instances, K of each, and what the policy saw before each of its T decisions."""

    nodes: NodeSet
    view: View
    action: Int[Tensor, "B K T"]


class TourSampler(Sampler):
    """The Dreamer's pointer, which plays tours by the rules; their costs are the true ones."""

    policy: TSPPointerActor

    def __init__(
        self,
        task: RoutingTask,
        pointer: PointerSettings,
        *,
        first: Literal["any", "stored"],
        unimix: float,
        device: torch.device,
    ) -> None:
        """Build the pointer.

        Args:
            task: the problem.
            pointer: its sizes; it reads no latent.
            first: "any": the tours of an instance begin at nodes spread over it; "stored": all at node 0.
            unimix: share of a uniform distribution over legal nodes.
            device: where it plays.
        """
        super().__init__()
        self.task, self.rules, self.device = task, task.rules, device
        self.longest = self.rules.episode_steps(task.num_actions)
        self.spreads = first == "any" and task.rules.starts_anywhere
        require_costs(pointer.cost_units, shown=self.rules.shows_costs)
        sizes = {**asdict(pointer), "latent": 0, "state_features": self.rules.num_state_features}
        self.policy = TSPPointerActor(0, self.rules.num_node_features, unimix=unimix, **sizes).to(device)
        self.players: Mapping[str, Any] = {"policy": self}

    @property
    def seen(self) -> str:
        return f"new instances of {self.rules.name} with {self.task.num_actions} nodes"

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """What `act` carries from step to step, before the first step."""
        return {"static": {}}

    @torch.no_grad()
    @halves_kept()
    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, " E"], dict[str, Any]]:
        """Choose the next node of every environment.

        Args:
            sight: what the environments show. Nodes are encoded only where an episode begins.
            state: from `initial_state` or the last call.
            generator: draws the nodes; None takes the likeliest.
        """
        action, static = next_node(self.policy, self.rules, sight, state["static"], generator=generator)
        return action, {"static": static}

    @torch.no_grad()
    def draw(self, groups: int, samples: int, *, generator: torch.Generator, environment: torch.Generator) -> Samples:
        rules, num_nodes = self.rules, self.task.num_actions
        instance = rules.random(groups, num_nodes, generator=environment, device=self.device)
        shape = torch.Size((groups, samples))
        begins = None
        if self.spreads:
            begins = (torch.arange(samples, device=self.device) * num_nodes // samples).expand(shape)
        return self.play(instance, shape, begins, generator=generator)

    @torch.no_grad()
    def play(
        self,
        instance: Instance,
        shape: torch.Size,
        begins: Int[Tensor, "B K"] | None,
        *,
        generator: torch.Generator,
    ) -> Samples:
        """Tours of given instances.

        Args:
            instance: B of them.
            shape: (B, K).
            begins: their first nodes; None for node 0.
            generator: draws decisions, and what is hidden.
        """
        rules = self.rules
        expanded = expand_instance(instance, shape)
        factors = rules.costs.draw(shape[0], generator=generator, device=self.device)
        if factors is not None:
            factors = factors[:, None].expand(*shape, -1)
        nodes = NodeSet.of(rules, instance)
        tables = self.policy.tables(nodes)
        state = rules.reset(expanded, begins)

        def noise(wanted: torch.Size) -> Tensor:
            return torch.randn(wanted, generator=generator, device=self.device)

        views, actions, running = [], [], [torch.ones(shape, device=self.device)]
        cost = torch.zeros(shape, device=self.device)
        for _ in range(self.longest):
            view = View.of(rules, state, rules.action_mask(state))
            action = self.policy(None, tables, view).sample(uniform(shape, generator))
            views.append(view)
            actions.append(action)
            cost += rules.cost(expanded, state, action, factors)
            if factors is not None:
                factors = rules.costs.drifted(factors, noise)
            state, finished = rules.step(state, action)
            running.append((~finished).float())
        tours = Tours(nodes, _joined(views), torch.stack(actions, 2))
        return Samples(-cost, torch.stack(running[:-1], 2), tours)

    @halves_kept()
    def score(self, policy: nn.Module, decisions: Tours) -> Scored:
        assert isinstance(policy, TSPPointerActor), "the policy is a pointer"
        scores = policy.scores(None, policy.tables(decisions.nodes), decisions.view)
        dist = policy.distribution(scores, decisions.view)
        penalty, _ = policy.penalty(scores, decisions.view)
        return Scored(dist.log_prob(decisions.action), dist.entropy(), penalty)

    def steps(self, samples: Samples) -> Float[Tensor, ""]:
        """Decisions, as those of an environment."""
        return samples.counted.sum()


def _joined(views: list[View]) -> View:
    """The views of T decisions as one, [B, K, T]; the first node, which all share, once."""
    mask, current, features = (
        torch.stack([part for part in parts if part is not None], 2) if parts[0] is not None else None
        for parts in zip(*((view.action_mask, view.current, view.features) for view in views), strict=True)
    )
    first = views[0].first
    assert first is not None, "tours begin somewhere"
    return View(mask, first[..., None], current, features)
