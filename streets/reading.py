"""Reads the streets of an OpenStreetMap extract, as files of this format come from anywhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streets.network import Network, connected, projected
from streets.packages import import_osmium
from streets.roads import Road, road
from system import safe_files
from system.errors import UserError

SUFFIXES = (".osm.pbf", ".pbf", ".osm", ".osm.gz", ".osm.bz2")


def read_network(path: Path) -> Network:
    """The network of streets for cars in an extract: see `streets.roads` for what counts as one.

    Positions are projected around the middle of the streets, which is exact to a few metres over a city. Rules for
    turning at a junction and barriers are not looked at.

    Args:
        path: a file of OpenStreetMap, `.osm.pbf` or one of `SUFFIXES`.

    Raises:
        UserError: it cannot be read, or holds no network of streets.
    """
    if not path.name.endswith(SUFFIXES):
        raise UserError(
            f"{path} is none of the files {', '.join(SUFFIXES)}: give an extract of OpenStreetMap, or a network"
            " of SUMO (.net.xml, .net.xml.gz)"
        )
    streets = _Streets()
    osmium = import_osmium()
    try:
        # Nothing else is read from before it is known to be a file: a FIFO would be waited for.
        safe_files.open_to_read(path).close()
        file = osmium.FileProcessor(str(path), osmium.osm.NODE | osmium.osm.WAY).with_locations()
        for thing in file.with_filter(osmium.filter.KeyFilter("highway")):
            if thing.is_way():
                streets.add(thing)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as OpenStreetMap's: {' '.join(str(error).split())}") from error
    try:
        return streets.network()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Streets:
    """Points and arcs as they come, point by point."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.degrees: list[tuple[float, float]] = []
        self.arcs: list[tuple[int, int, float, int]] = []

    def add(self, way: Any) -> None:
        """One way, if it is a road; what lies outside the extract is left out."""
        found = road({tag.k: tag.v for tag in way.tags})
        if found is None:
            return
        points = [self._number(node) for node in way.nodes]
        for begin, end in pairwise(points):
            if begin is not None and end is not None:
                self._join(begin, end, found)

    def _number(self, node: Any) -> int | None:
        if not node.location.valid():
            return None
        if node.ref not in self.numbers:
            self.numbers[node.ref] = len(self.degrees)
            self.degrees.append((node.location.lon, node.location.lat))
        return self.numbers[node.ref]

    def _join(self, begin: int, end: int, found: Road) -> None:
        if found.forwards is not None:
            self.arcs.append((begin, end, found.forwards, found.kind))
        if found.backwards is not None:
            self.arcs.append((end, begin, found.backwards, found.kind))

    def network(self) -> Network:
        """All of them, as a network.

        Raises:
            UserError: there are too few.
        """
        if not self.arcs:
            raise UserError("it holds no streets for cars")
        tails, heads, speeds, kinds = map(np.array, zip(*self.arcs, strict=True))
        degrees = np.array(self.degrees)
        middle = (degrees.min(0) + degrees.max(0)) / 2
        return connected(projected(degrees, middle), tails, heads, speeds, kinds)._replace(middle=middle)
