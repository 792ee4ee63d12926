"""Networks of SUMO: read as streets, or refused in one line."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from streets import sumo, travel
from streets.network import Network
from streets.roads import CLASS_NAMES
from tests.street_scenes import sumo_street, sumo_text, sumo_town

SQUARE = {"a": (0.0, 0.0), "b": (100.0, 0.0), "c": (100.0, 100.0), "d": (0.0, 100.0)}
RING = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]


def streets_of(*lanes: dict[str, str], **attributes: str) -> list[str]:
    """The ring, of which the first street has these lanes and attributes."""
    first = sumo_street("0", RING[0], *lanes, **attributes)
    return [first, *(sumo_street(str(index), ends) for index, ends in enumerate(RING) if index)]


def read(folder: Path, *streets: str, junctions: dict[str, tuple[float, float]] = SQUARE) -> Network:
    path = folder / "some.net.xml"
    path.write_text(sumo_text(junctions, *streets), encoding="utf-8")
    return sumo.read_network(path)


def arcs(network: Network) -> list[tuple[list[float], list[float]]]:
    """Where arcs begin and end, measured from the south-western corner."""
    points = (network.points - network.points.min(0)).tolist()
    ends = zip(network.tails.tolist(), network.heads.tolist(), strict=True)
    return sorted((points[begin], points[end]) for begin, end in ends)


def test_streets_lead_from_junction_to_junction_in_their_direction(tmp_path: Path):
    expected = [(list(SQUARE[begin]), list(SQUARE[end])) for begin, end in RING]
    network = read(tmp_path, *streets_of())
    assert arcs(network) == sorted(expected)
    assert network.metres == pytest.approx(100) and network.free_flow == pytest.approx(10)
    assert len(network.places) == 4


def test_street_is_as_fast_as_its_fastest_lane_for_cars(tmp_path: Path):
    lanes = ({"speed": "12.5"}, {"speed": "15"}, {"speed": "30", "allow": "bus taxi"})
    network = read(tmp_path, *streets_of(*lanes))
    assert sorted(network.speeds.tolist()) == pytest.approx([36, 36, 36, 54])


def test_street_is_as_long_as_its_lane_and_no_shorter_than_the_straight_line(tmp_path: Path):
    assert sorted(read(tmp_path, *streets_of({"length": "250"})).metres.tolist()) == pytest.approx([100, 100, 100, 250])
    assert read(tmp_path, *streets_of({"length": "80"})).metres == pytest.approx(100)


@pytest.mark.parametrize(
    "lane",
    [{"allow": "bus pedestrian"}, {"allow": ""}, {"disallow": "tram passenger"}, {"disallow": "all"}],
    ids=["allow others", "allow nobody", "disallow cars", "disallow all"],
)
def test_street_without_a_lane_for_cars_is_none(lane: dict[str, str], tmp_path: Path):
    back = [sumo_street(f"-{index}", ends[::-1]) for index, ends in enumerate(RING)]
    assert len(read(tmp_path, *streets_of(lane), *back).tails) == 7


@pytest.mark.parametrize("lane", [{}, {"allow": "bus passenger"}, {"allow": "all"}, {"disallow": "tram rail"}])
def test_street_with_a_lane_for_cars_is_one(lane: dict[str, str], tmp_path: Path):
    assert len(read(tmp_path, *streets_of(lane)).tails) == 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("highway.primary", "primary"),
        ("highway.primary_link", "primary"),
        ("", "unclassified"),
        ("my own streets", "unclassified"),
    ],
)
def test_class_of_a_street_is_that_of_openstreetmap_where_its_type_names_one(kind: str, expected: str, tmp_path: Path):
    network = read(tmp_path, *streets_of(type=kind))
    classes = sorted(CLASS_NAMES[each] for each in network.kinds)
    assert classes == sorted([expected] + 3 * ["unclassified"])


def test_what_is_no_road_for_cars_in_openstreetmap_is_none_here(tmp_path: Path):
    back = [sumo_street(f"-{index}", ends[::-1]) for index, ends in enumerate(RING)]
    assert len(read(tmp_path, *streets_of(type="highway.service"), *back).tails) == 7


def test_what_lies_within_junctions_is_left_out(tmp_path: Path):
    inside = [
        sumo_street(":a_0", ("a", "c"), function="internal"),
        sumo_street("walk", ("a", "c"), function="walkingarea"),
        sumo_street(":odd", ("a", "c")),
    ]
    assert len(read(tmp_path, *inside, *streets_of(), junctions={**SQUARE, ":a_0": (9.0, 9.0)}).tails) == 4


def test_packed_and_plain_networks_are_the_same_to_whoever_asks_for_streets(tmp_path: Path):
    text = sumo_town().encode()
    (tmp_path / "town.net.xml").write_bytes(text)
    (tmp_path / "town.net.xml.gz").write_bytes(gzip.compress(text))
    plain, packed = (travel.network_of(str(tmp_path / name)) for name in ("town.net.xml", "town.net.xml.gz"))
    assert len(plain.places) == 16 and len(plain.tails) == 48
    assert all(np.array_equal(one, other) for one, other in zip(plain, packed, strict=True))


BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><net version="&b;"></net>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.net.xml", None, "none.net.xml cannot be read: No such file"),
        ("empty.net.xml", b"", "empty.net.xml cannot be read as SUMO's: no element found"),
        ("cut.net.xml", sumo_town().encode()[:-300], "cut.net.xml cannot be read as SUMO's"),
        ("bytes.net.xml", bytes(range(256)), "bytes.net.xml cannot be read as SUMO's"),
        ("code.net.xml", b'<?xml version="1.0" encoding="utf-7"?><net/>', "code.net.xml cannot be read as SUMO's"),
        ("map.net.xml", b"<osm/>", "map.net.xml: it begins with 'osm'; a network of SUMO begins with net"),
        ("bomb.net.xml", BOMB.encode(), "bomb.net.xml: it declares a document type"),
        ("some.net.xml.gz", b"hello", "some.net.xml.gz cannot be unpacked: Not a gzipped file"),
        ("cut.net.xml.gz", gzip.compress(sumo_town().encode())[:-20], "cut.net.xml.gz cannot be unpacked"),
        ("no.net.xml", b"<net></net>", "no.net.xml: it holds no streets for cars"),
        ("few.net.xml", sumo_text(SQUARE, sumo_street("0", RING[0])).encode(), "few.net.xml: it has 1 places"),
        ("odd.net.xml", b'<net><edge id="e"/></net>', "odd.net.xml: street 'e' has no two ends"),
    ],
)
def test_files_that_hold_no_streets_are_refused_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        sumo.read_network(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lane", "message"),
    [
        ({"speed": "fast"}, "street '0' has speed 'fast'; that is a number from 0 to 200"),
        ({"speed": "inf"}, "street '0' has speed 'inf'"),
        ({"length": "-1"}, "street '0' has length '-1'"),
        ({"length": "nan"}, "street '0' has length 'nan'"),
        ({"length": "1" + 400 * "0"}, r"street '0' has length '1000000000000000000000000000000000000000\.\.\.'"),
    ],
)
def test_numbers_that_cannot_be_are_refused(lane: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *streets_of(lane))


def test_junction_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"street 'away' ends at junction 'z\\n', which there is not"):
        read(tmp_path, *streets_of(), sumo_street("away", ("a", "z&#10;")))


def test_junction_without_a_position_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="junction 'b' has x 'nan'"):
        read(tmp_path, *streets_of(), junctions={**SQUARE, "b": (float("nan"), 0.0)})


def test_junctions_at_one_spot_are_no_map(tmp_path: Path):
    with pytest.raises(ValueError, match="all its places are at one spot"):
        read(tmp_path, *streets_of(), junctions=dict.fromkeys(SQUARE, (5.0, 5.0)))


def test_small_file_that_unpacks_to_more_than_a_network_has_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sumo, "LARGEST", 10_000)
    (tmp_path / "much.net.xml.gz").write_bytes(gzip.compress(b"<net>" + 100_000 * b" "))
    with pytest.raises(ValueError, match="it holds more than 10,000 bytes"):
        sumo.read_network(tmp_path / "much.net.xml.gz")


def test_more_streets_than_a_city_has_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sumo, "MOST_THINGS", 7)
    with pytest.raises(ValueError, match="it has more than 7 junctions and streets"):
        read(tmp_path, *streets_of())


def test_fifo_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.net.xml")
    with pytest.raises(ValueError, match="pipe.net.xml cannot be read: .*FIFO"):
        sumo.read_network(tmp_path / "pipe.net.xml")


def test_streets_need_no_package_that_reads_openstreetmap(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "osmium", None)
    assert len(read(tmp_path, *streets_of()).tails) == 4
