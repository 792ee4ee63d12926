"""Reads the streets of a road network of SUMO, the traffic simulator, as files of this format come from anywhere."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

import numpy as np

from streets.network import SECONDS, Network, connected
from streets.roads import CLASS_NAMES, CLASSES, LINKS, SLOWEST
from system import safe_files
from system.errors import UserError

SUFFIXES = (".net.xml", ".net.xml.gz")
# Bytes of a network, unpacked, and how many junctions and streets it may have: those of a large city. A small file can
# be packed that would fill any memory.
LARGEST, MOST_THINGS = 2**28, 1_000_000
BLOCK = 2**16
# The largest numbers that are taken: metres from the origin, metres of a street, and metres per second.
FARTHEST, LONGEST, FASTEST = 1e8, 1e6, 200.0
# What begins the names of all that lies within a junction, and the types of streets that come from OpenStreetMap.
INTERNAL, OSM_TYPE = ":", "highway."
# The class of streets whose type says nothing. Priorities say less: what they are numbered by differs from one network
# to the next.
NO_CLASS = "unclassified"
# Who drives, and the word for everybody.
CARS = frozenset({"passenger", "all"})
MOST_SHOWN = 40


def read_network(path: Path) -> Network:
    """The network of streets for cars in a file of SUMO.

    Junctions are its points. A street that cars may use on some lane leads from one to the next: at the speed of the
    fastest of these lanes, and as long as they are, but no shorter than the straight line. Of streets that come from
    OpenStreetMap, those count that count in an extract of it (`streets.roads`). Which lane leads to which street,
    lights, and all that lies within a junction are not looked at.

    Args:
        path: one of `SUFFIXES`.

    Raises:
        UserError: it cannot be read, or holds no network of streets.
    """
    streets = _Streets()
    try:
        with safe_files.open_to_read(path, most=LARGEST) as file:
            plain = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
            streets.read(iter(partial(plain.read, BLOCK), b""))
        return streets.network()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    # Also of what stands in no encoding that there is.
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise UserError(f"{path} cannot be read as SUMO's: {error}") from error


class _Street:
    """A street whose lanes are still to come.

    Attributes:
        name: in the file.
        ends: the junctions where it begins and ends.
        kind: of its class.
        speed: in m/s, of the fastest lane for cars so far; 0 where there was none.
        metres: of the longest of these.
    """

    def __init__(self, name: str, ends: tuple[str, str], kind: int) -> None:
        self.name, self.ends, self.kind = name, ends, kind
        self.speed, self.metres = 0.0, 0.0


class _Streets:
    """Junctions and streets as they come, one element after the other: no more of the file is held."""

    def __init__(self) -> None:
        self.positions: dict[str, tuple[float, float]] = {}
        self.streets: list[_Street] = []
        self.street: _Street | None = None
        self.seen, self.things = False, 0

    def read(self, blocks: Iterable[bytes]) -> None:
        """All that a file holds.

        Raises:
            UserError: it is no network of SUMO.
        """
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self._begin, self._end
        parser.StartDoctypeDeclHandler = _refuse_declarations
        total = 0
        for block in blocks:
            total += len(block)
            if total > LARGEST:
                raise UserError(f"it holds more than {LARGEST:,} bytes; give a smaller part of the map")
            parser.Parse(block, False)
        parser.Parse(b"", True)

    def _begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        if not self.seen and tag != "net":
            raise UserError(f"it begins with {_shown(tag)}; a network of SUMO begins with net")
        self.seen = True
        if tag == "junction":
            self._add_junction(attributes)
        elif tag == "edge":
            self.street = _street(attributes)
            self._count()
        elif tag == "lane" and self.street is not None and _open_to_cars(attributes):
            where = f"street {_shown(self.street.name)}"
            speed = _number(attributes, "speed", where, most=FASTEST)
            self.street.speed = max(self.street.speed, speed, SLOWEST / SECONDS)
            self.street.metres = max(self.street.metres, _number(attributes, "length", where, most=LONGEST))

    def _end(self, tag: str) -> None:
        if tag == "edge" and self.street is not None:
            if self.street.speed:
                self.streets.append(self.street)
            self.street = None

    def _add_junction(self, attributes: Mapping[str, str]) -> None:
        name = attributes.get("id", "")
        if name.startswith(INTERNAL):
            return
        self._count()
        where = f"junction {_shown(name)}"
        x, y = (_number(attributes, axis, where, most=FARTHEST, least=-FARTHEST) for axis in ("x", "y"))
        self.positions[name] = (x, y)

    def _count(self) -> None:
        self.things += 1
        if self.things > MOST_THINGS:
            raise UserError(f"it has more than {MOST_THINGS:,} junctions and streets; give a smaller part of the map")

    def network(self) -> Network:
        """All of them, as a network.

        Raises:
            UserError: there are too few, or a junction is missing.
        """
        if not self.streets:
            raise UserError("it holds no streets for cars")
        numbers: dict[str, int] = {}
        for street in self.streets:
            for end in street.ends:
                if end not in self.positions:
                    raise UserError(f"street {_shown(street.name)} ends at junction {_shown(end)}, which there is not")
                numbers.setdefault(end, len(numbers))
        points = np.array([self.positions[name] for name in numbers])
        tails, heads = (np.array([numbers[street.ends[end]] for street in self.streets]) for end in (0, 1))
        speeds = SECONDS * np.array([street.speed for street in self.streets])
        kinds = np.array([street.kind for street in self.streets])
        metres = np.array([street.metres for street in self.streets])
        middle = (points.min(0) + points.max(0)) / 2
        return connected(points - middle, tails, heads, speeds, kinds, metres=metres)


def _street(attributes: Mapping[str, str]) -> _Street | None:
    """A street that cars may use, if its lanes say so; None of whatever else SUMO calls an edge."""
    name = attributes.get("id", "")
    if name.startswith(INTERNAL) or attributes.get("function", "normal") not in ("normal", "connector"):
        return None
    kind = NO_CLASS
    if attributes.get("type", "").startswith(OSM_TYPE):
        kind = attributes["type"].removeprefix(OSM_TYPE)
        if kind not in CLASSES and kind not in LINKS:
            return None
    ends = [attributes.get(end) for end in ("from", "to")]
    if None in ends:
        raise UserError(f"street {_shown(name)} has no two ends (from and to)")
    begin, end = map(str, ends)
    return _Street(name, (begin, end), CLASS_NAMES.index(kind.removesuffix("_link")))


def _open_to_cars(attributes: Mapping[str, str]) -> bool:
    """Whether a lane says that cars may use it; all may where it says nothing."""
    allowed, refused = (set(attributes.get(key, "").split()) for key in ("allow", "disallow"))
    return bool(allowed & CARS) if "allow" in attributes else not refused & CARS


def _number(attributes: Mapping[str, str], key: str, where: str, *, most: float, least: float = 0.0) -> float:
    text = attributes.get(key, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise UserError(f"{where} has {key} {_shown(text)}; that is a number from {least:g} to {most:g}")
    return number


def _shown(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")


def _refuse_declarations(*_: object) -> NoReturn:
    raise UserError("it declares a document type, which no network of SUMO does, and which may stand for endless text")
