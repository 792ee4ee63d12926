"""The maps that come with SUMO: their lanes, and who wants to drive from where to where."""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from driving.packages import import_sumolib, maps_folder
from driving.roads import Lane, RoadMap
from system.errors import UserError

# What is written in other words than in SUMO's files of demand: a flow of bicycles or persons is the one of them that
# was measured, and a vehicle that came faster than the lane allows is as fast as it allows.
REWORDED = (
    (
        re.compile(r'<flow\s+id="(\w+)" begin="([\d.]+)" [^>]*type="(\w+)" from="([^"]+)" to="([^"]+)"[^>]*/>'),
        r'<trip id="\1" depart="\2" type="\3" from="\4" to="\5"/>',
    ),
    (
        re.compile(r'<personFlow\s+id="(\w+)" begin="([\d.]+)" [^>]*type="(\w+)"[^>]*>'),
        r'<person id="\1" depart="\2" type="\3">',
    ),
    (re.compile("</personFlow>"), "</person>"),
    (re.compile(r'departSpeed="[\d.]+"'), 'departSpeed="max"'),
)
# What SUMO calls the direction of a turn back, and how long, in metres, the half circle is that a car needs for it.
BACK, TIGHTEST = "t", 13.0
# How many trips a second there are on a map that comes without demand, over how many seconds.
TRIPS_A_SECOND, TRIPS_SECONDS = 1.0, 900.0


class Source(NamedTuple):
    """The files of a map, in SUMO's folder, and how it is simulated.

    Attributes:
        network: its file.
        demand: files of vehicles and persons; where there are none at all, trips are drawn.
        reworded: likewise, with what `REWORDED` replaces.
        additional: files of types of vehicles and of programs of lights.
        opens: seconds of the day at which the demand begins and ends.
        options: further ones of SUMO's.
    """

    network: str
    demand: tuple[str, ...]
    opens: tuple[float, float]
    reworded: tuple[str, ...] = ()
    additional: tuple[str, ...] = ()
    options: Mapping[str, str] = {}


# Demand of an hour of measured traffic in Braunschweig, and of hours of others.
MAPS: Mapping[str, Source] = {
    "ingolstadt": Source(
        "fkk_in/ingolstadt.net.xml.gz",
        ("fkk_in/fkk_in.rou.xml",),
        (0.0, 3600.0),
        # Its flows are as regular as a clock, so that all seeds would meet the same traffic.
        options={"random-depart-offset": "12"},
    ),
    "braunschweig": Source(
        "fokr_bs_demo/fokr_bs.net.xml.gz",
        (),
        (54_000.0, 57_600.0),
        # As flows, bicycles and persons fill the roads in the course of the hour, for a demonstration.
        tuple(f"fokr_bs_demo/15_16_{who}" for who in ("bicycle.trips.xml", "ped.trips.xml", "veh.trips.xml.gz")),
        ("fokr_bs_demo/vtypes_default.add.xml", "fokr_bs_demo/signalPlan.add.xml"),
        options={
            "insertion-checks": "collision leaderGap followerGap stop arrivalSpeed speedLimit pedestrian",
            "pedestrian.striping.stripe-width": "0.55",
        },
    ),
    "motorway": Source(
        "A10KW/osm.net.xml",
        (
            *(f"A10KW/osm.{who}{way}.rou.xml" for way in ("", "_mw", "_mwb") for who in ("passenger", "truck")),
            "A10KW/extra.rou.xml",
        ),
        (0.0, 1800.0),
        options={"ignore-route-errors": "true"},
    ),
    "town": Source(
        "DRT/osm.net.xml",
        (),
        (0.0, TRIPS_SECONDS),
        options={"ignore-route-errors": "true", "tls.all-off": "true"},
    ),
}


def source_of(name: str) -> Source:
    """The files of a map.

    Raises:
        UserError: there is no such map.
    """
    if name not in MAPS:
        raise UserError(f"there is no map '{name}'; there are {', '.join(MAPS)}")
    return MAPS[name]


@functools.cache
def road_map(name: str) -> RoadMap:
    """The lanes of a map that cars may use; none leads to where a car would have to turn on the spot.

    Raises:
        UserError: there is no such map, or SUMO is not installed.
    """
    path = maps_folder() / source_of(name).network
    network = import_sumolib().net.readNet(str(path), withInternal=True)
    found = [
        lane for edge in network.getEdges(withInternal=True) for lane in edge.getLanes() if lane.allows("passenger")
    ]
    index = {lane.getID(): number for number, lane in enumerate(found)}
    return RoadMap(name, [_lane(lane, index, network) for lane in found])


def write_reworded(name: str, folder: Path) -> list[Path]:
    """Write the files of a map's demand that are not taken as they stand."""
    written = []
    for file in source_of(name).reworded:
        written.append(folder / Path(file).name.removesuffix(".gz"))
        written[-1].write_text(_reworded(file), encoding="utf-8")
    return written


@functools.cache
def _reworded(file: str) -> str:
    path = maps_folder() / file
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = content.decode("utf-8")
    for there, here in REWORDED:
        text = there.sub(here, text)
    return text


def write_trips(name: str, path: Path, *, seed: int) -> None:
    """Draw trips for a map that comes without demand, from any street to any other, as a file of SUMO's."""
    network = import_sumolib().net.readNet(str(maps_folder() / source_of(name).network))
    edges = [edge for edge in network.getEdges() if edge.allows("passenger")]
    rng = np.random.default_rng(seed)
    count = int(TRIPS_A_SECOND * TRIPS_SECONDS)
    ends = rng.integers(len(edges), size=(count, 2))
    departs = np.sort(rng.uniform(0, TRIPS_SECONDS, count))
    trips = [
        f'<trip id="{number}" depart="{depart:.2f}" from="{edges[begin].getID()}" to="{edges[end].getID()}"'
        ' departSpeed="max" departLane="best"/>'
        for number, (depart, (begin, end)) in enumerate(zip(departs, ends, strict=True))
        if begin != end
    ]
    path.write_text("<routes>\n" + "\n".join(trips) + "\n</routes>\n", encoding="utf-8")


def _lane(lane: Any, index: Mapping[str, int], network: Any) -> Lane:
    edge, place = lane.getEdge(), lane.getIndex()
    beside = {other.getIndex(): index.get(other.getID(), -1) for other in edge.getLanes()}
    successors = []
    for connection in lane.getOutgoing():
        # Within a junction connections have a lane of their own, which leads on.
        via = connection.getViaLaneID()
        to = index.get(via or connection.getToLane().getID())
        on_the_spot = via and connection.getDirection() == BACK and network.getLane(via).getLength() < TIGHTEST
        if to is not None and to not in successors and not on_the_spot:
            successors.append(to)
    return Lane(
        name=lane.getID(),
        points=_apart(np.array(lane.getShape(), np.float32)[:, :2]),
        width=float(lane.getWidth()),
        limit=float(lane.getSpeed()),
        successors=tuple(successors),
        left=beside.get(place + 1, -1),
        right=beside.get(place - 1, -1),
        in_junction=edge.isSpecial(),
    )


def _apart(points: np.ndarray) -> np.ndarray:
    """Points without those that are hardly apart from the one before; two at least."""
    kept = [points[0]]
    for point in points[1:]:
        if np.linalg.norm(point - kept[-1]) > 0.01:
            kept.append(point)
    return np.array(kept if len(kept) > 1 else [points[0], points[0] + np.array([0.02, 0.0])], np.float32)
