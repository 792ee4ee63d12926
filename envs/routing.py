"""The rules of routing problems, as pure functions over batched tensors, and the gymnasium environments on top of them.

There is one set of rules. The gymnasium environments, the vector environment, imagination and every baseline
call the same `reset`, `action_mask` and `step`; what a move costs stands apart in `cost`.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Float, Int
from torch import Tensor

from envs.costs import EUCLIDEAN, Costs, Hidden, find_costs, hidden_factors

MIN_NODES = 3

# Finite bounds keep gymnasium's environment checker silent; squares of coordinates within them fit float32.
COORDS_LIMIT = 1e9


class TSPInstance(NamedTuple):
    """A batch of travelling-salesman instances: what never changes within an episode."""

    coords: Float[Tensor, "*B N 2"]


class TSPState(NamedTuple):
    """A batch of partial tours: what the rules step."""

    first: Int[Tensor, "*B"]
    current: Int[Tensor, "*B"]
    visited: Bool[Tensor, "*B N"]


class TSPRules:
    """The travelling-salesman problem: visit every node once, then return to the node you began at.

    All methods are pure and take any leading batch dimensions, on any device. An episode over N nodes has N
    decisions; the last has one legal action, the first node. A finished row stays legal for ever: its first node
    is open, at cost 0.
    """

    name = "tsp"
    instance_type = TSPInstance
    state_type = TSPState
    fixed_length = True
    num_node_features = 2
    costs: ClassVar[Costs] = EUCLIDEAN

    @classmethod
    def under(cls, costs: Costs) -> type[TSPRules]:
        """The same rules in another cost world."""
        return type(cls.__name__, (cls,), {"costs": costs})

    @staticmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode, at most (for this problem: exactly)."""
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
        visited = torch.zeros(coords.shape[:-1], dtype=torch.bool, device=coords.device)
        return TSPState(first=first, current=first, visited=visited.scatter(-1, first[..., None], True))

    @staticmethod
    def action_mask(state: TSPState) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True."""
        every_node_visited = state.visited.all(-1, keepdim=True)
        return (~state.visited).scatter(-1, state.first[..., None], every_node_visited)

    @staticmethod
    def step(state: TSPState, action: Int[Tensor, "*B"]) -> tuple[TSPState, Bool[Tensor, "*B"]]:
        """Move to node `action`. Returns the next state, and whether the tour is closed there.

        The caller answers for the action's legality; see `action_mask`.
        """
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

    @classmethod
    def cost(
        cls,
        instance: TSPInstance,
        state: TSPState,
        action: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """What moving from the current node to node `action` costs; `factors` where the cost world hides any."""
        origin, target = move_ends(instance.coords, state.current, action)
        return cls.costs.between(origin, target, factors)

    @classmethod
    def longest_leg(cls, instance: TSPInstance) -> Float[Tensor, "*B"]:
        """The largest cost of any move in each instance, in a world that hides nothing."""
        return cls.costs.matrix(instance.coords).flatten(-2).amax(-1)

    @staticmethod
    def observe(instance: TSPInstance, state: TSPState) -> dict[str, Tensor]:
        """What the agent sees: the static coordinates, the state, and the action mask."""
        return {
            "coords": instance.coords,
            "visited": state.visited,
            "current_node": state.current,
            "action_mask": TSPRules.action_mask(state),
        }

    @staticmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""
        # Box takes bool when running; its annotations know floats only.
        return spaces.Dict(
            {
                "coords": spaces.Box(-COORDS_LIMIT, COORDS_LIMIT, (num_nodes, 2), np.float32),
                "visited": spaces.Box(0, 1, (num_nodes,), np.bool_),  # type: ignore[arg-type]
                "current_node": spaces.Discrete(num_nodes),
                "action_mask": spaces.Box(0, 1, (num_nodes,), np.bool_),  # type: ignore[arg-type]
            }
        )

    @staticmethod
    def node_features(instance: TSPInstance) -> Float[Tensor, "*B N F"]:
        """What networks see of each node, about [-1, 1] for instances in the unit square."""
        return 2 * instance.coords - 1

    @staticmethod
    def augment(instance: TSPInstance, generator: torch.Generator) -> TSPInstance:
        """Each instance under one of the 8 symmetries of the unit square, drawn at random: same tours, same lengths."""
        coords = instance.coords
        shape = (*coords.shape[:-2], 1, 1)
        flip = torch.rand((*coords.shape[:-2], 1, 2), generator=generator, device=generator.device) < 0.5
        coords = torch.where(flip, 1 - coords, coords)
        swap = torch.rand(shape, generator=generator, device=generator.device) < 0.5
        return TSPInstance(coords=torch.where(swap, coords.flip(-1), coords))

    @staticmethod
    def restore(obs: dict[str, Tensor]) -> tuple[TSPInstance, TSPState]:
        """The inverse of `observe`, for episodes that began at node 0 (all those of the environments)."""
        current = obs["current_node"].long()
        state = TSPState(first=torch.zeros_like(current), current=current, visited=obs["visited"])
        return TSPInstance(coords=obs["coords"]), state


RULES = {rules.name: rules for rules in (TSPRules,)}


def move_ends(
    coords: Float[Tensor, "*B N 2"], origin: Int[Tensor, "*B"], target: Int[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B 2"], Float[Tensor, "*B 2"]]:
    """Where moves begin and end."""
    ends = torch.stack((origin, target), -1)[..., None]
    legs = coords.gather(-2, ends.expand(*ends.shape[:-1], 2))
    return legs[..., 0, :], legs[..., 1, :]


def nearest_node(instance: TSPInstance, state: TSPState) -> Int[Tensor, "*B"]:
    """The legal node that lies nearest to the current one."""
    here = instance.coords.gather(-2, state.current[..., None, None].expand(*state.current.shape, 1, 2))
    distance = (instance.coords - here).norm(dim=-1)
    return distance.masked_fill(~TSPRules.action_mask(state), torch.inf).argmin(-1)


def tour_length(coords: Float[Tensor, "B N 2"], tour: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Length of the closed tour, in the coordinates' own unit.

    Args:
        coords: node positions; node 0 is the start.
        tour: nodes in visiting order.

    Raises:
        ValueError: a node lies outside [0, N).
    """
    if bool(((tour < 0) | (tour >= coords.shape[-2])).any()):
        raise ValueError(f"tour has nodes outside 0..{coords.shape[-2] - 1}: {tour.tolist()}")
    stops = torch.take_along_dim(coords, tour[..., None], dim=-2)
    return (stops - stops.roll(-1, dims=-2)).norm(dim=-1).sum(-1)


