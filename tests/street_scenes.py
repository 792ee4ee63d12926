"""A small town for tests, as OpenStreetMap has it: what `--streets helsinki` reads while tests run."""

from __future__ import annotations

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
    """The town as a file."""
    path = folder / "town.osm"
    path.write_text(town(), encoding="utf-8")
    return path
