"""The routing problems: their gymnasium environments, and their batched rules by name."""

from __future__ import annotations

from envs.routing_env import RoutingEnv
from envs.tours import ATSPEnv, PickupEnv, TSPEnv
from envs.vehicles import CVRPEnv, VRPTWEnv
from routing.atsp import ATSPInstance, ATSPRules
from routing.costs import move_ends
from routing.cvrp import CVRPInstance, CVRPRules, CVRPState
from routing.pickup import PickupRules
from routing.rules import MIN_NODES, Rules, nearest_node, tour_length
from routing.tsp import TSPInstance, TSPRules, TSPState
from routing.vrptw import VRPTWInstance, VRPTWRules

__all__ = [
    "MIN_NODES",
    "RULES",
    "ATSPEnv",
    "ATSPInstance",
    "ATSPRules",
    "CVRPEnv",
    "CVRPInstance",
    "CVRPRules",
    "CVRPState",
    "PickupEnv",
    "PickupRules",
    "RoutingEnv",
    "TSPEnv",
    "TSPInstance",
    "TSPRules",
    "TSPState",
    "VRPTWEnv",
    "VRPTWInstance",
    "VRPTWRules",
    "move_ends",
    "nearest_node",
    "tour_length",
]

RULES: dict[str, type[Rules]] = {
    rules.name: rules for rules in (TSPRules, ATSPRules, CVRPRules, PickupRules, VRPTWRules)
}
