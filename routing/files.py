"""Reads routing instances from files, by the reader that their suffix asks for.

Whatever is wrong with a file is an `InstanceError`: one line with the file, the line, the cause and what would do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from routing.arrays import read_arrays
from routing.parsing import InstanceError, RoutingInstance, decode
from routing.solomon import is_solomon, read_solomon
from routing.tables import read_json, read_table
from routing.tsplib import read_tsplib
from system.safe_files import read_bytes

__all__ = ["InstanceError", "RoutingInstance", "read_instances"]

# Text takes tens of times its size while it is read; this much holds millions of nodes.
LARGEST_TEXT = 2**26
LARGEST_ARRAYS = 2**28
ARRAYS = (".npy", ".npz")
TABLES = (".csv", ".tsv")


def read_instances(path: str | os.PathLike) -> list[RoutingInstance]:
    """Every instance in a file, which its suffix describes.

    `.csv` and `.tsv` have a line for each node: `x,y`, or named columns, among them `x` and `y`, or `lat` and `lon` for
    great circles; or they are a square of costs, rows from and columns to. `.json` has a list of the same as objects,
    pairs or rows. `.npy` is an array [N, 2] or [I, N, 2], or of costs, [N, N] or [I, N, N]; `.npz` a batch: `coords`
    [I, N, 2] or `costs` [I, N, N], and, for CVRP, `demand` [I, N] and `capacity` [I] or a number; with time windows,
    also `ready`, `due` and `service` [I, N]. Columns of these names do the same. Anything else is read in Solomon's
    form, if it has it, or as TSPLIB or CVRPLIB; so is `.txt`, unless it has none of their sections.

    Raises:
        InstanceError: the file cannot be read, or holds no instance that can be solved.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        content = read_bytes(path, most=LARGEST_ARRAYS if suffix in ARRAYS else LARGEST_TEXT)
        return _instances(path, suffix, content)
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read ({error.strerror}); give the path of an instance file") from None
    except MemoryError:
        raise InstanceError(f"{path}: takes more memory to read than there is; give a smaller file") from None


def _instances(path: Path, suffix: str, content: bytes) -> list[RoutingInstance]:
    if suffix in ARRAYS:
        return read_arrays(path, content)
    text = decode(content)
    if suffix == ".json":
        return read_json(path, text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if suffix not in TABLES and is_solomon(text):
        return [read_solomon(path, lines)]
    if suffix in TABLES or (suffix == ".txt" and not re.search("_SECTION", text, re.IGNORECASE)):
        return [read_table(path, lines)]
    return [read_tsplib(path, lines)]
