"""Instances of files as a run's networks know them: in the frame of what they were trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from envs.routing import ATSPInstance, CVRPInstance, TSPInstance, VRPTWInstance
from routing.files import RoutingInstance
from routing.instances import longer_side, scale_to_unit_square
from routing.metrics import GIVEN, is_paid, plane, plane_unit
from routing.rules import Instance

# Costs of more than so many times the cheapest fifth are cut before networks see them: instances of training have none.
MOST_BESIDE = 30.0


class Posed(NamedTuple):
    """Instances [B] for networks, and what a cost of 1 there is in the unit of each."""

    instance: Instance
    units: Float64[np.ndarray, " B"]


def pose(instances: Sequence[RoutingInstance], device: torch.device, *, unit: float = 1.0) -> Posed:
    """Instances in the frame that networks know.

    Where moves cost distances, that is the unit square, to which positions are scaled. Instances of another cost world
    lie in its frame already. Matrices are scaled so that no move costs more than 1.

    Args:
        instances: all of one problem, size and metric.
        device: where the networks live.
        unit: of the cost world; see `routing.cost_world.Costs`.
    """
    if instances[0].metric == GIVEN:
        return _matrices(instances, device)
    if is_paid(instances[0].metric):
        coords = torch.from_numpy(np.stack([instance.coords for instance in instances]))
        return Posed(as_instance(instances, coords.float().to(device)), np.full(len(instances), unit))
    scaled, units = [], []
    for instance in instances:
        positions = plane(instance.coords, instance.metric)
        side = longer_side(positions)
        # What spreads over the unit square already, as training's instances do, is left as it is.
        if side < 0.5 or positions.min() < 0 or positions.max() > 1:
            positions = scale_to_unit_square(positions)
        else:
            side = 1.0
        scaled.append(positions)
        units.append(side * plane_unit(instance.metric))
    coords = torch.from_numpy(np.stack(scaled)).float().to(device)
    return Posed(as_instance(instances, coords, units=units), np.array(units))


def _matrices(instances: Sequence[RoutingInstance], device: torch.device) -> Posed:
    matrices = [_tamed(instance.cost_matrix()) for instance in instances]
    units = np.array([matrix.max() or 1.0 for matrix in matrices])
    costs = torch.from_numpy(np.stack(matrices) / units[:, None, None]).float().to(device)
    return Posed(ATSPInstance.of(costs), units)


def _tamed(costs: Float64[np.ndarray, "N N"]) -> Float64[np.ndarray, "N N"]:
    """A matrix whose costs are close enough to one another for networks: a large number that stands for no way is cut.

    Networks count in units of the mean, in which all other costs would be about 0 beside such a number.
    """
    positive = np.sort(costs[costs > 0])
    if not len(positive):
        return costs
    cheap = positive[: math.ceil(len(positive) / 5)].mean()
    return np.minimum(costs, MOST_BESIDE * cheap)


def as_instance(
    instances: Sequence[RoutingInstance], coords: Float[Tensor, "B N 2"], *, units: Sequence[float] | None = None
) -> Instance:
    """Instances of one problem and size as its rules take them.

    Args:
        instances: of any unit.
        coords: where their nodes are.
        units: how long a unit of `coords` is in the unit of each; 1 where not given.
    """
    places = [instance.place for instance in instances if instance.place is not None]
    place = torch.from_numpy(np.stack(places)).int().to(coords.device) if len(places) == len(instances) else None
    if instances[0].demand is None:
        return TSPInstance(coords=coords, place=place)
    demand = np.stack([np.asarray(instance.demand, dtype=np.int32) for instance in instances])
    capacity = np.array([instance.capacity for instance in instances], dtype=np.int32)
    plain = CVRPInstance(
        coords=coords,
        demand=torch.from_numpy(demand).to(coords.device),
        capacity=torch.from_numpy(capacity).to(coords.device),
        place=place,
    )
    return plain if instances[0].windows is None else _with_windows(instances, plain, units or [1.0] * len(instances))


def _with_windows(instances: Sequence[RoutingInstance], plain: CVRPInstance, units: Sequence[float]) -> VRPTWInstance:
    """The same with time windows in whole numbers; coordinates and times keep to one another."""
    device, windows, pace = plain.coords.device, [], []
    for instance, unit in zip(instances, units, strict=True):
        whole = instance.whole_windows()
        assert whole is not None and instance.windows is not None, "all of one problem have windows"
        windows.append(whole)
        pace.append(unit * instance.windows.pace * whole.fineness)

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(each, name) for each in windows]).astype(np.int32)).to(device)

    return VRPTWInstance(
        coords=plain.coords,
        demand=plain.demand,
        capacity=plain.capacity,
        ready=stacked("ready"),
        due=stacked("due"),
        service=stacked("service"),
        pace=torch.tensor(pace, dtype=torch.float32, device=device),
        place=plain.place,
        drives=stacked("drives"),
    )
