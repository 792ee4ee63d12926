"""The environments whose answer is a route for each of several vehicles: capacities, and time windows with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int32

from envs.routing_env import RoutingEnv, require_known
from routing.cvrp import MAX_RANDOM_DEMAND, CVRPInstance, CVRPRules, cvrp_instance, random_capacity
from routing.rules import Rules
from routing.vrptw import LARGEST_TIME, VRPTWInstance, VRPTWRules, with_windows

# Options of `reset` without which there is no instance, and those of time windows.
NEEDED, TIMES = ("coords", "demand"), ("ready", "due", "service")


class VehicleEnv(RoutingEnv):
    """What the environments of vehicles that customers' demands fill have in common.

    Args:
        num_nodes: nodes of every instance: the depot, node 0, and the customers.
        capacity: of the vehicle, a whole number; None takes the usual one for so many customers (20: 30).
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array".

    Raises:
        ValueError: too few nodes, or a capacity that random demands exceed.
    """

    problem: ClassVar[type[Rules]]

    def __init__(
        self,
        *,
        num_nodes: int = 21,
        capacity: int | None = None,
        seed: int | None = None,
        render_mode: str | None = None,
    ):
        super().__init__(self.problem, num_nodes=num_nodes, seed=seed, render_mode=render_mode)
        self.capacity = random_capacity(num_nodes) if capacity is None else capacity
        # Refused here, rather than in the first episode that draws the largest demand.
        cvrp_instance(np.zeros((num_nodes, 2)), [0] + [MAX_RANDOM_DEMAND] * (num_nodes - 1), self.capacity)

    def _own_demands(self, options: dict[str, Any]) -> CVRPInstance:
        """The positions, demands and capacity in options of `reset`."""
        instance = cvrp_instance(options["coords"], options["demand"], options.get("capacity", self.capacity))
        if instance.coords.shape[1] != self.num_nodes:
            raise ValueError(
                f"options['coords'] has {instance.coords.shape[1]} nodes, and this environment takes {self.num_nodes}:"
                " make the environment with num_nodes=N, the depot included"
            )
        return instance

    def _random_demands(self) -> CVRPInstance:
        coords = self.np_random.uniform(size=(self.num_nodes, 2))
        demand = self.np_random.integers(1, MAX_RANDOM_DEMAND + 1, self.num_nodes)
        demand[0] = 0
        return cvrp_instance(coords, demand, self.capacity)


class CVRPEnv(VehicleEnv):
    """The capacitated vehicle-routing problem, registered as `CVRP-v0`; arguments as for `VehicleEnv`.

    Random instances are uniform in the unit square, with demands uniform over 1 to 9.
    `reset(options={"coords": array [N, 2], "demand": array [N], "capacity": number})` takes your own; without
    `capacity` it has the environment's.
    """

    problem = CVRPRules

    def _own_instance(self, options: dict[str, Any]) -> CVRPInstance | None:
        if not options:
            return None
        _require_all(options, NEEDED, "capacity")
        return self._own_demands(options)

    def _random_instance(self) -> CVRPInstance:
        return self._random_demands()


class VRPTWEnv(VehicleEnv):
    """Vehicle routing with time windows, registered as `VRPTW-v0`; arguments as for `VehicleEnv`.

    Random instances are those of `CVRPEnv`, with windows as the field draws them (see `routing.vrptw`).
    `reset(options=...)` takes your own: `coords`, `demand`, `capacity`, `ready`, `due` and `service`, and `pace`, the
    units of time that a unit of length takes. Times are whole numbers; `due[0]` is when vehicles have to be back.
    """

    problem = VRPTWRules

    def _own_instance(self, options: dict[str, Any]) -> VRPTWInstance | None:
        if not options:
            return None
        _require_all(options, (*NEEDED, *TIMES, "pace"), "capacity")
        plain = self._own_demands(options)
        windows = [_whole_times(name, options[name], self.num_nodes) for name in TIMES]
        pace = np.asarray(options["pace"], dtype=np.float64).reshape(-1)
        if pace.size != 1 or not 0 <= pace[0] <= LARGEST_TIME:
            raise ValueError(f"options['pace'] is {options['pace']!r}; one number from 0 to {LARGEST_TIME:g} is needed")
        ready, due, service = (torch.from_numpy(part)[None] for part in windows)
        instance = VRPTWInstance(
            coords=plain.coords,
            demand=plain.demand,
            capacity=plain.capacity,
            ready=ready,
            due=due,
            service=service,
            pace=torch.from_numpy(pace.astype(np.float32)),
        )
        self.rules.validate(instance)
        return instance

    def _random_instance(self) -> VRPTWInstance:
        draws = self.np_random.uniform(size=(3, 1, self.num_nodes))
        return with_windows(self._random_demands(), torch.from_numpy(draws))


def _require_all(options: dict[str, Any], needed: Sequence[str], *others: str) -> None:
    """Refuse options of `reset` that lack a part of an instance, or have another.

    Raises:
        ValueError: they do.
    """
    require_known(options, *needed, *others)
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(f"reset() got {sorted(options)} and needs {', '.join(missing)} with it")


def _whole_times(name: str, values: Any, count: int) -> Int32[np.ndarray, " N"]:
    """Times that somebody gave, as whole numbers.

    Raises:
        ValueError: they are none.
    """
    try:
        times = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options[{name!r}] is not an array of numbers: {error}") from None
    if times.shape != (count,):
        raise ValueError(f"options[{name!r}] has shape {times.shape}; give {(count,)}, one for each node")
    broken = np.flatnonzero(~((np.abs(times) <= LARGEST_TIME) & (times == np.floor(times))))
    if broken.size:
        raise ValueError(
            f"options[{name!r}] is {times[broken[0]]:g} at node {broken[0]}; whole numbers up to {LARGEST_TIME} are"
            " needed: count in smaller units of time"
        )
    return times.astype(np.int32)
