"""The gymnasium environments of the routing problems, on top of their batched rules."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Int32
from torch import Tensor

from routing.atsp import ATSPInstance, ATSPRules
from routing.cost_world import Hidden, hidden_factors
from routing.costs import EUCLIDEAN, find_costs, move_ends
from routing.cvrp import MAX_RANDOM_DEMAND, CVRPInstance, CVRPRules, CVRPState, cvrp_instance, random_capacity
from routing.matrix_costs import WHOLE_COSTS
from routing.pickup import PickupRules
from routing.rules import COORDS_LIMIT, MIN_NODES, Instance, Rules, State, nearest_node, tour_length
from routing.tsp import TSPInstance, TSPRules, TSPState
from routing.vrptw import LARGEST_TIME, VRPTWInstance, VRPTWRules, with_windows

__all__ = [
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


class LegalActions(spaces.Discrete):
    """The nodes of an environment, whose plain `sample()` draws among those that are legal now.

    Nodes that are not legal in the first state, such as node 0, where a tour ends and a vehicle is loaded, are drawn
    only where no other is: gymnasium's environment checker takes what it drew in mid-episode for a first action.
    `sample(mask=...)` and `sample(probability=...)` work as in `Discrete`.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        action_masks: Callable[[], np.ndarray],
        first_masks: Callable[[], np.ndarray],
        seed: int | None = None,
    ):
        super().__init__(num_nodes, seed=seed)
        self._action_masks, self._first_masks = action_masks, first_masks

    def sample(self, mask: np.ndarray | None = None, probability: np.ndarray | None = None) -> np.int64:
        if mask is None and probability is None:
            legal = self._action_masks()
            preferred = legal & self._first_masks()
            mask = (preferred if preferred.any() else legal).astype(np.int8)
        return super().sample(mask, probability)