class LegalActions(spaces.Discrete):
    """The nodes of an environment, whose plain `sample()` draws among those that are legal now.

    `sample(mask=...)` and `sample(probability=...)` work as in `Discrete`.
    """

    def __init__(self, num_nodes: int, *, action_masks: Callable[[], np.ndarray], seed: int | None = None):
        super().__init__(num_nodes, seed=seed)
        self._action_masks = action_masks

    def sample(self, mask: np.ndarray | None = None, probability: np.ndarray | None = None) -> np.int64:
        if mask is None and probability is None:
            mask = self._action_masks().astype(np.int8)
        return super().sample(mask, probability)


class RoutingEnv(gymnasium.Env, ABC):
    """One routing instance at a time, stepped by the batched rules with a batch of one.

    An action is the next node. The reward is minus the leg's cost, so that the return of an episode is minus the
    length of its tour. `info["action_mask"]` and `action_masks()` repeat the observation's `action_mask`.

    A problem is added by a subclass that says where instances come from: `_own_instance` and `_random_instance`.
    Factors that the rules' cost world hides are drawn at every reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    _instance: TSPInstance
    _state: TSPState
    _hidden: Hidden | None
    _tour: list[int]

    def __init__(self, rules: type[TSPRules], *, num_nodes: int, seed: int | None, render_mode: str | None):
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
        self.action_space = LegalActions(num_nodes, action_masks=self.action_masks, seed=seed)
        self._first_seed = seed
        self._begun = False

    @abstractmethod
    def _own_instance(self, options: dict[str, Any]) -> TSPInstance | None:
        """The instance given to `reset(options=...)`, a batch of one; None where the options hold none."""

    @abstractmethod
    def _random_instance(self) -> TSPInstance:
        """A new instance, a batch of one, drawn from `self.np_random`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode: on the instance in `options` if there is one, else on a random one.

        Raises:
            ValueError: the options hold an unknown key or an impossible instance; the episode in progress goes on.
        """
        own_instance = self._own_instance(options or {})
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
        self._hidden = self._hidden and Hidden(self._hidden.factors, self._state.current, cost)
        self._state, finished = self.rules.step(self._state, moves)
        self._tour.append(node)
        obs, info = self._observe()
        return obs, -float(cost), bool(finished), False, info

    def action_masks(self) -> Bool[np.ndarray, " N"]:
        """True where a node may be visited next.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no action is legal before the first episode: call reset()")
        return self.rules.action_mask(self._state)[0].numpy()

    def render(self) -> np.ndarray:
        """Draw the tour so far, as an image `[H, W, 3]` of uint8.

        Raises:
            ValueError: the environment was made without a render mode.
            ResetNeeded: no episode has begun.
        """
        # matplotlib takes half a second to import, and most environments are never drawn.
        from envs.drawing import draw_tour

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
        cost: what moves cost: a world of `envs.costs`, or your own `module:function`.

    Random instances are uniform in the unit square; `reset(options={"coords": array [N, 2]})` takes your own.
    """

    def __init__(
        self,
        *,
        num_nodes: int = 20,
        seed: int | None = None,
        render_mode: str | None = None,
        cost: str = EUCLIDEAN.name,
    ):
        rules = TSPRules.under(find_costs(cost))
        super().__init__(rules, num_nodes=num_nodes, seed=seed, render_mode=render_mode)

    def _own_instance(self, options: dict[str, Any]) -> TSPInstance | None:
        unknown = options.keys() - {"coords"}
        if unknown:
            raise ValueError(f"reset() has no options {sorted(unknown)}; there is only 'coords'")
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
        coords = self.np_random.uniform(size=(1, self.num_nodes, 2))
        return TSPInstance(coords=torch.from_numpy(coords.astype(np.float32)))
