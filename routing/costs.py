"""Cost worlds: what a move costs, by its two ends and by factors that an episode hides. Legality is the rules' affair.

A world is one function of origins and targets [*B, 2] and of hidden factors [*B, F], to costs [*B]:

    def toll(origin, target, factors):
        return (target - origin).norm(dim=-1) * (1 + (target[..., 0] < 0.5))

`--cost my_module:toll` trains in it. Staying where one is must cost nothing. A world that hides something says how much
by `@hides(F)`: F numbers, uniform in [0, 1), are drawn for each episode and handed to the function as `factors`. With
`@hides(F, drift=0.05)` they change within the episode, by a random step of that size after every move.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from config import UserError, load_function
from routing.cost_world import Costs, Nodes, UniformDraws
from routing.scattering import LAYOUTS, UNIFORM, Layout
from routing.street_costs import STREET_WORLDS, street_costs

SHOWN = ("paid", "nothing", "factors")

CostFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# In `lanes`, how much dearer it is to move against a lane, and how fast the lanes' direction changes across the middle.
LANE_STRENGTH, LANE_STEEPNESS = 0.6, 6.0
# In `river`, the cost of a crossing, how far the river swings, and how many pieces a move is cut into to find
# crossings.
RIVER_TOLL, RIVER_SWING, RIVER_PIECES = 0.3, 0.15, 64
# In `stretch`, how much dearer moves along the hidden direction are than across it; in `veering`, by how many half
# turns the direction veers with each move.
STRETCH, VEER = 5.0, 0.05


def hides(count: int, *, drift: float = 0.0) -> Callable[[CostFunction], CostFunction]:
    """Say that a world hides `count` factors, drawn for each episode uniformly in [0, 1).

    Args:
        count: how many.
        drift: standard deviation of a normal step that each takes after every move, around the circle [0, 1).
    """
    if count < 1 or not 0 <= drift < math.inf:
        raise UserError(f"@hides({count}, drift={drift}): a world hides 1 factor at least, and drifts by 0 or more")

    def mark(function: CostFunction) -> CostFunction:
        function.hidden_factors, function.drift = count, drift  # type: ignore[attr-defined]
        return function

    return mark


def euclidean(
    origin: Float[Tensor, "*B 2"], target: Float[Tensor, "*B 2"], factors: Float[Tensor, "*B F"]
) -> Float[Tensor, "*B"]:
    """The distance."""
    return (target - origin).norm(dim=-1)


def lanes(
    origin: Float[Tensor, "*B 2"], target: Float[Tensor, "*B 2"], factors: Float[Tensor, "*B F"]
) -> Float[Tensor, "*B"]:
    """Traffic that flows down in the left half and up in the right half is met head-on, or followed.

    distance * (1 + 0.6 sin(theta) tanh(6 (x - 0.5))), where theta is the move's direction and x the middle of the move.
    """
    difference = target - origin
    middle = (origin[..., 0] + target[..., 0]) / 2
    # The distance times sin(theta) is the move's y component, which needs no division where a move has no length.
    against = LANE_STRENGTH * difference[..., 1] * torch.tanh(LANE_STEEPNESS * (middle - 0.5))
    return difference.norm(dim=-1) + against


def river(
    origin: Float[Tensor, "*B 2"], target: Float[Tensor, "*B 2"], factors: Float[Tensor, "*B F"]
) -> Float[Tensor, "*B"]:
    """As `lanes`, and 0.3 for each crossing of the river y = 0.5 + 0.15 sin(2 pi x).

    A crossing is a change of bank between two of 65 points spaced evenly along the move.
    """
    along = torch.linspace(0, 1, RIVER_PIECES + 1, dtype=origin.dtype, device=origin.device)
    points = origin[..., None, :] + along[:, None] * (target - origin)[..., None, :]
    bank = points[..., 1] > 0.5 + RIVER_SWING * torch.sin(2 * math.pi * points[..., 0])
    crossings = (bank[..., 1:] != bank[..., :-1]).sum(-1)
    return lanes(origin, target, factors) + RIVER_TOLL * crossings


@hides(1)
def stretch(
    origin: Float[Tensor, "*B 2"], target: Float[Tensor, "*B 2"], factors: Float[Tensor, "*B F"]
) -> Float[Tensor, "*B"]:
    """sqrt((5 d_par)^2 + d_perp^2), by the move's parts along and across a direction that is the episode's secret.

    The hidden factor is the direction's angle in half turns.
    """
    angle = math.pi * factors[..., 0]
    direction = torch.stack((torch.cos(angle), torch.sin(angle)), -1)
    difference = target - origin
    parallel = (difference * direction).sum(-1)
    across = difference[..., 1] * direction[..., 0] - difference[..., 0] * direction[..., 1]
    return torch.stack((STRETCH * parallel, across), -1).norm(dim=-1)


@dataclass(frozen=True)
class GeometricCosts(Costs):
    """A world in which a move costs what a function says of the positions of its two ends; nodes lie anywhere.

    Attributes:
        function: costs [*B] of moves from origins to targets [*B, 2] under hidden factors [*B, F].
        layout: where the nodes of random instances lie.
    """

    function: CostFunction
    _: KW_ONLY
    layout: Layout = UNIFORM

    def at(
        self,
        origin: Float[Tensor, "*B 2"],
        target: Float[Tensor, "*B 2"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """What moving from positions to positions costs; `factors` where the world hides any."""
        if factors is None:
            assert not self.hidden, f"costs of {self.name} depend on {self.hidden} factors"
            factors = origin.new_zeros(*origin.shape[:-1], 0)
        # A function that goes by way of numpy may come back in double precision.
        return self.function(origin, target, factors).to(origin.dtype)

    def between(
        self,
        instance: Any,
        origin: Int[Tensor, "*B"],
        target: Int[Tensor, "*B"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        return self.at(*move_ends(instance.coords, origin, target), factors)

    def matrix(self, instance: Any, factors: Float[Tensor, "*B F"] | None = None) -> Float[Tensor, "*B N N"]:
        coords = instance.coords
        shape = (*coords.shape[:-1], coords.shape[-2], 2)
        if factors is not None:
            factors = factors[..., None, None, :].expand(*shape[:-1], factors.shape[-1])
        return self.at(coords[..., :, None, :].expand(shape), coords[..., None, :, :].expand(shape), factors)

    def random_nodes(
        self, num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
    ) -> Nodes:
        shape = (num_instances, self.layout.numbers(num_nodes))
        return Nodes(self.layout.place(torch.rand(shape, generator=generator, device=device), num_nodes))

    def numpy_nodes(self, uniform: UniformDraws, num_instances: int, *sizes: int) -> Nodes:
        if self.layout is UNIFORM:
            drawn = [uniform(size=(num_instances, count, 2)) for count in sizes]
            return Nodes(torch.from_numpy(np.concatenate(drawn, 1)))
        num_nodes = sum(sizes)
        numbers = uniform(size=(num_instances, self.layout.numbers(num_nodes)))
        return Nodes(self.layout.place(torch.from_numpy(numbers), num_nodes))

    def locate(
        self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool, place: Int[np.ndarray, " N"] | None
    ) -> Nodes:
        """Where they are, in the unit square."""
        if are_degrees or positions.shape[1] != 2:
            ways = _ways(positions.shape[1], are_degrees=are_degrees)
            raise UserError(f"says where nodes are by {ways}; costs of {self.name} take x and y")
        outside = ((positions < 0) | (positions > 1)).any(-1)
        if outside.any():
            x, y = positions[outside][0]
            raise UserError(
                f"has a node at ({x:g}, {y:g}), and costs of {self.name} are of moves in the unit square: scale them"
            )
        return Nodes(torch.from_numpy(positions[None].astype(np.float64)))

    def validate(self, instance: Any) -> None:
        """Any positions do."""


def _ways(numbers: int, *, are_degrees: bool) -> str:
    if are_degrees:
        return "latitude and longitude"
    return "three coordinates" if numbers else "places"


def move_ends(
    coords: Float[Tensor, "*B N 2"], origin: Int[Tensor, "*B"], target: Int[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B 2"], Float[Tensor, "*B 2"]]:
    """Where moves begin and end."""
    ends = torch.stack((origin, target), -1)[..., None]
    legs = coords.gather(-2, ends.expand(*ends.shape[:-1], 2))
    return legs[..., 0, :], legs[..., 1, :]


EUCLIDEAN = GeometricCosts("euclidean", euclidean, symmetric=True)
COSTS = {
    costs.name: costs
    for costs in (
        EUCLIDEAN,
        GeometricCosts("lanes", lanes),
        GeometricCosts("river", river),
        GeometricCosts("stretch", stretch, hidden=1),
        GeometricCosts("veering", stretch, hidden=1, drift=VEER),
    )
}


def find_costs(name: str, *, shown: str = "paid", streets: str = "", layout: str = UNIFORM.name) -> Costs:
    """The world of this name, or the one whose function is your own `module:function`.

    Args:
        name: the config key `cost`.
        shown: see `Costs`.
        streets: of the worlds of streets: `helsinki`, or an extract of OpenStreetMap.
        layout: where the nodes of random instances lie, in worlds where they may lie anywhere.

    Raises:
        UserError: there is none, what it says of a few moves cannot be costs, it hides nothing that could be shown, it
            needs other streets, or has no such layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if shown not in SHOWN:
        raise UserError(f"cost_shown is {shown!r}; choose one of {', '.join(SHOWN)}")
    if streets and name not in STREET_WORLDS:
        raise UserError(f"streets is {streets!r}, and cost {name} has none: choose cost {' or '.join(STREET_WORLDS)}")
    costs = street_costs(name, streets) if name in STREET_WORLDS else _load(name)
    if layout != UNIFORM.name:
        if not isinstance(costs, GeometricCosts):
            raise UserError(f"layout is {layout}, and nodes of cost {name} are places of a map: choose {UNIFORM.name}")
        costs = replace(costs, layout=LAYOUTS[layout])
    if shown != "paid" and not costs.hidden:
        raise UserError(f"cost_shown {shown} is for worlds that hide something; {name} hides nothing: choose paid")
    return replace(costs, shown=shown)


