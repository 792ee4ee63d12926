"""What every cost world answers, of whichever kind; what its episodes hide, and what is shown of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Float64, Int, Int64, UInt8
from torch import Tensor

from routing.drawing import draw_tour
from routing.metrics import PAID

LAST_NODE, LAST_COST, FACTORS = "last_node", "last_cost", "factors"
# The key of observations that says which place each node is, and that part of an instance.
PLACE = "place"
# Finite bounds keep gymnasium's environment checker silent.
COST_LIMIT = 1e9
# How many draws of the hidden factors a mean is taken over.
DRAWS = 256

# The method `uniform` of one of numpy's generators, old or new: numbers in [0, 1) of a shape `size`.
UniformDraws = Callable[..., np.ndarray]


class Hidden(NamedTuple):
    """What an environment keeps beside the state where costs depend on something hidden.

    Attributes:
        factors: of the episodes, as they are before the next move.
        last_node: where the last move began; the first node itself before any move.
        last_cost: what it cost; 0 before any move.
    """

    factors: Float[Tensor, "*B F"]
    last_node: Int[Tensor, "*B"]
    last_cost: Float[Tensor, "*B"]

    @classmethod
    def begin(cls, factors: Float[Tensor, "*B F"] | None, node: Int[Tensor, "*B"]) -> Hidden | None:
        """Before the first move of an episode; None where the cost world hides nothing."""
        if factors is None:
            return None
        return cls(factors, node, torch.zeros(node.shape, device=node.device))


def hidden_factors(hidden: Hidden | None) -> tuple[Tensor, ...]:
    """What the rules' `cost` wants beside instance, state and action: the factors, where there are any."""
    return () if hidden is None else (hidden.factors,)


class Nodes(NamedTuple):
    """Where the nodes of I instances lie, and which places they are where a world knows a fixed set of places."""

    coords: Float[Tensor, "I N 2"]
    place: Int[Tensor, "I N"] | None = None