class RoutingEnv(gymnasium.Env, ABC):
    """One routing instance at a time, stepped by the batched rules with a batch of one.

    An action is the next node. The reward is minus the leg's cost, so that the return of an episode is minus the
    length of its tour. `info["action_mask"]` and `action_masks()` repeat the observation's `action_mask`.

    A problem is added by a subclass that says where instances come from: `_own_instance` and `_random_instance`.
    Factors that the rules' cost world hides are drawn at every reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    _instance: Instance
    _state: State
    _hidden: Hidden | None
    _tour: list[int]
    _first_mask: np.ndarray

    def __init__(self, rules: type[Rules], *, num_nodes: int, seed: int | None, render_mode: str | None):
        if num_nodes < MIN_NODES:
            raise ValueError(f"num_nodes is {num_nodes}; a tour needs at least {MIN_NODES} nodes")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode is {render_mode!r}; it can be None or one of {self.metadata['render_modes']}"
            )
        self.rules = rules
        self.num_nodes = num_nodes
        self.render_mode = render_mode
        self.observation_space = rules.costs.observation_space(rules.observation_space(num_nodes), num_nodes)
        self.action_space = LegalActions(
            num_nodes, action_masks=self.action_masks, first_masks=self._first_masks, seed=seed
        )
        self._first_seed = seed
        self._begun = False

    @abstractmethod
    def _own_instance(self, options: dict[str, Any]) -> Instance | None:
        """The instance given to `reset(options=...)`, a batch of one; None where the options hold none."""

    @abstractmethod
    def _random_instance(self) -> Instance:
        """A new instance, a batch of one, drawn from `self.np_random`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode: on the instance in `options` if there is one, else on a random one.

        Raises:
            ValueError: the options hold an unknown key or an impossible instance; the episode in progress goes on.
        """
        own_instance = self._own_instance(options or {})
        if own_instance is not None:
            self.rules.costs.validate(own_instance)
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        super().reset(seed=seed)
        self._instance = self._random_instance() if own_instance is None else own_instance
        self._state = self.rules.reset(self._instance)
        factors = None
        if self.rules.costs.hidden:
            drawn = self.np_random.uniform(size=(1, self.rules.costs.hidden))
            factors = torch.from_numpy(drawn.astype(np.float32))
        self._hidden = Hidden.begin(factors, self._state.current)
        self._tour = [int(self._state.current)]
        self._begun = True
        self._first_mask = self.action_masks()
        return self._observe()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move to node `action`.

        Raises:
            ResetNeeded: no episode has begun, or it is over.
            ValueError: the action is not a legal node; the state is unchanged.
        """
        if not self._begun:
            raise ResetNeeded("step() before the first episode: call reset()")
        if bool(self.rules.finished(self._state)):
            raise ResetNeeded("step() after the end of the episode: call reset()")
        node = self._legal_node(action)
        moves = torch.tensor([node], device=self._state.current.device)
        cost = self.rules.cost(self._instance, self._state, moves, *hidden_factors(self._hidden))
        if self._hidden is not None:
            factors = self.rules.costs.drifted(self._hidden.factors, self._noise)
            self._hidden = Hidden(factors, self._state.current, cost)
        self._state, finished = self.rules.step(self._state, moves)
        self._tour.append(node)
        obs, info = self._observe()
        return obs, -float(cost), bool(finished), False, info

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.from_numpy(self.np_random.standard_normal(shape).astype(np.float32))

    def action_masks(self) -> Bool[np.ndarray, " N"]:
        """True where a node may be visited next.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no action is legal before the first episode: call reset()")
        return self.rules.action_mask(self._state)[0].numpy()

    def _first_masks(self) -> Bool[np.ndarray, " N"]:
        return self._first_mask

    def render(self) -> np.ndarray:
        """Draw the tour so far, as an image `[H, W, 3]` of uint8.

        Raises:
            ValueError: the environment was made without a render mode.
            ResetNeeded: no episode has begun.
        """
        # matplotlib takes half a second to import, and most environments are never drawn.
        from routing.drawing import draw_tour

        if self.render_mode is None:
            raise ValueError('render() needs an environment made with render_mode="rgb_array"')
        if not self._begun:
            raise ResetNeeded("nothing to draw before the first episode: call reset()")
        return draw_tour(self._instance.coords[0].numpy(), np.array(self._tour), visited_only=True)

    def _legal_node(self, action: Any) -> int:
        legal_nodes = np.flatnonzero(self.action_masks()).tolist()
        try:
            node = operator.index(action)
        except TypeError:
            raise ValueError(f"action {action!r} is not an integer; legal nodes: {legal_nodes}") from None
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node {node} is outside 0..{self.num_nodes - 1}; legal nodes: {legal_nodes}")
        if node not in legal_nodes:
            raise ValueError(f"node {node} is not legal now; legal nodes: {legal_nodes}")
        return node

    def _observe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # Copies, since callers keep what they are given; `[()]` turns an array without dimensions into a scalar.
        shown = self.rules.observe(self._instance, self._state)
        shown |= self.rules.costs.evidence(self._hidden)
        obs = {key: value[0].numpy().copy()[()] for key, value in shown.items()}
        return obs, {"action_mask": self.action_masks()}


class TSPEnv(RoutingEnv):
    """The travelling-salesman problem, registered as `TSP-v0`.

    Args:
        num_nodes: nodes of every instance.
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array".
        cost: what moves cost: a world of `routing.costs`, or your own `module:function`.
        streets: of costs `streets` and `rush`: `helsinki`, or an extract of OpenStreetMap.

    Random instances are uniform in the unit square; `reset(options={"coords": array [N, 2]})` takes your own.
    """

    problem: ClassVar[type[Rules]] = TSPRules

    def __init__(
        self,
        *,
        num_nodes: int = 20,
        seed: int | None = None,
        render_mode: str | None = None,
        cost: str = EUCLIDEAN.name,
        streets: str = "",
    ):
        rules = self.problem.under(find_costs(cost, streets=streets))
        super().__init__(rules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)

    def _own_instance(self, options: dict[str, Any]) -> TSPInstance | None:
        _require_known(options, "coords")
        if "coords" not in options:
            return None
        try:
            coords = np.asarray(options["coords"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options['coords'] is not an array of numbers: {error}") from None
        if coords.shape != (self.num_nodes, 2):
            raise ValueError(
                f"options['coords'] has shape {coords.shape}, and this environment takes {(self.num_nodes, 2)}: "
                f"give [N, 2] positions and make the environment with num_nodes=N, at least {MIN_NODES}"
            )
        # Written so that NaN is refused too.
        impossible = np.flatnonzero(~(np.abs(coords) <= COORDS_LIMIT).all(-1))
        if impossible.size:
            raise ValueError(
                f"options['coords'] is {coords[impossible[0]].tolist()} at node {impossible[0]}; "
                f"coordinates must be finite and within +-{COORDS_LIMIT:g}"
            )
        return TSPInstance(coords=torch.from_numpy(coords.astype(np.float32))[None])

    def _random_instance(self) -> TSPInstance:
        nodes = self.rules.costs.numpy_nodes(self.np_random.uniform, 1, self.num_nodes)
        return TSPInstance(coords=nodes.coords.float(), place=nodes.place)


class ATSPEnv(RoutingEnv):
    """The travelling-salesman problem by a matrix of costs, registered as `ATSP-v0`.

    Args:
        num_nodes: nodes of every instance.
        seed: seeds the first `reset` that gives no seed of its own, and the action space.
        render_mode: None, or "rgb_array"; nodes are drawn on a circle.

    Random instances are of the field's class (see `routing.atsp`); `reset(options={"costs": array [N, N]})` takes your
    own, of moves from each node (row) to each (column), in any unit. What stands from a node to itself is ignored.
    """

    def __init__(self, *, num_nodes: int = 20, seed: int | None = None, render_mode: str | None = None):
        super().__init__(ATSPRules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)

    def _own_instance(self, options: dict[str, Any]) -> ATSPInstance | None:
        _require_known(options, "costs")
        if "costs" not in options:
            return None
        try:
            costs = np.array(options["costs"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options['costs'] is not an array of numbers: {error}") from None
        if costs.shape != (self.num_nodes, self.num_nodes):
            raise ValueError(
                f"options['costs'] has shape {costs.shape}, and this environment takes"
                f" {(self.num_nodes, self.num_nodes)}: give [N, N] costs and make the environment with num_nodes=N, at"
                f" least {MIN_NODES}"
            )
        np.fill_diagonal(costs, 0.0)
        return ATSPInstance.of(torch.from_numpy(costs).float()[None])

    def _random_instance(self) -> ATSPInstance:
        return ATSPRules.of_class(torch.from_numpy(self.np_random.integers(WHOLE_COSTS, size=self._shape)))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return 1, self.num_nodes, self.num_nodes


class PickupEnv(TSPEnv):
    """Pickup and delivery by one vehicle, registered as `Pickup-v0`; arguments and options as for `TSPEnv`."""

    problem = PickupRules

    def __init__(
        self,
        *,
        num_nodes: int = 21,
        seed: int | None = None,
        render_mode: str | None = None,
        cost: str = EUCLIDEAN.name,
        streets: str = "",
    ):
        super().__init__(num_nodes=num_nodes, seed=seed, render_mode=render_mode, cost=cost, streets=streets)


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
        _require_known(options, "coords", "demand", "capacity")
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
        _require_known(options, "coords", "demand", "capacity", *times)
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


def _require_known(options: dict[str, Any], *known: str) -> None:
    unknown = options.keys() - set(known)
    if unknown:
        there_is = f"there is only '{known[0]}'" if len(known) == 1 else f"there are {', '.join(known)}"
        raise ValueError(f"reset() has no options {sorted(unknown)}; {there_is}")