def _load(name: str) -> GeometricCosts:
    if name in COSTS:
        return COSTS[name]
    if ":" not in name:
        raise UserError(
            f"cost is {name!r}; choose one of {', '.join((*COSTS, *STREET_WORLDS))}, or your own module:function"
        )
    function = load_function(name, key="cost")
    hidden, drift = getattr(function, "hidden_factors", 0), getattr(function, "drift", 0.0)
    costs = GeometricCosts(name, function, hidden=hidden, drift=drift)
    _require_costs(costs)
    return costs


def _place(error: Exception) -> str:
    """The line of code that raised it."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{innermost.filename}, line {innermost.lineno}"


def _require_costs(costs: GeometricCosts) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    origin, target = torch.rand(2, 16, 2, generator=generator, device="cpu")
    factors = torch.rand(16, costs.hidden, generator=generator, device="cpu")
    try:
        moving, staying = costs.function(origin, target, factors), costs.function(origin, origin, factors)
    except Exception as error:
        raise UserError(
            f"cost {costs.name} cannot be called with origins [16, 2], targets [16, 2] and the {costs.hidden} hidden"
            f" factors that @hides declares [16, {costs.hidden}]: {type(error).__name__}:"
            f" {' '.join(str(error).split())} ({_place(error)})"
        ) from error
    given = tuple(moving.shape) if isinstance(moving, Tensor) else type(moving).__name__
    if given != (16,):
        raise UserError(f"cost {costs.name} gives {given} for 16 moves; it needs to give a tensor of shape (16,)")
    if not bool(moving.isfinite().all()):
        raise UserError(f"cost {costs.name} is not finite for moves in the unit square")
    if bool((staying != 0).any()):
        raise UserError(f"cost {costs.name} is not 0 for staying at a node, as it must be where a tour is over")
