"""Reads instances from tables as spreadsheets and data frames write them, and from JSON: a row for each node."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from config import UserError
from routing.arrays import batch, unnamed
from routing.loads import COLUMNS, with_loads
from routing.matrices import without_positions
from routing.matrix_tables import read_square
from routing.metrics import EXACT, GREAT_CIRCLE
from routing.parsing import (
    InstanceError,
    RoutingInstance,
    Row,
    check_on_earth,
    fault,
    number_in,
    position_in,
    quoted,
    whole_number_in,
    without_thousands,
)

X = frozenset({"x", "xcoord", "xcoordinate", "coordx", "xpos", "posx", "easting"})
Y = frozenset({"y", "ycoord", "ycoordinate", "coordy", "ypos", "posy", "northing"})
# Which place of a run's cost world a node is.
PLACE_COLUMN = "place"
LATITUDE = frozenset({"lat", "latitude"})
LONGITUDE = frozenset({"lon", "lng", "long", "longitude"})
# Columns that change the problem, and can be read.
LOADS = frozenset(itertools.chain.from_iterable(COLUMNS.values()))
# Those that cannot; a reader of positions alone would silently leave them out.
CONSTRAINTS = frozenset({"z", "zcoord", "load", "timewindow", *LOADS})
# The columns that say where a node is, and the lengths between such places.
PLACES = (((LATITUDE, LONGITUDE), GREAT_CIRCLE), ((X, Y), EXACT))
COLUMNS_REMEDY = (
    "a line `x,y` for each node is needed, or columns named x and y, or lat and lon, or a square matrix of costs"
)
JSON_REMEDY = (
    'a list like [{"x": 1, "y": 2}, ...] or [[1, 2], ...] is needed, with lat and lon for great circles, or a square'
    " matrix of costs"
)


def read_table(path: Path, lines: list[str]) -> RoutingInstance:
    """The instance that a table of coordinates or of costs holds, whatever separates its columns.

    Raises:
        InstanceError: it holds none, or leaves open which numbers are meant.
    """
    rows = list(rows_of(path, lines))
    while rows and all(len(row.fields) > 2 and not row.fields[-1] for row in rows):
        rows = [row._replace(fields=row.fields[:-1]) for row in rows]
    least = 1 if rows and rows[0].fields == [PLACE_COLUMN] else 2
    for row in rows:
        if len(row.fields) != len(rows[0].fields) or len(row.fields) < least:
            raise fault(path, row.number, f"has {len(row.fields)} values", COLUMNS_REMEDY)
    rows = with_points(path, rows)
    header, nodes = _header(path, rows)
    if not nodes:
        raise InstanceError(f"{path}: holds no node; {COLUMNS_REMEDY}")
    matrix = read_square(path, rows, are_positions=_says_where(header, nodes))
    return matrix or _from_columns(path, header, nodes)


def _says_where(header: Row | None, rows: list[Row]) -> bool:
    """Whether columns hold positions even where there are as many of them as rows."""
    if header is not None and (_named(header.fields) or _called(header, rows) is not None):
        return True
    square = len(rows) == len(rows[0].fields)
    is_matrix = square and all(number_in(row.fields[index]) == 0 for index, row in enumerate(rows))
    return _has_index(rows) and not is_matrix


def read_json(path: Path, text: str) -> list[RoutingInstance]:
    """The instances of a JSON file: a list of nodes, a matrix, or what an `.npz` may hold.

    Raises:
        InstanceError: it holds something else.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:100]
        raise InstanceError(f"{path}: is no JSON ({cause}); {JSON_REMEDY}") from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("nodes", "points") if len(content) == 1 and key in content), content)
    if isinstance(content, dict) and any(plain_name(name) in X | LATITUDE for name in content):
        content = _transposed(path, content)
    if isinstance(content, list) and content and all(isinstance(node, dict) and node for node in content):
        return [_from_columns(path, *_objects(path, content))]
    try:
        if isinstance(content, dict):
            arrays = {name: np.array(part) for name, part in content.items()}
        else:
            arrays = unnamed(np.array(content))
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise InstanceError(f"{path}: holds lists of different lengths; {JSON_REMEDY}") from None
    if not content or any(array.dtype.kind not in "iuf" for array in arrays.values()):
        raise InstanceError(f"{path}: holds no nodes of numbers; {JSON_REMEDY}")
    return batch(path, arrays)


def _refuse_constant(name: str) -> None:
    raise UserError(f"{name} is no number")


