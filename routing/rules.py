"""What a routing problem has to say of itself, and the geometry that problems share.

There is one set of rules for each problem. The gymnasium environments, the vector environment, imagination and every
baseline call the same `reset`, `action_mask` and `step`; what a move costs stands apart in `routing.costs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from routing.cost_world import PLACE, Costs
from routing.costs import EUCLIDEAN
from routing.leftovers import Leftover

MIN_NODES = 3
# The key of observations that says where a tour stands.
CURRENT_NODE = "current_node"

# Finite bounds keep gymnasium's environment checker silent; squares of coordinates within them fit float32.
COORDS_LIMIT = 1e9

# A NamedTuple of tensors that begin with the same batch dimensions. An instance has `coords` [*B, N, 2] among them, and
# `valid` [*B, N]: False for nodes that only fill it up to the size of others (they come last); None where none do; and
# `place` [*B, N]: which place each node is, in a cost world between places; None in all others.
Instance: TypeAlias = Any
# Likewise; a state has `first` and `current` [*B] among them: the node that the tour began at, and where it stands.
State: TypeAlias = Any
Parts = TypeVar("Parts", bound=tuple[Any, ...])


class Rules(ABC):
    """The rules of one routing problem, as pure functions over batched tensors.

    A problem is a class that is never instantiated. All methods take any leading batch dimensions `*B`, on any
    device, and change none of their arguments. Neither instance nor state holds a cost. What `step` leaves as it is
    in a state (a demand, say) is handed on as the same tensor, and then costs no memory in imagination.

    Attributes:
        name: what the config key `task` calls the problem.
        instance_type: NamedTuple of what never changes within an episode.
        state_type: NamedTuple of what moves change, and of what legality depends on besides.
        node_parts: what of an instance has an entry for every node, unless it is None.
        fixed_length: whether all episodes over N nodes have `episode_steps(N)` decisions.
        starts_anywhere: whether `reset` takes any first node.
        num_node_features: size of `node_features`.
        num_state_features: size of `state_features`; 0 where current node, first node and mask say everything.
        has_solver: whether there is a solver of `leftovers`.
        shows_costs: whether observations show what every move costs.
        costs: the world that says what moves cost.
    """

    name: ClassVar[str]
    instance_type: ClassVar[type[Any]]
    state_type: ClassVar[type[Any]]
    node_parts: ClassVar[tuple[str, ...]] = ("coords", "place")
    fixed_length: ClassVar[bool]
    starts_anywhere: ClassVar[bool]
    num_node_features: ClassVar[int]
    num_state_features: ClassVar[int]
    has_solver: ClassVar[bool] = False
    shows_costs: ClassVar[bool] = False
    costs: ClassVar[Costs] = EUCLIDEAN

    @staticmethod
    @abstractmethod
    def episode_steps(num_nodes: int) -> int:
        """Decisions in an episode, at most."""

    @staticmethod
    @abstractmethod
    def reset(instance: Instance, first: Int[Tensor, "*B"] | None = None) -> State:
        """The state before the first decision; `first` is the node to begin at, node 0 where not given.

        Padding counts as visited, so that no other method needs to know of it.
        """

    @staticmethod
    @abstractmethod
    def action_mask(state: State) -> Bool[Tensor, "*B N"]:
        """True where a node may be visited next. Every row has at least one True, finished or not."""

    @staticmethod
    @abstractmethod
    def step(state: State, action: Int[Tensor, "*B"]) -> tuple[State, Bool[Tensor, "*B"]]:
        """Move to node `action`. Returns the next state, and whether the episode is finished there.

        The caller answers for the action's legality; see `action_mask`.
        """

    @staticmethod
    @abstractmethod
    def finished(state: State) -> Bool[Tensor, "*B"]:
        """Whether the episode is over. Staying at the current node is then legal, and costs 0."""

    @staticmethod
    @abstractmethod
    def remaining_legs(state: State) -> Int[Tensor, "*B"]:
        """The largest number of legs with a cost that can still come."""

    @classmethod
    def under(cls, costs: Costs) -> type[Rules]:
        """The same rules in another cost world."""
        return type(cls.__name__, (cls,), {"costs": costs, "__module__": cls.__module__})

    @classmethod
    def cost(
        cls,
        instance: Instance,
        state: State,
        action: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """What moving from the current node to node `action` costs; `factors` where the cost world hides any."""
        return cls.costs.between(instance, state.current, action, factors)

    @classmethod
    def longest_leg(cls, instance: Instance) -> Float[Tensor, "*B"]:
        """The largest cost of any move in each instance, in a world that hides nothing."""
        return cls.costs.matrix(instance).flatten(-2).amax(-1)

    @classmethod
    def problem(cls) -> str:
        """What the problem of its instances is called in files."""
        return cls.name

    @classmethod
    def instance_of(cls, parts: Mapping[str, Tensor]) -> Instance:
        """The instance of those parts that `parts_of` gave."""
        return cls.instance_type(**parts)

    @staticmethod
    def parts_of(instance: Instance) -> dict[str, Tensor]:
        """What there is to an instance, by name."""
        return {name: part for name, part in instance._asdict().items() if part is not None}

    @staticmethod
    def shown_costs(instance: Instance) -> Float[Tensor, "*B N N"] | None:
        """What observations show of the costs of moves, from each node (row) to each (column); None where nothing."""
        return None

    @staticmethod
    @abstractmethod
    def observe(instance: Instance, state: State) -> dict[str, Tensor]:
        """What the agent sees: instance and state, `action_mask` among them."""

    @staticmethod
    @abstractmethod
    def restore(obs: dict[str, Tensor]) -> tuple[Instance, State]:
        """The inverse of `observe`, for episodes that began at node 0 (all those of the environments)."""

    @staticmethod
    @abstractmethod
    def observation_space(num_nodes: int) -> spaces.Space:
        """The gymnasium space of one row of `observe`."""

    @staticmethod
    @abstractmethod
    def node_features(instance: Instance) -> Float[Tensor, "*B N F"]:
        """What networks see of each node, about [-1, 1] for the random instances."""

    @staticmethod
    @abstractmethod
    def state_features(state: State) -> Float[Tensor, "*B X"] | None:
        """What networks see of a state besides nodes and mask, about [0, 1]; None where that is nothing."""

    @classmethod
    @abstractmethod
    def random(
        cls, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device
    ) -> Instance:
        """Instances of the field's usual distribution, drawn on `device`, where the generator lives too.

        Their nodes are what `costs` draws: any positions, or some of its places.
        """

    @classmethod
    @abstractmethod
    def field_instances(cls, num_instances: int, num_nodes: int, *, seed: int) -> Instance:
        """The first instances that the field's way of drawing test sets gives for a seed.

        What has fractions may be float64: references are of that, and environments get it in float32.
        """

    @staticmethod
    @abstractmethod
    def reference_lengths(instance: Instance) -> Float64[np.ndarray, " I"]:
        """What the best solutions known cost, [I], in the sense of `cost`; cached on disk where they take long to find.

        Where moves cost distances that is how long they are; where moves earn more than they cost it is negative.
        """

    @staticmethod
    @abstractmethod
    def reference_costs(instance: Instance, costs: Float64[np.ndarray, "I N N"]) -> Float64[np.ndarray, " I"]:
        """What the best solutions known cost, [I], by the costs of moves from each node (row) to each (column).

        Raises:
            ValueError: none are known but for lengths.
        """

    @classmethod
    def leftovers(cls, instance: Instance, state: State, costs: Float64[np.ndarray, "I N N"]) -> list[Leftover]:
        """What is left of each episode [I], as a problem for a solver.

        Args:
            instance: where the episodes are played.
            state: how far they have come.
            costs: of moves from each node (row) to each node (column), as anybody may believe them to be.

        Raises:
            UserError: there is no solver of this problem.
        """
        raise UserError(f"task {cls.name} has no solver to plan with; choose act: policy, or task: tsp or cvrp")

    @staticmethod
    @abstractmethod
    def augment(instance: Instance, generator: torch.Generator) -> Instance:
        """Each instance in another shape that has the same tours at the same costs, drawn at random."""

    @classmethod
    def pad(cls, instance: Instance, num_nodes: int) -> Instance:
        """The same instances [I] with `num_nodes` nodes; those added are copies of node 0, and not valid."""
        coords = instance.coords
        added = num_nodes - coords.shape[1]

        def fill(part: Tensor | None) -> Tensor | None:
            return None if part is None else torch.cat((part, part[:, :1].expand(-1, added, *part.shape[2:])), 1)

        valid = (torch.arange(num_nodes, device=coords.device) < coords.shape[1]).expand(len(coords), -1)
        return instance._replace(valid=valid, **{name: fill(getattr(instance, name)) for name in cls.node_parts})

    @staticmethod
    @abstractmethod
    def validate(instance: Instance) -> None:
        """Look at given instances [B], before an episode begins in them. Waits for the device.

        Raises:
            ValueError: an instance is impossible; the message says which, why, and what would do.
        """


def each_part(parts: Parts, function: Callable[[Tensor], Tensor]) -> Parts:
    """A NamedTuple with every tensor in it, at any depth, replaced by what the function makes of it; a None stays."""
    make: Any = type(parts)
    return make(*(_each_part(part, function) for part in parts))


def _each_part(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, tuple):
        return each_part(part, function)
    return None if part is None else function(part)


def expand_instance(instance: Instance, shape: torch.Size) -> Instance:
    """A view of B instances for states of shape [B, *Q], as the rules want it. Copies nothing."""
    extra = [1] * (len(shape) - 1)
    return each_part(
        instance, lambda part: part.view(part.shape[0], *extra, *part.shape[1:]).expand(*shape, *part.shape[1:])
    )


def single_precision(instance: Instance) -> Instance:
    """An instance as environments and networks take it: its positions, and all else that has fractions, in float32."""
    instance = each_part(instance, lambda part: part.float() if part.is_floating_point() else part)
    return instance._replace(coords=instance.coords.float())


def visited_at_first(instance: Instance) -> Bool[Tensor, "*B N"]:
    """True where a node counts as visited before an episode begins: padding."""
    coords = instance.coords
    if instance.valid is not None:
        return ~instance.valid
    return torch.zeros(coords.shape[:-1], dtype=torch.bool, device=coords.device)


def observed_parts(instance: Instance) -> dict[str, Tensor]:
    """What an observation says of padding and of places: nothing where there are none."""
    parts = {name: getattr(instance, name) for name in ("valid", PLACE)}
    return {name: part for name, part in parts.items() if part is not None}


def random_symmetry(coords: Float[Tensor, "*B N 2"], generator: torch.Generator) -> Float[Tensor, "*B N 2"]:
    """Each instance under one of the 8 symmetries of the unit square, drawn at random: all distances stay."""
    shape = (*coords.shape[:-2], 1, 1)
    flip = torch.rand((*coords.shape[:-2], 1, 2), generator=generator, device=generator.device) < 0.5
    coords = torch.where(flip, 1 - coords, coords)
    swap = torch.rand(shape, generator=generator, device=generator.device) < 0.5
    return torch.where(swap, coords.flip(-1), coords)


def nearest_node(instance: Instance, state: State, action_mask: Bool[Tensor, "*B N"]) -> Int[Tensor, "*B"]:
    """The legal node that lies nearest to the current one."""
    here = instance.coords.gather(-2, state.current[..., None, None].expand(*state.current.shape, 1, 2))
    distance = (instance.coords - here).norm(dim=-1)
    return distance.masked_fill(~action_mask, torch.inf).argmin(-1)


def tour_length(coords: Float[Tensor, "B N 2"], tour: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Length of the closed tour, in the coordinates' own unit.

    Args:
        coords: node positions; node 0 is the start.
        tour: nodes in visiting order; a node may stand in it more than once.

    Raises:
        ValueError: a node lies outside [0, N).
    """
    if bool(((tour < 0) | (tour >= coords.shape[-2])).any()):
        raise ValueError(f"tour has nodes outside 0..{coords.shape[-2] - 1}: {tour.tolist()}")
    stops = torch.take_along_dim(coords, tour[..., None], dim=-2)
    return (stops - stops.roll(-1, dims=-2)).norm(dim=-1).sum(-1)


def node_spaces(num_nodes: int) -> dict[str, spaces.Space]:
    """The spaces of what every problem shows: positions, visited nodes, the current one and the action mask."""
    # Box takes bool when running; its annotations know floats only.
    return {
        "coords": spaces.Box(-COORDS_LIMIT, COORDS_LIMIT, (num_nodes, 2), np.float32),
        "visited": spaces.Box(0, 1, (num_nodes,), np.bool_),  # type: ignore[arg-type]
        CURRENT_NODE: spaces.Discrete(num_nodes),
        "action_mask": spaces.Box(0, 1, (num_nodes,), np.bool_),  # type: ignore[arg-type]
    }
