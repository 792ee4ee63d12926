"""The travelling-salesman problem: its rules."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from routing.cost_world import PLACE
from routing.instances import reference_costs, reference_lengths
from routing.leftovers import Leftover, rest_of_tour
from routing.rules import Rules, node_spaces, observed_parts, random_symmetry, visited_at_first


class TSPInstance(NamedTuple):
    """A batch of travelling-salesman instances: what never changes within an episode."""

    coords: Float[Tensor, "*B N 2"]
    valid: Bool[Tensor, "*B N"] | None = None
    place: Int[Tensor, "*B N"] | None = None


class TSPState(NamedTuple):
    """A batch of partial tours: what the rules step."""

    first: Int[Tensor, "*B"]
    current: Int[Tensor, "*B"]
    visited: Bool[Tensor, "*B N"]


class TSPRules(Rules):
    """The travelling-salesman problem: visit every node once, then return to the node you began at.

    An episode over N nodes has N decisions; the last has one legal action, the first node. A finished row stays
    legal for ever: its first node is open, at cost 0.
    """

    name = "tsp"
    instance_type = TSPInstance
    state_type = TSPState
    fixed_length = True
    starts_anywhere = True
    num_node_features = 2
    num_state_features = 0
    has_solver = True

    @staticmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode: exactly as many as there are nodes."""
        return num_nodes

    @staticmethod
    def reset(instance: TSPInstance, first: Int[Tensor, "*B"] | None = None) -> TSPState:
        """The state before the first decision.

        Args:
            instance: the nodes to visit.
            first: the node each tour begins and ends at; node 0 where not given.
        """
        coords = instance.coords
        if first is None:
            first = torch.zeros(coords.shape[:-2], dtype=torch.long, device=coords.device)
        visited = visited_at_first(instance).scatter(-1, first[..., None], True)
        return TSPState(first=first, current=first, visited=visited)

    @staticmethod
    def action_mask(state: TSPState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        every_node_visited = state.visited.all(-1, keepdim=True)
        return (~state.visited).scatter(-1, state.first[..., None], every_node_visited)

    @staticmethod
    def step(state: TSPState, action: Int[Tensor, "*B"]) -> tuple[TSPState, Bool[Tensor, "*B"]]:
        """Move to node `action`. Returns the next state, and whether the tour is closed there."""
        visited = state.visited.scatter(-1, action[..., None], True)
        next_state = TSPState(first=state.first, current=action, visited=visited)
        return next_state, TSPRules.finished(next_state)

    @staticmethod
    def finished(state: TSPState) -> Bool[Tensor, "*B"]:
        """Whether every node is visited and the tour is back at its first node."""
        return state.visited.all(-1) & (state.current == state.first)

    @staticmethod
    def remaining_legs(state: TSPState) -> Int[Tensor, "*B"]:
        """The largest number of legs with a cost that can still come (the closing leg included)."""
        open_nodes = (~state.visited).sum(-1)
        return open_nodes + (~TSPRules.finished(state)).long()

    @staticmethod
    def observe(instance: TSPInstance, state: TSPState) -> dict[str, Tensor]:
        """What the agent sees: the static coordinates, the state, and the action mask."""
        return {
            "coords": instance.coords,
            **observed_parts(instance),
            "visited": state.visited,
            "current_node": state.current,
            "action_mask": TSPRules.action_mask(state),
        }

    @staticmethod
    def restore(obs: dict[str, Tensor]) -> tuple[TSPInstance, TSPState]:
        """The inverse of `observe`, for episodes that began at node 0 (all those of the environments)."""
        current = obs["current_node"].long()
        state = TSPState(first=torch.zeros_like(current), current=current, visited=obs["visited"])
        return TSPInstance(coords=obs["coords"], valid=obs.get("valid"), place=obs.get(PLACE)), state

    @staticmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""
        return spaces.Dict(node_spaces(num_nodes))

    @staticmethod
    def node_features(instance: TSPInstance) -> Float[Tensor, "*B N F"]:
        """What networks see of each node, about [-1, 1] for instances in the unit square."""
        return 2 * instance.coords - 1

    @staticmethod
    def state_features(state: TSPState) -> Float[Tensor, "*B X"] | None:
        """Nothing: first node, current node and mask say everything."""
        return None

    @classmethod
    def random(
        cls, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device
    ) -> TSPInstance:
        """Nodes uniform in the unit square, or among the places of the cost world."""
        nodes = cls.costs.random_nodes(num_instances, num_nodes, generator=generator, device=device)
        return TSPInstance(coords=nodes.coords, place=nodes.place)

    @classmethod
    def field_instances(cls, num_instances: int, num_nodes: int, *, seed: int) -> TSPInstance:
        """The test set that the field compares on (Kool et al. 2019), for seed 1234; or likewise, of places."""
        nodes = cls.costs.numpy_nodes(np.random.RandomState(seed).uniform, num_instances, num_nodes)
        return TSPInstance(coords=nodes.coords, place=nodes.place)

    @staticmethod
    def reference_lengths(instance: TSPInstance) -> Float64[np.ndarray, " I"]:
        """Lengths of optimal tours (up to 9 nodes), or of LKH's."""
        return reference_lengths(instance.coords.double().numpy())

    @staticmethod
    def reference_costs(instance: TSPInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """What optimal tours cost (up to 9 nodes), or LKH's."""
        return reference_costs(costs)

    @classmethod
    def leftovers(cls, instance: TSPInstance, state: TSPState, costs: Float64[np.ndarray, "I N N"]) -> list[Leftover]:
        """The path through the open nodes, and back to the first."""
        parts = (~state.visited.cpu().numpy(), state.current.cpu().numpy(), state.first.cpu().numpy())
        return [
            rest_of_tour(each, np.flatnonzero(is_open), current=int(current), first=int(first))
            for each, is_open, current, first in zip(costs, *parts, strict=True)
        ]

    @staticmethod
    def augment(instance: TSPInstance, generator: torch.Generator) -> TSPInstance:
        """Each instance under one of the 8 symmetries of the unit square, drawn at random: same tours, same lengths."""
        return instance._replace(coords=random_symmetry(instance.coords, generator))

    @staticmethod
    def validate(instance: TSPInstance) -> None:
        """Any positions make an instance."""