def _transposed(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A node for each row of the columns, which are lists, or objects by row as data frames write them."""
    lists = [list(part.values()) if isinstance(part, dict) else part for part in columns.values()]
    if not all(isinstance(part, list) and len(part) == len(lists[0]) for part in lists):
        raise InstanceError(f"{path}: holds columns of different lengths; {JSON_REMEDY}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _objects(path: Path, nodes: list[dict[str, Any]]) -> tuple[Row, list[Row]]:
    """Column names, and the numbers of each node as text; nodes are counted from 1, as lines of a table are."""
    rows = []
    for number, node in enumerate(nodes, start=1):
        if node.keys() != nodes[0].keys():
            raise fault(path, number, f"node {number} has other keys than the first", JSON_REMEDY)
        rows.append(Row(number, [value if isinstance(value, str) else json.dumps(value) for value in node.values()]))
    return Row(1, list(nodes[0])), rows


def rows_of(path: Path, lines: list[str]) -> Iterator[Row]:
    """The lines that hold something, split into fields by whatever separates them.

    Raises:
        InstanceError: a line cannot be split.
    """
    any_row = names_alone = False
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \r\n\ufeff")
        if line.startswith("#") and not any_row and _names_places(line.lstrip("# ")):
            line = line.lstrip("# ")
        # A first line `sep=;` is an instruction to spreadsheets.
        if not line.strip() or line.startswith("#") or (number == 1 and re.fullmatch("sep=.", line, re.IGNORECASE)):
            continue
        # A name may have spaces in it.
        fields = [line.strip()] if names_alone and not re.search('[;,\t"]', line) else _fields(path, number, line)
        names_alone = names_alone or (not any_row and fields == [PLACE_COLUMN])
        any_row = True
        yield Row(number, fields)


def _names_places(comment: str) -> bool:
    """Whether a comment above the nodes is their header, as numpy writes it."""
    parts = [plain_name(part) for part in re.split("[;,\t]", comment)]
    parts = parts if len(parts) > 1 else [plain_name(part) for part in comment.split()]
    named = [all(any(part in known for part in parts) for known in pair) for pair, _ in PLACES]
    # More than two words without marks between them are a sentence, such as `x and y of towns`.
    return any(named) and (len(parts) == 2 or re.search("[;,\t]", comment) is not None)


def _fields(path: Path, number: int, line: str) -> list[str]:
    # The separator of columns is looked for outside quotes; where it is no comma, a comma may be a decimal one.
    bare = re.sub('"[^"]*"', "", line)
    separator = next((mark for mark in ";\t," if mark in bare), None)
    if separator is None and '"' not in line:
        return line.split()
    try:
        (fields,) = csv.reader([line], delimiter=separator or " ", skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise fault(path, number, f"cannot be split into columns ({error})", COLUMNS_REMEDY) from None
    return [field.strip() for field in fields]


def with_points(path: Path, rows: list[Row]) -> list[Row]:
    """The rows with a point, and no commas, in their numbers."""
    written = [field for row in rows for field in row.fields if re.fullmatch(r"[+-]?[\d.,]*\d,\d[\d.,]*", field)]
    if not written:
        return rows
    if all(without_thousands(field) != field for field in written):
        # Each comma may stand before three digits by chance, unless a point, or a second comma, says what it is.
        if not any("." in field or field.count(",") > 1 for field in written):
            line = next(row.number for row in rows if written[0] in row.fields)
            cause = f"{quoted(written[0])} may be a thousand and more, or have a decimal comma"
            raise fault(path, line, cause, "write numbers with a decimal point, and without commas")
        return [row._replace(fields=[without_thousands(field) for field in row.fields]) for row in rows]
    return [row._replace(fields=[_from_decimal_comma(field) for field in row.fields]) for row in rows]


def _from_decimal_comma(field: str) -> str:
    if re.fullmatch(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+", field, re.ASCII):
        return field.replace(".", "").replace(",", ".")
    return field


def _header(path: Path, rows: list[Row]) -> tuple[Row | None, list[Row]]:
    """The names of the columns, None where the first row is a node, and the rows of nodes."""
    if not rows:
        return None, rows
    first, rest = rows[0], rows[1:]
    are_numbers = [number_in(field) is not None for field in first.fields]
    if not any(are_numbers):
        return first, rest
    for index, is_number in enumerate(are_numbers):
        if not is_number and rest and all(number_in(row.fields[index]) is not None for row in rest):
            return first, rest
    # A data frame without names numbers its columns.
    if rest and first.fields in (["0", "1"], ["0", "1", "2"]):
        if all("." in field for row in rest for field in row.fields[-2:]):
            return first, rest
        if len(first.fields) == 2:
            cause = "0 and 1 may be the first node, or number the columns"
            raise fault(path, first.number, cause, "begin the file with a line `x,y`")
    return None, rows


def _from_columns(path: Path, header: Row | None, rows: list[Row]) -> RoutingInstance:
    """The instance whose positions stand in two of the columns, or whose places stand in one."""
    called = _called(header, rows)
    place = None if called is None else _numbers(called)
    if called is not None and header is not None and _named(header.fields) is None:
        _refuse_constraints(path, header)
        return RoutingInstance(path.stem, "tsp", without_positions(len(rows)), EXACT, place=place, called=called)
    (first, second), metric = _chosen(path, header, rows)
    positions = []
    for row in rows:
        positions.append(position_in(path, row, [row.fields[first], row.fields[second]]))
        if metric == GREAT_CIRCLE:
            check_on_earth(path, row.number, *positions[-1], remedy="lat and lon are taken in degrees, as 52.52")
    coords = np.array(positions)
    instance = RoutingInstance(path.stem, "tsp", coords, metric, place=place, called=called)
    return with_loads(path, header, rows, instance, plain=plain_name)


def _called(header: Row | None, rows: list[Row]) -> tuple[str, ...] | None:
    """What stands in the column `place`; None where there is no such column."""
    if header is None or header.fields.count(PLACE_COLUMN) != 1:
        return None
    column = header.fields.index(PLACE_COLUMN)
    return tuple(row.fields[column] for row in rows)


def _numbers(called: tuple[str, ...]) -> Int64[np.ndarray, " N"] | None:
    """The places that are called by these numbers; None where some have names."""
    numbers = [whole_number_in(name) for name in called]
    found = [number for number in numbers if number is not None]
    return np.array(found, dtype=np.int64) if len(found) == len(numbers) else None


def _refuse_constraints(path: Path, header: Row, *, read: frozenset[str] = frozenset()) -> None:
    """Check that no column says what would change the problem, but for names that are `read`.

    Raises:
        InstanceError: one does.
    """
    for name in header.fields:
        if plain_name(name) not in read and CONSTRAINTS & {plain_name(name), *_words(name)}:
            remedy = "call what is meant demand, capacity, ready, due or service, and remove what can be left out"
            raise fault(path, header.number, f"column {quoted(name)} cannot be taken into account", remedy)


def _chosen(path: Path, header: Row | None, rows: list[Row]) -> tuple[tuple[int, int], str]:
    """Which two columns hold the positions, and in which metric."""
    columns = len(rows[0].fields)
    if header is not None:
        found = _named(header.fields)
        _refuse_constraints(path, header, read=LOADS if found else frozenset())
        if found:
            return found
    if columns == 2:
        return _unnamed(path, header, (0, 1))
    if _has_index(rows):
        return _unnamed(path, header, (1, 2))
    raise fault(path, rows[0].number, f"has {columns} values", COLUMNS_REMEDY)


def _has_index(rows: list[Row]) -> bool:
    """Whether the first of three columns counts the rows, or names them."""
    labels = [row.fields[0] for row in rows]
    numbers = [whole_number_in(label) for label in labels]
    counted = any(numbers == list(range(begin, begin + len(rows))) for begin in (0, 1))
    return len(rows[0].fields) == 3 and (counted or all(number_in(label) is None for label in labels))


def _named(header: list[str]) -> tuple[tuple[int, int], str] | None:
    """The two columns whose names say that they hold the positions, and their metric, if there are such."""
    # `x` alone comes before `x` as a part of other names.
    for read in (lambda name: {plain_name(name)}, _words):
        for (first, second), metric in PLACES:
            found = [[index for index, name in enumerate(header) if read(name) & known] for known in (first, second)]
            if all(len(indices) == 1 for indices in found):
                return (found[0][0], found[1][0]), metric
    return None


def _unnamed(path: Path, header: Row | None, places: tuple[int, int]) -> tuple[tuple[int, int], str]:
    """The same two columns, as positions in a plane.

    Raises:
        InstanceError: they have other names, which may be those of degrees in another language.
    """
    names = [header.fields[index] for index in places if header is not None]
    if any(number_in(name) is None for name in names if name):
        assert header is not None, "there are names"
        cause = f"columns {' and '.join(map(quoted, names))} may be of a plane or degrees"
        raise fault(path, header.number, cause, "name them x and y, or lat and lon")
    return places, EXACT


def plain_name(name: str) -> str:
    """The name of a column in small letters, without its unit and marks between words."""
    letters = "".join(itertools.filterfalse(lambda letter: not letter.isalpha(), re.sub(r"[\[(].*", "", name.lower())))
    return letters.removesuffix("degrees").removesuffix("deg")


def _words(name: str) -> set[str]:
    """The words in the name of a column, such as gps and lat in `gps_lat` or `gpsLat`."""
    return set(re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()))
