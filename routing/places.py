"""Cost worlds over a fixed set of places, in which what a move costs is looked up by its two ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from config import UserError
from routing.cost_world import PLACE, Costs, Nodes, UniformDraws

# The most uniform numbers that are drawn at a time: they need 32 MB.
DRAWN_AT_ONCE = 2**22


def nearest_points(
    positions: Float64[np.ndarray, "N 2"], points: Float64[np.ndarray, "P 2"]
) -> Int64[np.ndarray, " N"]:
    """Which of the points is nearest to each position."""
    return np.array([np.square(points - each).sum(-1).argmin() for each in positions], dtype=np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Places(Costs):
    """A world in which every node is one of a fixed set of places; a subclass says what moves between two of them cost.

    In a foreign one, which is shown to models that have learnt of other places, place p is called -1 - p: whatever is
    below 0 is unknown to them all.

    Attributes:
        coords: where the places lie, in the unit square.
        foreign: whether it is.
    """

    coords: Float[Tensor, "P 2"]
    foreign: bool = False
    _copies: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_places(self) -> int:
        """How many places there are."""
        return len(self.coords)

    def random_nodes(
        self, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Nodes:
        """Different places, every choice and order of them as likely as any other."""
        self._require_places(num_nodes)
        keys = torch.rand(num_instances, self.num_places, generator=generator, device=device)
        place = keys.topk(num_nodes, dim=-1).indices
        return Nodes(self._on(place.device)[0][place], self._called(place).int())

    def numpy_nodes(self, uniform: UniformDraws, num_instances: int, *sizes: int) -> Nodes:
        """Different places, every choice and order of them as likely as any other."""
        num_nodes = sum(sizes)
        self._require_places(num_nodes)
        rows = max(1, DRAWN_AT_ONCE // self.num_places)
        pieces = [min(rows, num_instances - begin) for begin in range(0, num_instances, rows)]
        chosen = [uniform(size=(count, self.num_places)).argsort(-1, kind="stable")[:, :num_nodes] for count in pieces]
        place = torch.from_numpy(np.concatenate(chosen))
        return Nodes(self.coords[place].double(), self._called(place).int())

    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """The places given, or those that are nearest to positions in the frame of `coords`."""
        if place is None:
            place = self._nearest(positions, are_degrees=are_degrees)
        outside = (place < 0) | (place >= self.num_places)
        if outside.any():
            raise UserError(f"has place {place[outside][0]}; {self.name} has 0 to {self.num_places - 1}")
        chosen = torch.from_numpy(place.astype(np.int64))[None]
        return Nodes(self.coords[chosen].double(), self._called(chosen).int())

    def _nearest(self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool) -> Int[np.ndarray, " N"]:
        if are_degrees or positions.shape[1] != 2:
            raise UserError(f"says where nodes are in a way that {self.name} knows nothing of; give x and y, or places")
        outside = ((positions < 0) | (positions > 1)).any(-1)
        if outside.any():
            x, y = positions[outside][0]
            raise UserError(
                f"has a node at ({x:g}, {y:g}), and places of {self.name} lie in the unit square: scale them, or name"
                " places, in a column `place`"
            )
        return nearest_points(positions, self.coords.double().numpy())

    def validate(self, instance: Any) -> None:
        place = instance.place
        if place is None:
            raise UserError(f"costs of {self.name} are those of moves between places: give instances with `place`")
        numbers = self._called(place)
        outside = (numbers < 0) | (numbers >= self.num_places)
        if bool(outside.any()):
            raise UserError(
                f"place {int(place[outside][0])} lies outside 0..{self.num_places - 1}, the places of {self.name}"
            )

    def observation_space(self, space: spaces.Space, num_nodes: int) -> spaces.Space:
        self._require_places(num_nodes)
        shown = super().observation_space(space, num_nodes)
        assert isinstance(shown, spaces.Dict)
        # Box takes integers when running; its annotations know floats only.
        low, high = sorted((self._called(0), self._called(self.num_places - 1)))
        places = spaces.Box(low, high, (num_nodes,), np.int32)  # type: ignore[arg-type]
        return spaces.Dict({**shown.spaces, PLACE: places})

    def _called(self, place: Any) -> Any:
        """What places are called by their numbers; and their numbers, by what they are called."""
        return -1 - place if self.foreign else place

    def _require_places(self, num_nodes: int) -> None:
        if num_nodes > self.num_places:
            raise UserError(
                f"an instance has {num_nodes} nodes, and {self.name} has {self.num_places} places: choose fewer nodes"
            )

    def _held(self) -> tuple[Tensor, ...]:
        """All tensors of the world, the coordinates first."""
        return (self.coords,)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The same on a device, where they are brought once."""
        if device not in self._copies:
            self._copies[device] = tuple(part.to(device) for part in self._held())
        return self._copies[device]


@dataclass(frozen=True, eq=False, kw_only=True)
class PlaceCosts(Places):
    """A world of places with a table that says what each move between two of them costs.

    Agents see where a node lies and which place it is; neither the table nor what it was made of.

    A world with several tables hides one factor, which says where on a circle through them an episode is: 0 is the
    first table, and of K tables the second lies at 1 / K. In between, costs are interpolated linearly.

    Attributes:
        tables: costs of moves from each place (row) to each (column), positive, and 0 for staying.
    """

    tables: Float[Tensor, "K P P"]

    def __post_init__(self) -> None:
        assert self.hidden == int(len(self.tables) > 1), f"{len(self.tables)} tables, and {self.hidden} hidden factors"
        assert not self.symmetric, "nobody knows symmetries of a table"

    def between(
        self,
        instance: Any,
        origin: Int[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        ends = instance.place.gather(-1, torch.stack((origin, target), -1))
        return self._look_up(ends[..., 0], ends[..., 1], factors).to(instance.coords.dtype)

    def matrix(self, instance: Any, factors: Float[Tensor, "*B F"] | None = None) -> Float[Tensor, "*B N N"]:
        place = instance.place
        begin, end = torch.broadcast_tensors(place[..., :, None], place[..., None, :])
        if factors is not None:
            factors = factors[..., None, None, :].expand(*begin.shape, factors.shape[-1])
        return self._look_up(begin, end, factors).to(instance.coords.dtype)

    def mean_matrix(self, instance: Any) -> Float[Tensor, "*B N N"]:
        """Exactly: linear interpolation around a circle gives every table the same weight."""
        tables = self._on(instance.place.device)[1]
        place = self._called(instance.place.long())
        return tables.mean(0)[place[..., :, None], place[..., None, :]].to(instance.coords.dtype)

    def _look_up(
        self, begin: Int[Tensor, "*B"], end: Int[Tensor, "*B"], factors: Float[Tensor, "*B F"] | None
    ) -> Float[Tensor, "*B"]:
        """What moves between places cost."""
        begin, end, tables = self._called(begin.long()), self._called(end.long()), self._on(begin.device)[1]
        if not self.hidden:
            return tables[0, begin, end]
        assert factors is not None, f"costs of {self.name} depend on {self.hidden} factors"
        along = factors[..., 0] * len(tables)
        # A factor that was rounded to 1 is at the first table again.
        before = along.long() % len(tables)
        low, high = tables[before, begin, end], tables[(before + 1) % len(tables), begin, end]
        return low + (high - low) * along.frac()

    def _held(self) -> tuple[Tensor, ...]:
        return (self.coords, self.tables)
