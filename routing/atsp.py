"""The travelling-salesman problem by a matrix of costs, which may depend on the direction: its rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from routing.cost_world import COST_LIMIT, Costs
from routing.costs import EUCLIDEAN
from routing.instances import reference_costs
from routing.leftovers import Leftover
from routing.matrix_costs import GIVEN_COSTS, WHOLE_COSTS, closed, on_circle, relative
from routing.rules import Rules, node_spaces
from routing.tsp import TSPInstance, TSPRules, TSPState

# How many of the cheapest moves from a node, and of those to it, are among its features.
CHEAPEST = 5


class ATSPInstance(NamedTuple):
    """A batch of matrices of costs: what never changes within an episode.

    `coords` are for pictures, and tell nodes apart; no network sees them.
    """

    coords: Float[Tensor, "*B N 2"]
    costs: Float[Tensor, "*B N N"]
    valid: Bool[Tensor, "*B N"] | None = None
    place: Int[Tensor, "*B N"] | None = None

    @classmethod
    def of(cls, costs: Float[Tensor, "*B N N"], valid: Bool[Tensor, "*B N"] | None = None) -> ATSPInstance:
        """The instances of matrices, laid out on circles."""
        return cls(on_circle(costs.shape[:-1], like=costs, valid=valid), costs, valid)


class ATSPRules(Rules):
    """The asymmetric travelling-salesman problem: tours are those of `TSPRules`; what moves cost is given and shown.

    The random class is the one that the field compares on, "tmat" (Kwon et al. 2021, "Matrix encoding networks for
    neural combinatorial optimization"): uniform whole numbers, closed so that the triangle inequality holds, scaled.
    """

    name = "atsp"
    instance_type = ATSPInstance
    state_type = TSPState
    fixed_length = True
    starts_anywhere = True
    num_node_features = 2 * CHEAPEST + 4
    num_state_features = 0
    has_solver = True
    shows_costs = True
    costs = GIVEN_COSTS

    @classmethod
    def under(cls, costs: Costs) -> type[Rules]:
        """The rules themselves: an instance has costs of its own.

        Raises:
            UserError: another world was chosen.
        """
        if costs not in (EUCLIDEAN, GIVEN_COSTS):
            raise UserError(
                f"task atsp shows what moves cost, of a class of its own, and cost is {costs.name}: leave cost and"
                " layout out, or choose task: tsp"
            )
        return cls

    @classmethod
    def problem(cls) -> str:
        """That of tours: a file may give positions, too."""
        return TSPRules.name

    @classmethod
    def instance_of(cls, parts: Mapping[str, Tensor]) -> ATSPInstance:
        """The instance of a matrix."""
        return ATSPInstance.of(parts["costs"], parts.get("valid"))

    @staticmethod
    def parts_of(instance: ATSPInstance) -> dict[str, Tensor]:
        """What there is to an instance, by name: all but the circle."""
        return {name: part for name, part in Rules.parts_of(instance).items() if name != "coords"}

    @staticmethod
    def shown_costs(instance: ATSPInstance) -> Float[Tensor, "*B N N"]:
        """All of them."""
        return instance.costs

    @staticmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode: exactly as many as there are nodes."""
        return TSPRules.episode_steps(num_nodes)

    @staticmethod
    def reset(instance: ATSPInstance, first: Int[Tensor, "*B"] | None = None) -> TSPState:
        """The state before the first decision; `first` is the node each tour begins and ends at."""
        return TSPRules.reset(_without_costs(instance), first)

    @staticmethod
    def action_mask(state: TSPState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        return TSPRules.action_mask(state)

    @staticmethod
    def step(state: TSPState, action: Int[Tensor, "*B"]) -> tuple[TSPState, Bool[Tensor, "*B"]]:
        """Move to node `action`. Returns the next state, and whether the tour is closed there."""
        return TSPRules.step(state, action)

    @staticmethod
    def finished(state: TSPState) -> Bool[Tensor, "*B"]:
        """Whether every node is visited and the tour is back at its first node."""
        return TSPRules.finished(state)

    @staticmethod
    def remaining_legs(state: TSPState) -> Int[Tensor, "*B"]:
        """The largest number of legs with a cost that can still come (the closing leg included)."""
        return TSPRules.remaining_legs(state)

    @staticmethod
    def observe(instance: ATSPInstance, state: TSPState) -> dict[str, Tensor]:
        """What the agent sees: the matrix, the state, and the action mask."""
        shown = TSPRules.observe(_without_costs(instance), state)
        del shown["coords"]
        return {"costs": instance.costs, **shown}

    @staticmethod
    def restore(obs: dict[str, Tensor]) -> tuple[ATSPInstance, TSPState]:
        """The inverse of `observe`, for episodes that began at node 0 (all those of the environments)."""
        instance = ATSPInstance.of(obs["costs"], obs.get("valid"))
        return instance, TSPRules.restore({"coords": instance.coords, **obs})[1]

    @staticmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""
        shown = node_spaces(num_nodes)
        del shown["coords"]
        return spaces.Dict({"costs": spaces.Box(0, COST_LIMIT, (num_nodes, num_nodes), np.float32), **shown})

    @staticmethod
    def node_features(instance: ATSPInstance) -> Float[Tensor, "*B N F"]:
        """What the moves from a node and those to it cost, relative to the instance's mean.

        Of either: the cheapest ones in order, mean and standard deviation. Where there are fewer other nodes, the
        dearest stands for those that are missing.
        """
        lead, count = instance.costs.shape[:-2], instance.costs.shape[-1]
        valid = None if instance.valid is None else instance.valid.reshape(-1, count)
        costs = relative(instance.costs.reshape(-1, count, count), valid)
        features = torch.cat((_of_rows(costs, valid), _of_rows(costs.transpose(-1, -2), valid)), -1)
        return features.view(*lead, *features.shape[-2:])

    @staticmethod
    def state_features(state: TSPState) -> Float[Tensor, "*B X"] | None:
        """Nothing: first node, current node and mask say everything."""
        return None

    @classmethod
    def random(
        cls, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device
    ) -> ATSPInstance:
        """Matrices of the field's class."""
        shape = (num_instances, num_nodes, num_nodes)
        return cls.of_class(torch.randint(WHOLE_COSTS, shape, generator=generator, device=device))

    @classmethod
    def field_instances(cls, num_instances: int, num_nodes: int, *, seed: int) -> ATSPInstance:
        """The first matrices of that class that numpy's generator gives for a seed, in double precision."""
        shape = (num_instances, num_nodes, num_nodes)
        drawn = np.random.RandomState(seed).randint(WHOLE_COSTS, size=shape)
        return cls.of_class(torch.from_numpy(drawn), dtype=torch.float64)

    @staticmethod
    def of_class(drawn: Int[Tensor, "I N N"], *, dtype: torch.dtype = torch.float32) -> ATSPInstance:
        """The instances of the random class that uniform whole numbers below `WHOLE_COSTS` make."""
        staying = torch.eye(drawn.shape[-1], dtype=torch.bool, device=drawn.device)
        # Whole numbers that small add up exactly.
        return ATSPInstance.of(closed(drawn.masked_fill(staying, 0).to(dtype)) / WHOLE_COSTS)

    @staticmethod
    def reference_lengths(instance: ATSPInstance) -> Float64[np.ndarray, " I"]:
        """What optimal tours cost (up to 9 nodes), or LKH's."""
        return reference_costs(instance.costs.double().cpu().numpy())

    @staticmethod
    def reference_costs(instance: ATSPInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """The same by other costs."""
        return reference_costs(costs)

    @classmethod
    def leftovers(cls, instance: ATSPInstance, state: TSPState, costs: Float64[np.ndarray, "I N N"]) -> list[Leftover]:
        """The path through the open nodes, and back to the first."""
        return TSPRules.leftovers(_without_costs(instance), state, costs)

    @staticmethod
    def augment(instance: ATSPInstance, generator: torch.Generator) -> ATSPInstance:
        """The instances as they are: a matrix has no other shape."""
        return instance

    @classmethod
    def pad(cls, instance: ATSPInstance, num_nodes: int) -> ATSPInstance:
        """The same instances [I] with `num_nodes` nodes; those added are copies of node 0, and not valid."""
        count = instance.costs.shape[-1]
        nodes = torch.arange(num_nodes, device=instance.costs.device)
        taken = torch.where(nodes < count, nodes, 0)
        costs = instance.costs[:, taken][:, :, taken]
        return ATSPInstance.of(costs, (nodes < count).expand(len(costs), -1))

    @staticmethod
    def validate(instance: ATSPInstance) -> None:
        """Any matrix that `costs.validate` accepts makes an instance."""


def _without_costs(instance: ATSPInstance) -> TSPInstance:
    return TSPInstance(instance.coords, instance.valid, instance.place)


def _of_rows(costs: Float[Tensor, "B N N"], valid: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B N F"]:
    """The cheapest costs of each row in order, their mean and their deviation, the diagonal and padding apart."""
    count = costs.shape[-1]
    others = ~torch.eye(count, dtype=torch.bool, device=costs.device).expand(costs.shape)
    if valid is not None:
        others = others & valid[:, None]
    number = others.sum(-1, keepdim=True).clamp(min=1)
    costs = costs.masked_fill(~others, 0.0)
    mean = costs.sum(-1, keepdim=True) / number
    deviation = (((costs - mean).masked_fill(~others, 0.0).square().sum(-1, keepdim=True)) / number + 1e-12).sqrt()
    # The diagonal and padding stand behind the others, as dear as the dearest of these.
    dearest = costs.amax(-1, keepdim=True)
    costs = torch.where(others, costs, dearest)
    ordered = costs.sort(-1).values[..., : min(CHEAPEST, count)]
    if count < CHEAPEST:
        ordered = torch.cat((ordered, dearest.expand(*ordered.shape[:-1], CHEAPEST - count)), -1)
    return torch.cat((ordered, mean, deviation), -1)
