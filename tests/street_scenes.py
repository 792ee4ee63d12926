"""Small towns for tests: as OpenStreetMap has one, which is what `--streets helsinki` reads then; and as SUMO does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

# Metres of one degree of latitude, and of longitude at 60 degrees north.
NORTH, EAST = 111_195.0, 55_597.0
BLOCK = 100.0
SIDE = 6


def osm_text(nodes: Mapping[int, tuple[float, float]], ways: Iterable[tuple[Iterable[int], Mapping[str, str]]]) -> str:
    """An extract: nodes by number, metres east and north of a point at 60 degrees north; ways by nodes and tags."""
    lines = ['<osm version="0.6">']
    for number, (east, north) in nodes.items():
        lines.append(f'<node id="{number}" version="1" lat="{60 + north / NORTH:.7f}" lon="{25 + east / EAST:.7f}"/>')
    for number, (refs, tags) in enumerate(ways, start=1):
        parts = "".join(f'<nd ref="{ref}"/>' for ref in refs)
        parts += "".join(f'<tag k="{key}" v="{value}"/>' for key, value in tags.items())
        lines.append(f'<way id="{number}" version="1">{parts}</way>')
    return "\n".join([*lines, "</osm>"])


def town() -> str:
    """Six streets each way: a large one through the middle and around, one-way streets between, and a footpath."""
    nodes = {1 + row * SIDE + column: (BLOCK * column, BLOCK * row) for row in range(SIDE) for column in range(SIDE)}
    ways: list[tuple[list[int], dict[str, str]]] = []
    for index in range(SIDE):
        along = [1 + index * SIDE + column for column in range(SIDE)]
        across = [1 + row * SIDE + index for row in range(SIDE)]
        if index in (0, 2, 5):
            ways += [(street, {"highway": "primary", "maxspeed": "60"}) for street in (along, across)]
        else:
            oneway = "yes" if index % 2 else "-1"
            ways += [(street, {"highway": "residential", "oneway": oneway}) for street in (along, across)]
    return osm_text(nodes, [*ways, ([1, 36], {"highway": "footway"})])


def write_town(folder: Path) -> Path:
    """The town as a file; beside it stands `town.net.xml`, the one of SUMO."""
    path = folder / "town.osm"
    path.write_text(town(), encoding="utf-8")
    (folder / "town.net.xml").write_text(sumo_town(), encoding="utf-8")
    return path


def sumo_street(name: str, ends: tuple[str, str], *lanes: Mapping[str, str], **attributes: str) -> str:
    """A street of SUMO's, by its lanes; one of 100 m at 10 m/s for all where none is given."""
    said = "".join(f' {key}="{value}"' for key, value in attributes.items())
    inside = ""
    for index, lane in enumerate(lanes or ({},)):
        numbers = {"speed": "10", "length": "100", **lane}
        inside += f'<lane id="{name}_{index}" ' + " ".join(f'{key}="{value}"' for key, value in numbers.items()) + "/>"
    return f'<edge id="{name}" from="{ends[0]}" to="{ends[1]}"{said}>{inside}</edge>'


def sumo_text(junctions: Mapping[str, tuple[float, float]], *streets: str) -> str:
    """A network of SUMO: streets first, junctions by name and metres east and north, as SUMO writes them."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<net version="1.9">', *streets]
    lines += [f'<junction id="{name}" type="priority" x="{x}" y="{y}"/>' for name, (x, y) in junctions.items()]
    return "\n".join([*lines, "</net>"])


def sumo_town() -> str:
    """Four by four junctions, 100 m apart: each street both ways, 10 m/s on rows and 5 m/s on columns."""
    junctions = {f"{row}/{column}": (BLOCK * column, BLOCK * row) for row in range(4) for column in range(4)}
    streets = []
    for place, step in itertools.product(range(4), range(3)):
        for speed, way in (("10", ((place, step), (place, step + 1))), ("5", ((step, place), (step + 1, place)))):
            begin, end = (f"{row}/{column}" for row, column in way)
            streets.append(sumo_street(f"{begin}to{end}", (begin, end), {"speed": speed}))
            streets.append(sumo_street(f"{end}to{begin}", (end, begin), {"speed": speed}))
    return sumo_text(junctions, *streets)
