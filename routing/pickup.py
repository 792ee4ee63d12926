"""Pickup and delivery by one vehicle: its rules, and near-optimal tours to compare with."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from tqdm import tqdm

from config import UserError
from routing.instances import cached_lengths, euclidean_distances
from routing.leftovers import Leftover
from routing.tsp import TSPInstance, TSPRules, TSPState

# Partial tours that are kept at each length. With 5 pairs these are all that matter, and the tours are optimal.
BEAM = 4096
REFERENCE_VERSION = "restricted-dynamic-programme-4096-1"


class PickupRules(TSPRules):
    """Visit every node once and return to node 0; what is picked up at an odd node is delivered to the next one.

    Nodes 1 and 2 are such a pair, 3 and 4 another, and so on; with an even number of nodes the last has no partner. A
    delivery is legal once its pickup is visited. In all else a tour is one of the travelling-salesman problem.
    """

    name = "pickup"
    starts_anywhere = False
    num_node_features = 5
    num_state_features = 1
    has_solver = False

    @staticmethod
    def reset(instance: TSPInstance, first: Int[Tensor, "*B"] | None = None) -> TSPState:
        """The empty vehicle at node 0.

        Raises:
            UserError: a first node was given; every tour begins at node 0.
        """
        if first is not None:
            raise ValueError("a pickup tour begins at node 0; first must not be given")
        return TSPRules.reset(instance)

    @staticmethod
    def action_mask(state: TSPState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        return TSPRules.action_mask(state) & PickupRules._ready(state)

    @staticmethod
    def _ready(state: TSPState) -> Bool[Tensor, "*B N"]:
        """True for node 0, for every pickup, and for deliveries whose pickup is visited."""
        visited = state.visited
        delivery = _deliveries(visited.shape[-1], visited.device)
        return ~delivery | visited.roll(1, -1)

    @staticmethod
    def observe(instance: TSPInstance, state: TSPState) -> dict[str, Tensor]:
        """What the agent sees: the static coordinates, the state, and the action mask."""
        return {**TSPRules.observe(instance, state), "action_mask": PickupRules.action_mask(state)}

    @staticmethod
    def node_features(instance: TSPInstance) -> Float[Tensor, "*B N F"]:
        """A node's position and its partner's, about [-1, 1] in the unit square, and 1, -1 or 0 for its kind."""
        coords = instance.coords
        count = coords.shape[-2]
        node, delivery = torch.arange(count, device=coords.device), _deliveries(count, coords.device)
        partner = torch.where(delivery, node - 1, node + 1)
        # Node 0 stands in where there is no partner; copies of it stand there in padding.
        partner = torch.where((node == 0) | (partner >= count), 0, partner)
        kind = torch.where(delivery, -1.0, (node > 0).float()).expand(coords.shape[:-1])
        return torch.cat((2 * coords - 1, 2 * coords[..., partner, :] - 1, kind[..., None]), -1)

    @staticmethod
    def state_features(state: TSPState) -> Float[Tensor, "*B X"]:
        """The share of deliveries that can be made now among the nodes that are open."""
        still_open = ~state.visited
        carried = still_open & PickupRules._ready(state) & _deliveries(still_open.shape[-1], still_open.device)
        return (carried.sum(-1) / still_open.sum(-1).clamp(min=1))[..., None]

    @staticmethod
    def reference_lengths(instance: TSPInstance) -> Float64[np.ndarray, " I"]:
        """Lengths of tours by the restricted dynamic programme, optimal up to 11 nodes."""
        return PickupRules.reference_costs(instance, euclidean_distances(instance.coords.double().numpy()))

    @staticmethod
    def reference_costs(instance: TSPInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """What tours by the restricted dynamic programme cost."""

        def compute() -> Float64[np.ndarray, " I"]:
            bar = tqdm(costs, desc="reference tours", delay=2, disable=None)
            return np.array([shortest_length(each) for each in bar], dtype=np.float64)

        return cached_lengths(costs, version=REFERENCE_VERSION, compute=compute)

    @classmethod
    def leftovers(cls, instance: TSPInstance, state: TSPState, costs: Float64[np.ndarray, "I N N"]) -> list[Leftover]:
        """Nothing that a solver of tours could solve.

        Raises:
            UserError: always.
        """
        return super(TSPRules, cls).leftovers(instance, state, costs)


def shortest_length(distances: Float64[np.ndarray, "N N"]) -> float:
    """Length of a short tour: dynamic programming that keeps the shortest `BEAM` partial tours of each size.

    Of those that have visited the same nodes and end at the same one, the shortest alone (Malandraki and Dial 1996).

    Raises:
        UserError: more than 57 nodes, whose sets do not fit an integer.
    """
    count = len(distances)
    if count > 57:
        raise UserError(f"an instance has {count} nodes; there are references up to 57: choose fewer nodes")
    node = np.arange(count)
    delivery = (node > 0) & (node % 2 == 0)
    visited, current = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    length: np.ndarray = np.zeros(1)
    for _ in range(count - 1):
        seen = (visited[:, None] >> node & 1).astype(bool)
        row, target = np.nonzero(~seen & (~delivery | np.roll(seen, 1, -1)))
        length = length[row] + distances[current[row], target]
        shortest_first = np.argsort(length, kind="stable")
        visited, current, length = (part[shortest_first] for part in (visited[row] | 1 << target, target, length))
        _, unlike = np.unique(visited * 64 + current, return_index=True)
        kept = np.sort(unlike)[:BEAM]
        visited, current, length = visited[kept], current[kept], length[kept]
    return float((length + distances[current, 0]).min())


def _deliveries(count: int, device: torch.device) -> Bool[Tensor, " N"]:
    node = torch.arange(count, device=device)
    return (node > 0) & (node % 2 == 0)
