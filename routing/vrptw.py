"""Vehicle routing with time windows: its rules, and its instances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from routing.cvrp import CVRPInstance, CVRPRules, CVRPState
from routing.instances import cached_lengths, euclidean_distances, tour_costs
from routing.pyvrp_reference import REFERENCE_VERSION, cheapest_plan
from routing.rules import Rules, random_symmetry
from routing.windows import LONGEST, Windows

# Whole units of time for a unit of length, in random instances: fine enough to lose nothing by rounding up.
PACE = 100_000
# A position in float32 is off by so much of a unit of time at most, at that pace.
ROUNDING = 0.05
# The field's distribution (Liu et al. 2024 and Zhou et al. 2024 have it for all their problems with windows), in units
# of length: the depot's day, how long a customer is served, and how long the window is in which that may begin.
DAY, SERVICE, WINDOW = 4.6, (0.15, 0.18), (0.18, 0.20)
LARGEST_TIME = LONGEST
# Positions times pace, as a multiple of what random instances have, beyond which `ROUNDING` is too little.
FINEST = 2


class VRPTWInstance(NamedTuple):
    """A batch of instances: what never changes within an episode. Node 0 is the depot; times are whole numbers.

    Service at a node begins from `ready` to `due`, both included, and takes `service`. `due` of the depot is when every
    vehicle has to be back. A unit of length takes `pace` units of time to drive, rounded up for each leg; or `drives`
    says how long it takes from each node (row) to each (column), where that is not as positions have it.
    """

    coords: Float[Tensor, "*B N 2"]
    demand: Int[Tensor, "*B N"]
    capacity: Int[Tensor, "*B"]
    ready: Int[Tensor, "*B N"]
    due: Int[Tensor, "*B N"]
    service: Int[Tensor, "*B N"]
    pace: Float[Tensor, "*B"]
    valid: Bool[Tensor, "*B N"] | None = None
    place: Int[Tensor, "*B N"] | None = None
    drives: Int[Tensor, "*B N N"] | None = None


class VRPTWState(NamedTuple):
    """A batch of partial plans; as a state of CVRP, and with the `time` at which the vehicle may leave."""

    first: Int[Tensor, "*B"]
    current: Int[Tensor, "*B"]
    visited: Bool[Tensor, "*B N"]
    load: Int[Tensor, "*B"]
    time: Int[Tensor, "*B"]
    demand: Int[Tensor, "*B N"]
    capacity: Int[Tensor, "*B"]
    coords: Float[Tensor, "*B N 2"]
    ready: Int[Tensor, "*B N"]
    due: Int[Tensor, "*B N"]
    service: Int[Tensor, "*B N"]
    pace: Float[Tensor, "*B"]
    drives: Int[Tensor, "*B N N"] | None = None


class VRPTWRules(Rules):
    """CVRP in which every customer has a window of time, and every vehicle leaves the depot at time 0.

    A vehicle that comes early waits. A customer is legal where it fits the load, service can begin by `due`, and the
    vehicle can be back at the depot in time afterwards. Every customer can be served on a route of its own
    (`validate`), so that all of those still open are legal from the depot, and no row of the mask is ever empty.
    """

    name = "vrptw"
    instance_type = VRPTWInstance
    state_type = VRPTWState
    node_parts = ("coords", "place", "demand", "ready", "due", "service")
    fixed_length = False
    starts_anywhere = False
    num_node_features = 7
    num_state_features = 2

    @staticmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode, at most, as of CVRP."""
        return CVRPRules.episode_steps(num_nodes)

    @staticmethod
    def reset(instance: VRPTWInstance, first: Int[Tensor, "*B"] | None = None) -> VRPTWState:
        """The full vehicle at the depot, at time 0.

        Raises:
            ValueError: a first node was given; every plan begins at the depot.
        """
        state = CVRPRules.reset(_without_windows(instance), first)
        return VRPTWState(
            first=state.first,
            current=state.current,
            visited=state.visited,
            load=state.load,
            time=torch.zeros_like(instance.capacity),
            demand=state.demand,
            capacity=state.capacity,
            coords=instance.coords,
            ready=instance.ready,
            due=instance.due,
            service=instance.service,
            pace=instance.pace,
            drives=instance.drives,
        )

    @staticmethod
    def action_mask(state: VRPTWState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        begin = torch.maximum(state.time[..., None] + _drives(state, state.current), state.ready)
        home = begin + state.service + _drives(state, torch.zeros_like(state.current))
        in_time = (begin <= state.due) & (home <= state.due[..., :1])
        # What the validated instance allows from the depot is not left to the last digit of a distance.
        in_time |= (state.current == 0)[..., None]
        depot = torch.arange(in_time.shape[-1], device=in_time.device) == 0
        return CVRPRules.action_mask(_plain(state)) & (in_time | depot)

    @staticmethod
    def step(state: VRPTWState, action: Int[Tensor, "*B"]) -> tuple[VRPTWState, Bool[Tensor, "*B"]]:
        """Move to node `action`, and serve it. Returns the next state, and whether the plan is complete there."""
        at = action[..., None]
        arrival = state.time + _drives(state, state.current).gather(-1, at)[..., 0]
        leaves = torch.maximum(arrival, state.ready.gather(-1, at)[..., 0]) + state.service.gather(-1, at)[..., 0]
        moved, finished = CVRPRules.step(_plain(state), action)
        # The next route begins with another vehicle, at time 0.
        time = torch.where(action == 0, torch.zeros_like(leaves), leaves)
        return state._replace(current=action, visited=moved.visited, load=moved.load, time=time), finished

    @staticmethod
    def finished(state: VRPTWState) -> Bool[Tensor, "*B"]:
        """Whether every customer is visited and the vehicle is back at the depot."""
        return CVRPRules.finished(_plain(state))

    @staticmethod
    def remaining_legs(state: VRPTWState) -> Int[Tensor, "*B"]:
        """The largest number of legs with a cost that can still come, as of CVRP."""
        return CVRPRules.remaining_legs(_plain(state))

    @staticmethod
    def observe(instance: VRPTWInstance, state: VRPTWState) -> dict[str, Tensor]:
        """What the agent sees: that of CVRP, the windows, and the time."""
        return {
            **CVRPRules.observe(_without_windows(instance), _plain(state)),
            "ready": instance.ready,
            "due": instance.due,
            "service": instance.service,
            "pace": instance.pace[..., None],
            "time": state.time[..., None],
            "action_mask": VRPTWRules.action_mask(state),
        }

    @staticmethod
    def restore(obs: dict[str, Tensor]) -> tuple[VRPTWInstance, VRPTWState]:
        """The inverse of `observe`."""
        plain, moved = CVRPRules.restore(obs)
        instance = VRPTWInstance(
            coords=plain.coords,
            demand=plain.demand,
            capacity=plain.capacity,
            ready=obs["ready"],
            due=obs["due"],
            service=obs["service"],
            pace=obs["pace"][..., 0],
            valid=plain.valid,
            place=plain.place,
        )
        return instance, VRPTWRules.reset(instance)._replace(**moved._asdict(), time=obs["time"][..., 0])

    @staticmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""
        plain = CVRPRules.observation_space(num_nodes)
        assert isinstance(plain, spaces.Dict)

        def times(count: int) -> spaces.Box:
            return spaces.Box(0, 2 * LARGEST_TIME, (count,), np.int32)  # type: ignore[arg-type]

        windows = {name: times(num_nodes) for name in ("ready", "due", "service")}
        pace = spaces.Box(0.0, float(LARGEST_TIME), (1,), np.float32)
        return spaces.Dict({**plain.spaces, **windows, "pace": pace, "time": times(1)})

    @staticmethod
    def node_features(instance: VRPTWInstance) -> Float[Tensor, "*B N F"]:
        """Those of CVRP; and window and service as shares of the day that networks count in."""
        day = _counted_day(instance.pace, instance.due)[..., None]
        times = torch.stack([part / day for part in (instance.ready, instance.due, instance.service)], -1)
        return torch.cat((CVRPRules.node_features(_without_windows(instance)), times), -1)

    @staticmethod
    def state_features(state: VRPTWState) -> Float[Tensor, "*B X"]:
        """The share of its capacity that the vehicle has left, and the share of the day that is gone."""
        gone = state.time / _counted_day(state.pace, state.due)
        return torch.stack((state.load / state.capacity, gone), -1)

    @classmethod
    def random(
        cls, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device
    ) -> VRPTWInstance:
        """Nodes and demands as of CVRP; windows that begin anywhere where a route of its own can keep them."""
        plain = CVRPRules.under(cls.costs).random(num_instances, num_nodes, generator=generator, device=device)
        draws = torch.rand((3, num_instances, num_nodes), generator=generator, device=device)
        return with_windows(plain, draws)

    @classmethod
    def field_instances(cls, num_instances: int, num_nodes: int, *, seed: int) -> VRPTWInstance:
        """Those of CVRP for the same seed, and windows drawn after them."""
        plain = CVRPRules.under(cls.costs).field_instances(num_instances, num_nodes, seed=seed)
        draws = np.random.RandomState(seed).uniform(size=(3, max(10_000, num_instances), num_nodes))
        return with_windows(plain, torch.from_numpy(draws[:, :num_instances]))

    @staticmethod
    def reference_lengths(instance: VRPTWInstance) -> Float64[np.ndarray, " I"]:
        """Lengths of PyVRP's plans."""
        return _reference(instance, euclidean_distances(instance.coords.double().numpy()))

    @staticmethod
    def reference_costs(instance: VRPTWInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """What PyVRP's plans cost; driving takes as long as positions say."""
        return _reference(instance, costs)

    @staticmethod
    def augment(instance: VRPTWInstance, generator: torch.Generator) -> VRPTWInstance:
        """Each instance under one of the 8 symmetries of the unit square, drawn at random: same plans, same lengths."""
        return instance._replace(coords=random_symmetry(instance.coords, generator))

    @staticmethod
    def validate(instance: VRPTWInstance) -> None:
        """Look at demands, capacities and windows.

        Raises:
            ValueError: those of CVRP; or a customer cannot be served in time on a route of its own.
        """
        CVRPRules.validate(_without_windows(instance))
        extent = instance.coords.abs().flatten(-2).amax(-1)
        if instance.drives is None and bool((extent * instance.pace > FINEST * PACE).any()):
            raise UserError(
                f"pace times the largest coordinate is above {FINEST * PACE:,}, where times are finer than positions in"
                " float32; count in larger units of time"
            )
        state = VRPTWRules.reset(instance)
        depot = torch.zeros_like(state.current)
        drives = _drives(state, depot)
        begin = torch.maximum(drives, instance.ready)
        complaints = (
            ((instance.ready < 0) | (instance.service < 0), "times cannot be below 0"),
            (instance.ready > instance.due, "its window ends before it begins"),
            (begin > instance.due, "no vehicle can be there in time"),
            (begin + instance.service + drives > instance.due[..., :1], "no vehicle can be back in time from there"),
        )
        for wrong, reason in complaints:
            if bool(wrong.any()):
                row, node = wrong.flatten(0, -2).nonzero()[0].tolist()
                ready, due = (int(part.flatten(0, -2)[row, node]) for part in (instance.ready, instance.due))
                raise UserError(
                    f"node {node} of instance {row} has the window {ready} to {due}: {reason}; give a wider one"
                )


def _plain(state: VRPTWState) -> CVRPState:
    return CVRPState(state.first, state.current, state.visited, state.load, state.demand, state.capacity)


def _without_windows(instance: VRPTWInstance) -> CVRPInstance:
    return CVRPInstance(instance.coords, instance.demand, instance.capacity, instance.valid, instance.place)


def _counted_day(pace: Float[Tensor, "*B"], due: Int[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """What times are shares of where networks see them: the day of random instances, or its own where that is longer.

    So a time says how far one gets in it, as it does in training, and nothing is above 1.
    """
    return torch.maximum(DAY * pace, due[..., 0].to(pace))


def _drives(state: VRPTWState, origin: Int[Tensor, "*B"]) -> Int[Tensor, "*B N"]:
    """How long it takes from a node to every other, in whole units of time; never less than it truly does."""
    if state.drives is not None:
        row = origin[..., None, None].expand(*origin.shape, 1, state.drives.shape[-1])
        return state.drives.gather(-2, row)[..., 0, :]
    here = state.coords.gather(-2, origin[..., None, None].expand(*origin.shape, 1, 2))
    return _whole_times((state.coords - here).norm(dim=-1), state.pace[..., None])


def _whole_times(distance: Float[Tensor, "*B N"], pace: Float[Tensor, "*#B 1"]) -> Int[Tensor, "*B N"]:
    # A node is no time away from itself.
    return torch.where(distance > 0, pace * distance + ROUNDING, 0.0).ceil().int()


def with_windows(plain: CVRPInstance, draws: Float[Tensor, "3 I N"]) -> VRPTWInstance:
    """Random windows for instances without any.

    Args:
        plain: the instances [I].
        draws: uniform in [0, 1): of when windows begin, how long they are, and how long service takes.
    """
    begin, length, service = draws.to(plain.coords)
    # Distances in the precision that environments compute in.
    coords = plain.coords.float()
    away = (coords - coords[:, :1]).norm(dim=-1)
    pace = torch.full((len(coords),), float(PACE), device=coords.device)
    drives = _whole_times(away, pace[:, None])
    served = (PACE * (SERVICE[0] + (SERVICE[1] - SERVICE[0]) * service)).int()
    lasts = (PACE * (WINDOW[0] + (WINDOW[1] - WINDOW[0]) * length)).int()
    day = round(PACE * DAY)
    # The last moment at which service may begin, so that the vehicle is back in time and the window lies before that.
    room = day - served - lasts - 2 * drives
    ready = drives + (begin * room).int()
    customer = torch.arange(coords.shape[1], device=coords.device) > 0
    due = torch.where(customer, ready + lasts, day)
    return VRPTWInstance(
        coords=plain.coords,
        demand=plain.demand,
        capacity=plain.capacity,
        ready=torch.where(customer, ready, 0).int(),
        due=due.int(),
        service=torch.where(customer, served, 0).int(),
        pace=pace,
        valid=plain.valid,
        place=plain.place,
    )


def _reference(instance: VRPTWInstance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
    """What PyVRP's plans cost, computed once for the same instances."""
    coords = instance.coords.float()
    distance = torch.cdist(coords, coords, compute_mode="donot_use_mm_for_euclid_dist")
    given = instance.drives if instance.drives is not None else _whole_times(distance, instance.pace[:, None, None])
    drives = given.numpy().astype(np.int64)
    windows = [part.numpy().astype(np.int64) for part in (instance.ready, instance.due, instance.service)]
    demand, capacity = instance.demand.numpy().astype(np.int64), instance.capacity.numpy().astype(np.int64)

    def compute() -> Float64[np.ndarray, " I"]:
        found = []
        for row, legs in enumerate(costs):
            plan = cheapest_plan(
                legs,
                demand[row],
                int(capacity[row]),
                windows=Windows(drives[row], *(part[row] for part in windows)),
            )
            found.append(tour_costs(legs[None], plan[None])[0])
        return np.array(found, np.float64)

    content = (costs, drives, demand, capacity, *windows)
    return cached_lengths(*content, version=f"{REFERENCE_VERSION}-windows-1", compute=compute)
