"""The table of a cache: written in one order, read as it was written, and refused in a line where it is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import UserError
from scenarios import manifest
from scenarios.manifest import Entry
from tests.scenario_scenes import scenario

HEAD = "log,map,type,token,agent,frame,rows,speeds,displacement,goal_on_road,parts,bytes,fault\n"
LINE = "log-a,crossing,free,0123456789abcdef,1,0,2,10 9.5,5.00,1,speeds:1 choices:2,1581,\n"


def read(folder: Path, text: str) -> list[Entry]:
    path = folder / "manifest.csv"
    path.write_text(text)
    return manifest.read(path)


def test_table_is_read_as_it_was_written(tmp_path: Path):
    entries = [
        Entry(scenario(1, speeds=(0.0, 12.34)), ("speeds:1", "choices:1"), 1581),
        Entry(scenario(2, type="turn_left", goal_on_road=False), ("speeds:1",), 0, 'it has, say, "no" lines'),
    ]
    manifest.write(tmp_path / "manifest.csv", entries)
    assert manifest.read(tmp_path / "manifest.csv") == entries


def test_table_is_the_same_in_any_order_of_entries(tmp_path: Path):
    entries = [Entry(scenario(agent, log=log)) for agent in range(3) for log in ("b", "a")]
    for name, order in (("one", entries), ("two", entries[::-1])):
        manifest.write(tmp_path / name, order)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_line_is_what_it_says(tmp_path: Path):
    (entry,) = read(tmp_path, HEAD + LINE)
    expected = scenario(1, 0, token="0123456789abcdef", speeds=(10.0, 9.5))
    assert entry == Entry(expected, ("speeds:1", "choices:2"), 1581)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no table of a cache: its first line is not log,map"),
        ("log,map\n", "its first line is not log,map,type"),
        (HEAD + "log-a,crossing\n", "manifest.csv:2 has 2 columns, and a cache's table 13"),
        (HEAD + LINE.replace("log-a", "../../etc"), r"manifest.csv:2 has '../../etc' as log, which no cache writes"),
        (HEAD + LINE.replace("log-a", ".logs"), "has '.logs' as log"),
        (HEAD + LINE.replace("crossing", "a/b"), "has 'a/b' as map"),
        (HEAD + LINE.replace("free", "flying"), "has 'flying' as type"),
        (HEAD + LINE.replace("0123456789abcdef", "0123"), "has '0123' as token"),
        (HEAD + LINE.replace(",1,0,2,", ",one,0,2,"), "has 'one' as agent"),
        (HEAD + LINE.replace(",1,0,2,", ",1,0,22,"), "manifest.csv:2 has 22 rows, and scenarios 1 to 21"),
        (HEAD + LINE.replace("10 9.5", "10 nan"), "has '10 nan' as speeds"),
        (HEAD + LINE.replace("5.00", "1e99"), "has '1e99' as displacement"),
        (HEAD + LINE.replace("1581", "9" * 30), "as bytes"),
        (HEAD + LINE + LINE.replace("log-a", "lo\0g"), "manifest.csv:3|is no line of a table"),
    ],
)
def test_table_that_no_cache_writes_is_refused_by_its_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_table_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="^cannot read .*none.csv: No such file"):
        manifest.read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no table of a cache: it is no text"):
        manifest.read(tmp_path / "bytes.csv")