@dataclass(frozen=True)
class Costs(ABC):
    """A cost world: what moves between the nodes of instances cost, and where such instances may lie.

    Attributes:
        name: what the config key `cost` calls it.
        hidden: how many factors each episode hides, F.
        drift: standard deviation of the step that each of them takes after every move.
        symmetric: whether the 8 symmetries of the unit square change no cost.
        shown: what observations show in a world that hides something: `paid` (the last move and what it cost),
            `nothing` (the move alone) or `factors` (those too).
        unit: what one unit of cost is, in what the world measures (seconds, in streets).
        least_regret: instances are evaluated on only where the tour that is best on average over what is hidden is
            dearer than the best one by this share; 0: all are.
    """

    name: str
    _: KW_ONLY
    hidden: int = 0
    drift: float = 0.0
    symmetric: bool = False
    shown: str = "paid"
    unit: float = 1.0
    least_regret: float = 0.0

    @property
    def known(self) -> bool:
        """Whether anybody can say what moves cost; otherwise nothing is played in this world."""
        return True

    @property
    def num_places(self) -> int:
        """How many places there are, where nodes are drawn from a fixed set of them; otherwise 0."""
        return 0

    @property
    def metric(self) -> str:
        """What its costs are counted in, times `unit`: one of `routing.metrics`."""
        return PAID

    @property
    def unseen_places(self) -> tuple[int, ...]:
        """Those of its places of which nothing can be learnt."""
        return ()

    @abstractmethod
    def between(
        self,
        instance: Any,
        origin: Int[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """What moving from nodes to nodes of instances [*B, N] costs; `factors` where the world hides any."""

    @abstractmethod
    def matrix(self, instance: Any, factors: Float[Tensor, "*B F"] | None = None) -> Float[Tensor, "*B N N"]:
        """What every move from a node (row) to a node (column) of each instance costs."""

    def mean_matrix(self, instance: Any) -> Float[Tensor, "*B N N"]:
        """The same on average over what is hidden, as a mean over `DRAWS` draws of it."""
        draws = self.fixed_factors(DRAWS, seed=0)
        assert draws is not None, f"costs of {self.name} hide nothing"
        shape = (*instance.coords.shape[:-2], self.hidden)
        total = torch.zeros((), dtype=instance.coords.dtype, device=instance.coords.device)
        for factors in draws.to(instance.coords):
            total = total + self.matrix(instance, factors.expand(shape))
        return total / DRAWS

    @abstractmethod
    def random_nodes(
        self, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Nodes:
        """Nodes of instances in float32, drawn on `device`, where the generator lives too.

        Raises:
            UserError: the world has fewer places than that.
        """

    @abstractmethod
    def numpy_nodes(self, uniform: UniformDraws, num_instances: int, *sizes: int) -> Nodes:
        """Nodes of instances, coordinates in float64, made of numpy's uniform numbers.

        Args:
            uniform: gives the numbers.
            num_instances: of which fewer are the first of more.
            sizes: how many nodes of every instance are drawn, and how many after those, and so on.

        Raises:
            UserError: the world has fewer places than that.
        """

    @abstractmethod
    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """Nodes [1, N] of a user's own instance, as the world knows them, in float64.

        Args:
            positions: in the frame of the world; without any numbers (D is 0) where places are given.
            are_degrees: whether they are latitudes and longitudes.
            place: which places the nodes are; None where nobody said.

        Raises:
            UserError: the world knows no such node.
        """

    def numbers_of(self, called: Sequence[str]) -> Int64[np.ndarray, " N"] | None:
        """The numbers of places by what a file calls them; None in a world that knows its places by number alone.

        Raises:
            UserError: the world has no such place.
        """
        return None

    @abstractmethod
    def validate(self, instance: Any) -> None:
        """Look at given instances [B], before an episode begins in them. May wait for the device.

        Raises:
            UserError: the world knows no costs of moves in one of them.
        """

    def picture(
        self,
        instance: Any,
        tour: Int[np.ndarray, " L"],
        *,
        title: str,
        note: str | None = None,
        factors: Float[Tensor, "I F"] | None = None,
    ) -> UInt8[np.ndarray, "H W 3"]:
        """A closed tour of the first of given instances [I], as it is driven where its factors are those given.

        `note` is a smaller line below the title.
        """
        return draw_tour(instance.coords[0].cpu().numpy(), tour, title=title, note=note)

    def measured(self, cost: float) -> str:
        """A cost in what the world measures, in brackets; empty where costs are their own measure."""
        return ""

    def draw(
        self, count: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Float[Tensor, "I F"] | None:
        """Hidden factors of `count` episodes; None, and nothing drawn, where the world hides none."""
        return torch.rand(count, self.hidden, generator=generator, device=device) if self.hidden else None

    def drifted(
        self, factors: Float[Tensor, "*B F"], noise: Callable[[torch.Size], Float[Tensor, "*B F"]]
    ) -> Float[Tensor, "*B F"]:
        """The hidden factors after one more move; `noise` draws standard normal numbers, and only where they drift."""
        return (factors + self.drift * noise(factors.shape)) % 1 if self.drift else factors

    def fixed_factors(self, count: int, *, seed: int) -> Float64[Tensor, "I F"] | None:
        """Those of the first `count` instances that a seed gives; None where the world hides none."""
        if not self.hidden:
            return None
        # The seed itself draws the instances' coordinates.
        drawn = np.random.RandomState([seed, self.hidden]).uniform(size=(count, self.hidden))
        return torch.from_numpy(drawn)

    def evidence(self, hidden: Hidden | None) -> dict[str, Tensor]:
        """What observations show of the hidden; nothing where a world hides nothing."""
        if hidden is None:
            return {}
        # The shape is [1], since gymnasium's checker wants arrays in a Box.
        last_cost = hidden.last_cost[..., None] * (self.shown != "nothing")
        evidence = {LAST_NODE: hidden.last_node, LAST_COST: last_cost}
        return evidence | {FACTORS: hidden.factors} if self.shown == "factors" else evidence

    def observation_space(self, space: spaces.Space, num_nodes: int) -> spaces.Space:
        """The gymnasium space of observations that lie in `space` and show `evidence` beside.

        Raises:
            UserError: the world has fewer places than nodes are asked for.
        """
        assert isinstance(space, spaces.Dict)
        shown = dict(space.items())
        if self.hidden:
            shown |= {
                LAST_NODE: spaces.Discrete(num_nodes),
                LAST_COST: spaces.Box(-COST_LIMIT, COST_LIMIT, (1,), np.float32),
            }
        if self.shown == "factors":
            shown[FACTORS] = spaces.Box(0, 1, (self.hidden,), np.float32)
        return spaces.Dict(shown)
