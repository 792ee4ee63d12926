"""The worlds that logs of trips are from: runs that know a log alone are judged there by true costs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64

from config import ConfigError, UserError
from dreamer import Dreamer
from envs.routing import TSPRules
from routing.cost_world import Costs
from routing.costs import find_costs
from routing.frame import Frame
from routing.instances import MIN_REFERENCE_NODES
from routing.logged_costs import SAME_PLACE
from routing.places import Places
from routing.rules import single_precision
from routing.street_costs import StreetCosts
from routing.tsp import TSPInstance
from streets.network import projected
from training.loading import LoadedRun
from training.trips import frame_of

# How far a place of a log in longitudes and latitudes may be from where the streets have it: files round degrees.
SAME_METRES = 20.0
# How far beyond the unit square a log's box may reach.
ROUNDING = 1e-6


class Maps(NamedTuple):
    """Maps of a world, and what moves truly cost there, in its units.

    Attributes:
        drawn: the maps as the world has them.
        costs: of moves from each node (row) to each (column).
    """

    drawn: TSPInstance
    costs: Float64[np.ndarray, "I N N"]


def named_world(cost: str, *, streets: str) -> Costs:
    """The world of which a log is.

    Raises:
        UserError: there is none of this name, or it hides something, so that no log can be of it.
    """
    world = find_costs(cost, streets=streets)
    if world.hidden:
        raise ConfigError(f"costs of {world.name} depend on what no log shows; name a world that hides nothing")
    return world


def draw_maps(world: Costs, count: int, nodes: int, *, seed: int) -> Maps:
    """The first maps that a seed of the field gives.

    Raises:
        ConfigError: too few nodes for a tour.
    """
    if nodes < MIN_REFERENCE_NODES:
        raise ConfigError(f"nodes is {nodes}; a tour takes {MIN_REFERENCE_NODES} at least")
    drawn = TSPRules.under(world).field_instances(count, nodes, seed=seed)
    return Maps(drawn, world.matrix(drawn).double().numpy())


def known_log(run: LoadedRun, path: Path) -> tuple[Dreamer, Frame]:
    """The agent of a run that knows a log alone and can plan tours, and the log's frame.

    Raises:
        ConfigError: it has learnt from none, or its tours are not those of the TSP.
    """
    agent, frame = run.agent, frame_of(run.log)
    if frame is None or not isinstance(agent, Dreamer) or agent.forecaster is None:
        raise ConfigError(f"{path} has learnt from no log of a world that it does not know; give another run")
    if not issubclass(agent.forecaster.model.rules, TSPRules):
        raise ConfigError(f"{path} is of task {run.config.task}, and a log's tours are judged as those of tsp")
    return agent, frame


def as_seen(drawn: TSPInstance, world: Costs, frame: Frame, path: Path) -> TSPInstance:
    """Maps of a world as a model sees them that has learnt from a log of it, in single precision.

    Args:
        drawn: the maps [I, N] as the world has them.
        world: that the log is said to be of.
        frame: of the log.
        path: of the run, for what is said where it is refused.

    Raises:
        ConfigError: the log cannot be of that world, or its box holds only some of the maps.
    """
    if frame.on_earth and not (isinstance(world, StreetCosts) and world.network.middle.any()):
        raise ConfigError(
            f"{path} has learnt from a log in longitudes and latitudes, and {world.name} is no part of the earth; name"
            " the world that the log is of"
        )
    if len(frame.names) != world.num_places:
        raise ConfigError(f"{path} knows {len(frame.names)} places, and {world.name} has {world.num_places}")
    if isinstance(world, Places):
        numbers = _numbers(world, frame, path)
        assert drawn.place is not None, "nodes of such a world are places"
        place = numbers[drawn.place.numpy()]
        coords = torch.from_numpy(frame.places[place])
        return single_precision(drawn._replace(coords=coords, place=torch.from_numpy(place).to(drawn.place.dtype)))
    corners = np.stack((frame.corner, frame.corner + frame.size / frame.scale))
    if corners.min() < -ROUNDING or corners.max() > 1 + ROUNDING:
        raise ConfigError(
            f"{path} has learnt from a log with positions from {_pair(corners[0])} to {_pair(corners[1])}, and all of"
            f" {world.name} lies in the unit square; name the world that the log is of"
        )
    try:
        inside = frame.located(drawn.coords.reshape(-1, 2).numpy(), are_degrees=False)
    except UserError as error:
        raise ConfigError(f"{path} knows a part of {world.name} alone: a map {error}") from error
    return single_precision(drawn._replace(coords=torch.from_numpy(inside.reshape(drawn.coords.shape))))


def _numbers(world: Places, frame: Frame, path: Path) -> Int64[np.ndarray, " P"]:
    """The log's number of each place of a world.

    Raises:
        ConfigError: the log calls a place otherwise than by the world's number, or has it elsewhere.
    """
    try:
        numbers = frame.numbers_of([str(number) for number in range(world.num_places)])
    except UserError as error:
        raise ConfigError(f"{path} calls places otherwise than {world.name}, by numbers from 0: {error}") from error
    given = (frame.places / frame.scale + frame.corner)[numbers]
    if frame.on_earth:
        assert isinstance(world, StreetCosts), "no other world is on earth"
        true = world.network.points[world.network.places]
        away = np.linalg.norm(projected(given, world.network.middle) - true, axis=-1) / SAME_METRES
    else:
        away = np.linalg.norm(given - world.coords.double().numpy(), axis=-1) / SAME_PLACE
    if away.max() > 1:
        number = int(away.argmax())
        raise ConfigError(
            f"{path} has place {number} at {_pair(given[number])}, and {world.name} has it elsewhere; name the world"
            " that the log is of"
        )
    return numbers


def _pair(position: Float64[np.ndarray, " 2"]) -> str:
    return f"({position[0]:g}, {position[1]:g})"
