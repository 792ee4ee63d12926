"""The cost worlds of real streets: driving seconds between places of a map, at all hours alike or by the hour."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from config import UserError
from routing.drawing import draw_streets
from routing.metrics import SECONDS
from routing.places import PlaceCosts, nearest_points
from streets.network import Network, projected
from streets.traffic import HOURS, rush_seconds
from streets.travel import cached_seconds, network_of

STREETS, RUSH = "streets", "rush"
STREET_WORLDS = (STREETS, RUSH)
# What a move between two places costs on average, in units of cost: as in the unit square, whose distances are 0.52.
MEAN_COST = 0.5
# How far from any place a position may be that is to stand for one.
FARTHEST_METRES = 500.0
# In `rush`, by what share the tour that is best on average over the day must be dearer than the best one, for an
# instance to be evaluated on.
LEAST_REGRET = 0.03


@dataclass(frozen=True, eq=False, kw_only=True)
class StreetCosts(PlaceCosts):
    """A world of places whose costs are driving times in a network of streets.

    Attributes:
        network: the streets.
        seconds: that each arc takes, for each of the tables.
    """

    network: Network
    seconds: Float64[np.ndarray, "K A"]

    @property
    def metric(self) -> str:
        """Seconds of driving."""
        return SECONDS

    def _nearest(self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool) -> Int[np.ndarray, " N"]:
        """Also of latitudes and longitudes, which the network projects as its own."""
        if not are_degrees:
            return super()._nearest(positions, are_degrees=False)
        if not self.network.middle.any():
            raise UserError(
                "has latitudes and longitudes, and the streets of SUMO do not say where on earth they are: give x and y"
                " in the unit square of the map, or places"
            )
        points = self.network.points[self.network.places]
        metres = projected(positions[:, ::-1], self.network.middle)
        nearest = nearest_points(metres, points)
        away = np.linalg.norm(points[nearest] - metres, axis=-1)
        if away.max(initial=0.0) > FARTHEST_METRES:
            latitude, longitude = positions[away.argmax()]
            raise UserError(
                f"has a node at {latitude:g}, {longitude:g}, {away.max() / 1000:,.1f} km from the nearest place of the"
                f" streets; it may be {FARTHEST_METRES / 1000:g} km from one at most"
            )
        return nearest

    def picture(
        self,
        instance: Any,
        tour: Int[np.ndarray, " L"],
        *,
        title: str,
        note: str | None = None,
        factors: Float[Tensor, "I F"] | None = None,
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Along the streets; between two hours, as at the nearer one."""
        along = 0 if factors is None else round(float(factors[0, 0]) * len(self.seconds)) % len(self.seconds)
        places = self._called(instance.place[0].cpu().numpy()[tour])
        return draw_streets(self.network, [places], titles=[title], note=note, seconds=self.seconds[along])

    def seen_from(self, home: StreetCosts) -> StreetCosts:
        """This map as whoever has learnt another sees it; one and the same map is no foreign one."""
        parts = (home.coords, home.tables), (self.coords, self.tables)
        same = all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(*parts, strict=True))
        return self if same else replace(self, foreign=True)

    def measured(self, cost: float) -> str:
        """Minutes."""
        return f" ({cost * self.unit / 60:.1f} min)"


def street_costs(name: str, source: str) -> StreetCosts:
    """The world `streets`: seconds of driving where nothing is in the way; or `rush`: at a hidden hour of the day.

    Args:
        name: which of them.
        source: `helsinki`, an extract of OpenStreetMap, or a network of SUMO.

    Raises:
        UserError: none was given, or it holds no streets that make a world.
    """
    if not source:
        raise UserError(
            f"cost {name} needs streets: add --streets helsinki, or --streets FILE for a map of your own: an extract of"
            " OpenStreetMap (.osm.pbf) or a network of SUMO (.net.xml)"
        )
    network = network_of(source)
    if name == RUSH:
        arcs = np.stack([rush_seconds(network, hour) for hour in HOURS])
    else:
        arcs = network.free_flow[None]
    seconds = torch.from_numpy(np.stack([cached_seconds(network, each) for each in arcs]))
    count = len(network.places)
    mean = float(seconds.double().sum()) / (len(seconds) * count * (count - 1))
    unit = mean / MEAN_COST
    points, _ = network.unit_square()
    return StreetCosts(
        name,
        coords=torch.from_numpy(points[network.places].astype(np.float32)),
        tables=seconds / unit,
        network=network,
        seconds=arcs,
        hidden=int(name == RUSH),
        unit=unit,
        least_regret=LEAST_REGRET if name == RUSH else 0.0,
    )
