"""The table of what a cache holds: every scenario, and what was computed of it, or why nothing was."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scenarios.scenario import ROWS, Scenario
from settings.scenarios import LOG_NAME, SCENARIO_TYPES, TOKEN
from system import safe_files
from system.errors import UserError

FILE_NAME = "manifest.csv"
# A quarter of a kilobyte for each scenario; a million of them are too many to be trained on here.
MOST_BYTES = 2**28
NUMBER = re.compile(r"-?[0-9]{1,18}")
DECIMAL = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")


class Entry(NamedTuple):
    """A scenario of a cache.

    Attributes:
        scenario: which.
        parts: what its file holds; see `samples.Part.stamp`.
        size: bytes of its file.
        fault: why it has no file; empty where it has one.
    """

    scenario: Scenario
    parts: tuple[str, ...] = ()
    size: int = 0
    fault: str = ""


class _Column(NamedTuple):
    write: Callable[[Entry], Any]
    read: Callable[[str], Any]


def _matching(pattern: re.Pattern[str], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not pattern.fullmatch(text):
            raise ValueError
        return kind(text)

    return read


def _type(text: str) -> str:
    if text not in SCENARIO_TYPES:
        raise ValueError
    return text


def _speeds(text: str) -> tuple[float, ...]:
    return tuple(map(_matching(DECIMAL, float), text.split()))


_COLUMNS: dict[str, _Column] = {
    "log": _Column(lambda entry: entry.scenario.log, _matching(LOG_NAME, str)),
    "map": _Column(lambda entry: entry.scenario.map, _matching(LOG_NAME, str)),
    "type": _Column(lambda entry: entry.scenario.type, _type),
    "token": _Column(lambda entry: entry.scenario.token, _matching(TOKEN, str)),
    "agent": _Column(lambda entry: entry.scenario.agent, _matching(NUMBER, int)),
    "frame": _Column(lambda entry: entry.scenario.frame, _matching(NUMBER, int)),
    "rows": _Column(lambda entry: entry.scenario.rows, _matching(NUMBER, int)),
    "speeds": _Column(lambda entry: " ".join(f"{speed:g}" for speed in entry.scenario.speeds), _speeds),
    "displacement": _Column(lambda entry: f"{entry.scenario.displacement:.2f}", _matching(DECIMAL, float)),
    "goal_on_road": _Column(lambda entry: int(entry.scenario.goal_on_road), lambda text: bool(int(text))),
    "parts": _Column(lambda entry: " ".join(entry.parts), lambda text: tuple(text.split())),
    "bytes": _Column(lambda entry: entry.size, _matching(NUMBER, int)),
    "fault": _Column(lambda entry: entry.fault, str),
}


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write the table, by log, type and token; a reader meets the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    table.writerows([column.write(entry) for column in _COLUMNS.values()] for entry in sorted(entries, key=_place))
    safe_files.write_text(path, text.getvalue())


def read(path: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        UserError: it cannot be read, or is no such table.
    """
    try:
        text = safe_files.read_text(path, most=MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no table of a cache: it is no text") from error
    lines = csv.reader(io.StringIO(text))
    entries: list[Entry] = []
    try:
        if next(lines, None) != [*_COLUMNS]:
            raise UserError(f"{path} is no table of a cache: its first line is not {','.join(_COLUMNS)}")
        for row in lines:
            entries.append(_entry(row, where=f"{path}:{lines.line_num}"))
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num} is no line of a table ({error})") from error
    return entries


def _entry(row: list[str], *, where: str) -> Entry:
    if len(row) != len(_COLUMNS):
        raise UserError(f"{where} has {len(row)} columns, and a cache's table {len(_COLUMNS)}")
    values: dict[str, Any] = {}
    for (name, column), text in zip(_COLUMNS.items(), row, strict=True):
        try:
            values[name] = column.read(text)
        except ValueError as error:
            raise UserError(f"{where} has {text!r} as {name}, which no cache writes") from error
    if not 1 <= values["rows"] <= ROWS:
        raise UserError(f"{where} has {values['rows']} rows, and scenarios 1 to {ROWS}")
    scenario = Scenario(**{name: values[name] for name in Scenario._fields})
    return Entry(scenario, values["parts"], values["bytes"], values["fault"])


def _place(entry: Entry) -> tuple[str, str, str]:
    return entry.scenario.log, entry.scenario.type, entry.scenario.token
