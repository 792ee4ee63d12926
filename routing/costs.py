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
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Float64, Int
from torch import Tensor

from config import UserError, load_function

LAST_NODE, LAST_COST, FACTORS = "last_node", "last_cost", "factors"
# Finite bounds keep gymnasium's environment checker silent.
COST_LIMIT = 1e9
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


class Costs(NamedTuple):
    """A cost world.

    Attributes:
        name: what the config key `cost` calls it.
        function: costs [*B] of moves from origins to targets [*B, 2] under hidden factors [*B, F].
        hidden: how many factors each episode hides, F.
        drift: standard deviation of the step that each of them takes after every move.
        symmetric: whether the 8 symmetries of the unit square change no cost.
        shown: what observations show in a world that hides something: `paid` (the last move and what it cost),
            `nothing` (the move alone) or `factors` (those too).
    """

    name: str
    function: CostFunction
    hidden: int = 0
    drift: float = 0.0
    symmetric: bool = False
    shown: str = "paid"

    def between(
        self,
        origin: Float[Tensor, "*B 2"],
        target: Float[Tensor, "*B 2"],
        factors: Float[Tensor, "*B F"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """What moving from origins to targets costs; `factors` where the world hides any."""
        if factors is None:
            assert not self.hidden, f"costs of {self.name} depend on {self.hidden} factors"
            factors = origin.new_zeros(*origin.shape[:-1], 0)
        # A function that goes by way of numpy may come back in double precision.
        return self.function(origin, target, factors).to(origin.dtype)

    def matrix(
        self, coords: Float[Tensor, "*B N 2"], factors: Float[Tensor, "*B F"] | None = None
    ) -> Float[Tensor, "*B N N"]:
        """What every move from a node (row) to a node (column) of each instance costs."""
        shape = (*coords.shape[:-1], coords.shape[-2], 2)
        if factors is not None:
            factors = factors[..., None, None, :].expand(*shape[:-1], factors.shape[-1])
        return self.between(coords[..., :, None, :].expand(shape), coords[..., None, :, :].expand(shape), factors)

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
        """The gymnasium space of observations that lie in `space` and show `evidence` beside."""
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


EUCLIDEAN = Costs("euclidean", euclidean, symmetric=True)
COSTS = {
    costs.name: costs
    for costs in (
        EUCLIDEAN,
        Costs("lanes", lanes),
        Costs("river", river),
        Costs("stretch", stretch, hidden=1),
        Costs("veering", stretch, hidden=1, drift=VEER),
    )
}


def find_costs(name: str, *, shown: str = "paid") -> Costs:
    """The world of this name, or the one whose function is your own `module:function`.

    Args:
        name: the config key `cost`.
        shown: see `Costs`.

    Raises:
        UserError: there is none, what it says of a few moves cannot be costs, or it hides nothing that could be shown.
    """
    if shown not in SHOWN:
        raise UserError(f"cost_shown is {shown!r}; choose one of {', '.join(SHOWN)}")
    costs = _load(name)
    if shown != "paid" and not costs.hidden:
        raise UserError(f"cost_shown {shown} is for worlds that hide something; {name} hides nothing: choose paid")
    return costs._replace(shown=shown)


def _load(name: str) -> Costs:
    if name in COSTS:
        return COSTS[name]
    if ":" not in name:
        raise UserError(f"cost is {name!r}; choose one of {', '.join(COSTS)}, or your own module:function")
    function = load_function(name, key="cost")
    costs = Costs(name, function, hidden=getattr(function, "hidden_factors", 0), drift=getattr(function, "drift", 0.0))
    _require_costs(costs)
    return costs


def _place(error: Exception) -> str:
    """The line of code that raised it."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{innermost.filename}, line {innermost.lineno}"


def _require_costs(costs: Costs) -> None:
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
