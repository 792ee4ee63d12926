"""The capacitated vehicle-routing problem: its rules, and its instances."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from routing.cost_world import PLACE
from routing.leftovers import Leftover, rest_of_plan
from routing.pyvrp_reference import reference_plan_costs, reference_plan_lengths
from routing.rules import (
    COORDS_LIMIT,
    MIN_NODES,
    Rules,
    node_spaces,
    observed_parts,
    random_symmetry,
    visited_at_first,
)

# The field's distribution (Nazari et al. 2018; Kool et al. 2019, appendix C): demands are uniform, and capacity grows
# with the number of customers; linearly between the sizes that they name.
MAX_RANDOM_DEMAND = 9
CUSTOMERS, CAPACITIES = (10, 20, 50, 100), (20, 30, 40, 50)
# How many the field's test sets hold; all are drawn, so that fewer are the first of them.
FIELD_INSTANCES = 10_000

# Whole numbers up to here stand in 32 bits, and so do sums of two of them.
CAPACITY_LIMIT = 10**9


class CVRPInstance(NamedTuple):
    """A batch of instances: what never changes within an episode. Node 0 is the depot, and demands nothing."""

    coords: Float[Tensor, "*B N 2"]
    demand: Int[Tensor, "*B N"]
    capacity: Int[Tensor, "*B"]
    valid: Bool[Tensor, "*B N"] | None = None
    place: Int[Tensor, "*B N"] | None = None


class CVRPState(NamedTuple):
    """A batch of partial plans: what the rules step, and the demands that decide what is legal.

    `load` is what the vehicle has left to deliver. The depot counts as visited throughout, so that the nodes which are
    not visited are the customers still open. `first` is the depot.
    """

    first: Int[Tensor, "*B"]
    current: Int[Tensor, "*B"]
    visited: Bool[Tensor, "*B N"]
    load: Int[Tensor, "*B"]
    demand: Int[Tensor, "*B N"]
    capacity: Int[Tensor, "*B"]


class CVRPRules(Rules):
    """One vehicle visits every customer once, on as many routes from the depot and back as its capacity asks for.

    A customer is legal while it is open and its demand no larger than the load. The depot, where the vehicle is
    loaded to its capacity again, is legal except right after itself while customers are open. An episode ends at the
    depot with no customer open; the depot then stays legal for ever, at cost 0. Demand, load and capacity are whole
    numbers, so that a vehicle is full exactly when it is.
    """

    name = "cvrp"
    instance_type = CVRPInstance
    state_type = CVRPState
    node_parts = ("coords", "place", "demand")
    fixed_length = False
    starts_anywhere = False
    num_node_features = 4
    num_state_features = 1
    has_solver = True

    @staticmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode, at most: a route of its own for each customer."""
        return 2 * (num_nodes - 1)

    @staticmethod
    def reset(instance: CVRPInstance, first: Int[Tensor, "*B"] | None = None) -> CVRPState:
        """The full vehicle at the depot.

        Raises:
            ValueError: a first node was given; every plan begins at the depot.
        """
        if first is not None:
            raise ValueError("a CVRP plan begins at the depot, node 0; first must not be given")
        depot = torch.zeros_like(instance.capacity, dtype=torch.long)
        return CVRPState(
            first=depot,
            current=depot,
            visited=visited_at_first(instance).scatter(-1, depot[..., None], True),
            load=instance.capacity,
            demand=instance.demand,
            capacity=instance.capacity,
        )

    @staticmethod
    def action_mask(state: CVRPState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        fitting = ~state.visited & (state.demand <= state.load[..., None])
        depot = (state.current != 0) | state.visited.all(-1)
        return fitting.scatter(-1, state.first[..., None], depot[..., None])

    @staticmethod
    def step(state: CVRPState, action: Int[Tensor, "*B"]) -> tuple[CVRPState, Bool[Tensor, "*B"]]:
        """Move to node `action`. Returns the next state, and whether the plan is complete there."""
        delivered = state.demand.gather(-1, action[..., None])[..., 0]
        next_state = state._replace(
            current=action,
            visited=state.visited.scatter(-1, action[..., None], True),
            load=torch.where(action == 0, state.capacity, state.load - delivered),
        )
        return next_state, CVRPRules.finished(next_state)

    @staticmethod
    def finished(state: CVRPState) -> Bool[Tensor, "*B"]:
        """Whether every customer is visited and the vehicle is back at the depot."""
        return state.visited.all(-1) & (state.current == 0)

    @staticmethod
    def remaining_legs(state: CVRPState) -> Int[Tensor, "*B"]:
        """The largest number of legs with a cost that can still come: to every open customer and back, and home."""
        return 2 * (~state.visited).sum(-1) + (state.current != 0).long()

    @staticmethod
    def observe(instance: CVRPInstance, state: CVRPState) -> dict[str, Tensor]:
        """What the agent sees: positions, demands and capacity, the state, and the action mask."""
        return {
            "coords": instance.coords,
            **observed_parts(instance),
            "demand": instance.demand,
            "capacity": instance.capacity[..., None],
            "visited": state.visited,
            "current_node": state.current,
            "load": state.load[..., None],
            "action_mask": CVRPRules.action_mask(state),
        }

    @staticmethod
    def restore(obs: dict[str, Tensor]) -> tuple[CVRPInstance, CVRPState]:
        """The inverse of `observe`."""
        current = obs["current_node"].long()
        instance = CVRPInstance(
            coords=obs["coords"],
            demand=obs["demand"],
            capacity=obs["capacity"][..., 0],
            valid=obs.get("valid"),
            place=obs.get(PLACE),
        )
        state = CVRPState(
            first=torch.zeros_like(current),
            current=current,
            visited=obs["visited"],
            load=obs["load"][..., 0],
            demand=instance.demand,
            capacity=instance.capacity,
        )
        return instance, state

    @staticmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""

        # Box takes integers when running; its annotations know floats only.
        def amounts(count: int) -> spaces.Box:
            return spaces.Box(0, CAPACITY_LIMIT, (count,), np.int32)  # type: ignore[arg-type]

        return spaces.Dict(
            {**node_spaces(num_nodes), "demand": amounts(num_nodes), "capacity": amounts(1), "load": amounts(1)}
        )

    @staticmethod
    def node_features(instance: CVRPInstance) -> Float[Tensor, "*B N F"]:
        """Position, about [-1, 1] in the unit square; demand as a share of the capacity; whether it is the depot."""
        demand = instance.demand[..., None] / instance.capacity[..., None, None]
        depot = torch.zeros_like(demand)
        depot[..., 0, :] = 1.0
        return torch.cat((2 * instance.coords - 1, demand, depot), -1)

    @staticmethod
    def state_features(state: CVRPState) -> Float[Tensor, "*B X"]:
        """The share of its capacity that the vehicle has left."""
        return (state.load / state.capacity)[..., None]

    @classmethod
    def random(
        cls, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device
    ) -> CVRPInstance:
        """Depot and customers uniform in the unit square or among the places of the cost world, demands over 1 to 9.

        The capacity is `random_capacity`.
        """
        nodes = cls.costs.random_nodes(num_instances, num_nodes, generator=generator, device=device)
        shape = (num_instances, num_nodes)
        demand = torch.randint(1, MAX_RANDOM_DEMAND + 1, shape, generator=generator, device=device, dtype=torch.int32)
        demand[:, 0] = 0
        capacity = random_capacity(num_nodes)
        return CVRPInstance(
            coords=nodes.coords,
            demand=demand,
            capacity=torch.full((num_instances,), capacity, dtype=torch.int32, device=device),
            place=nodes.place,
        )

    @classmethod
    def field_instances(cls, num_instances: int, num_nodes: int, *, seed: int) -> CVRPInstance:
        """The test set that the field compares on (Kool et al. 2019), for seed 1234; or likewise, of places."""
        draws, customers, drawn = np.random.RandomState(seed), num_nodes - 1, max(FIELD_INSTANCES, num_instances)
        nodes = cls.costs.numpy_nodes(draws.uniform, drawn, 1, customers)
        demand = draws.randint(1, MAX_RANDOM_DEMAND + 1, size=(drawn, customers))
        demand = np.pad(demand, ((0, 0), (1, 0)))[:num_instances].astype(np.int32)
        capacity = np.full(num_instances, random_capacity(num_nodes), dtype=np.int32)
        return CVRPInstance(
            coords=nodes.coords[:num_instances],
            demand=torch.from_numpy(demand),
            capacity=torch.from_numpy(capacity),
            place=None if nodes.place is None else nodes.place[:num_instances],
        )

    @staticmethod
    def reference_lengths(instance: CVRPInstance) -> Float64[np.ndarray, " I"]:
        """Lengths of PyVRP's plans."""
        return reference_plan_lengths(instance.coords.numpy(), instance.demand.numpy(), instance.capacity.numpy())

    @staticmethod
    def reference_costs(instance: CVRPInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """What PyVRP's plans cost."""
        return reference_plan_costs(costs, instance.demand.numpy(), instance.capacity.numpy())

    @classmethod
    def leftovers(cls, instance: CVRPInstance, state: CVRPState, costs: Float64[np.ndarray, "I N N"]) -> list[Leftover]:
        """The rest of the route that the vehicle is on, and the routes after it."""
        visited, demand = state.visited.cpu().numpy(), state.demand.cpu().numpy().astype(np.int64)
        amounts = (part.cpu().tolist() for part in (state.current, state.load, state.capacity))
        return [
            rest_of_plan(each, np.flatnonzero(~seen), current=current, demand=wanted, load=load, capacity=capacity)
            for each, seen, wanted, current, load, capacity in zip(costs, visited, demand, *amounts, strict=True)
        ]

    @staticmethod
    def augment(instance: CVRPInstance, generator: torch.Generator) -> CVRPInstance:
        """Each instance under one of the 8 symmetries of the unit square, drawn at random: same plans, same lengths."""
        return instance._replace(coords=random_symmetry(instance.coords, generator))

    @staticmethod
    def validate(instance: CVRPInstance) -> None:
        """Look at demands and capacities.

        Raises:
            ValueError: a capacity is below 1, a demand negative or above the capacity, or the depot demands something.
        """
        capacity, demand = instance.capacity[..., None], instance.demand
        complaints = (
            ((capacity < 1).expand_as(demand), "capacity must be at least 1"),
            (demand < 0, "a demand cannot be negative"),
            (demand > capacity, "no vehicle can carry it; give a larger capacity or split the customer"),
            ((demand != 0) & (torch.arange(demand.shape[-1], device=demand.device) == 0), "the depot demands nothing"),
        )
        for wrong, remedy in complaints:
            if bool(wrong.any()):
                row, node = wrong.flatten(0, -2).nonzero()[0].tolist()
                raise UserError(
                    f"node {node} of instance {row} has demand {int(demand.flatten(0, -2)[row, node])} where the"
                    f" capacity is {int(instance.capacity.flatten()[row])}: {remedy}"
                )


def random_capacity(num_nodes: int) -> int:
    """The capacity of random instances: 30, 40 and 50 for 20, 50 and 100 customers."""
    return int(np.interp(num_nodes - 1, CUSTOMERS, CAPACITIES))


def cvrp_instance(coords: Any, demand: Any, capacity: Any) -> CVRPInstance:
    """One instance, a batch of one, from arrays or lists that somebody gave.

    Args:
        coords: [N, 2] positions, the depot first.
        demand: [N] whole numbers, 0 for the depot.
        capacity: a whole number.

    Raises:
        ValueError: they are no possible instance; the message names node and value.
    """
    try:
        positions = np.asarray(coords, dtype=np.float64)
        demands = np.asarray(demand, dtype=np.float64)
        most = np.asarray(capacity, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"coords, demand and capacity must be numbers: {error}") from None
    count = len(positions) if positions.ndim else 0
    if positions.shape != (count, 2) or count < MIN_NODES:
        raise UserError(
            f"coords has shape {positions.shape}; give [N, 2] positions, the depot and 2 customers at least"
        )
    if demands.shape != (count,):
        raise UserError(f"demand has shape {demands.shape}; give {(count,)}, one for each node, 0 for the depot")
    if most.size != 1:
        raise UserError(f"capacity has shape {most.shape}; give one number")
    # Written so that NaN is refused too.
    impossible = np.flatnonzero(~(np.abs(positions) <= COORDS_LIMIT).all(-1))
    if impossible.size:
        raise UserError(
            f"coords is {positions[impossible[0]].tolist()} at node {impossible[0]}; coordinates must be finite and"
            f" within +-{COORDS_LIMIT:g}"
        )
    for name, values in (("demand", demands), ("capacity", most.reshape(1))):
        broken = np.flatnonzero(~((np.abs(values) <= CAPACITY_LIMIT) & (values == np.floor(values))))
        if broken.size:
            where = f" at node {broken[0]}" if name == "demand" else ""
            raise UserError(
                f"{name} is {values[broken[0]]:g}{where}; whole numbers up to {CAPACITY_LIMIT} are needed: scale"
                " demands and capacity by a common factor"
            )
    instance = CVRPInstance(
        coords=torch.from_numpy(positions.astype(np.float32))[None],
        demand=torch.from_numpy(demands.astype(np.int32))[None],
        capacity=torch.from_numpy(most.reshape(1).astype(np.int32)),
    )
    CVRPRules.validate(instance)
    return instance
