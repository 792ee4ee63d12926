"""The environments whose answer is a route for each of several vehicles: capacities, and time windows with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int32

from envs.routing_env import RoutingEnv, require_known
from routing.cvrp import MAX_RANDOM_DEMAND, CVRPInstance, CVRPRules, cvrp_instance, random_capacity
from routing.vrptw import LARGEST_TIME, VRPTWInstance, VRPTWRules, with_windows


class CVRPEnv(RoutingEnv):
    """The capacitated vehicle-routing problem, registered as `CVRP-v0`.

    Args:
        num_nodes: nodes of every instance: the depot, node 0, and the customers.
        capacity: of the vehicle, a whole number; None takes the usual one for so many customers (20: 30).
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array".

    Random instances are uniform in the unit square, with demands uniform over 1 to 9.
    `reset(options={"coords": array [N, 2], "demand": array [N], "capacity": number})` takes your own; without
    `capacity` it has the environment's.

    Raises:
        ValueError: too few nodes, or a capacity that random demands exceed.
    """

    def __init__(
        self,
        *,
        num_nodes: int = 21,
        capacity: int | None = None,
        seed: int | None = None,
        render_mode: str | None = None,
    ):
        super().__init__(CVRPRules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)
        self.capacity = random_capacity(num_nodes) if capacity is None else capacity
        # Refused here, rather than in the first episode that draws the largest demand.
        cvrp_instance(np.zeros((num_nodes, 2)), [0] + [MAX_RANDOM_DEMAND] * (num_nodes - 1), self.capacity)

    def _own_instance(self, options: dict[str, Any]) -> CVRPInstance | None:
        require_known(options, "coords", "demand", "capacity")
        if not options:
            return None
        missing = [name for name in ("coords", "demand") if name not in options]
        if missing:
            raise ValueError(f"reset() got {sorted(options)} and needs {', '.join(missing)} with it")
        instance = cvrp_instance(options["coords"], options["demand"], options.get("capacity", self.capacity))
        if instance.coords.shape[1] != self.num_nodes:
            raise ValueError(
                f"options['coords'] has {instance.coords.shape[1]} nodes, and this environment takes {self.num_nodes}:"
                " make the environment with num_nodes=N, the depot included"
            )
        return instance

    def _random_instance(self) -> CVRPInstance:
        return self._drawn(self.np_random)

    def _drawn(self, random: np.random.Generator) -> CVRPInstance:
        coords = random.uniform(size=(self.num_nodes, 2))
        demand = random.integers(1, MAX_RANDOM_DEMAND + 1, self.num_nodes)
        demand[0] = 0
        return cvrp_instance(coords, demand, self.capacity)


class VRPTWEnv(RoutingEnv):
    """Vehicle routing with time windows, registered as `VRPTW-v0`; arguments as for `CVRPEnv`.

    Random instances are those of `CVRPEnv`, with windows as the field draws them (see `routing.vrptw`).
    `reset(options=...)` takes your own: `coords`, `demand`, `capacity`, `ready`, `due` and `service`, and `pace`, the
    units of time that a unit of length takes. Times are whole numbers; `due[0]` is when vehicles have to be back.

    Raises:
        ValueError: too few nodes, or a capacity that random demands exceed.
    """

    def __init__(
        self,
        *,
        num_nodes: int = 21,
        capacity: int | None = None,
        seed: int | None = None,
        render_mode: str | None = None,
    ):
        super().__init__(VRPTWRules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)
        self._plain = CVRPEnv(num_nodes=num_nodes, capacity=capacity)

    def _own_instance(self, options: dict[str, Any]) -> VRPTWInstance | None:
        times = ("ready", "due", "service", "pace")
        require_known(options, "coords", "demand", "capacity", *times)
        if not options:
            return None
        missing = [name for name in times if name not in options]
        if missing:
            raise ValueError(f"reset() got {sorted(options)} and needs {', '.join(missing)} with it")
        plain = self._plain._own_instance({name: value for name, value in options.items() if name not in times})
        assert plain is not None, "without positions it is refused"
        windows = [_whole_times(name, options[name], self.num_nodes) for name in times[:3]]
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
        plain = self._plain._drawn(self.np_random)
        return with_windows(plain, torch.from_numpy(draws))


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
