"""Matrices of costs: the layouts in which files list them, and what each number of one may be.

What stands from a node to itself is never looked at: files have 0 there, 9999, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int64, Num

from routing.parsing import LARGEST_COORDINATE, number_in

COST_REMEDY = f"a number from 0 to {LARGEST_COORDINATE:g} is needed, a large one where there is no way"

# Formats of an EDGE_WEIGHT_SECTION (G. Reinelt, "TSPLIB 95", 1995): where the numbers belong, row by row. Columns of a
# triangle are the rows of the other one, and both triangles hold the same.
FULL = "FULL_MATRIX"
TRIANGLES: dict[str, tuple[Callable[..., tuple[np.ndarray, np.ndarray]], int]] = {
    **dict.fromkeys(("UPPER_ROW", "LOWER_COL"), (np.triu_indices, 1)),
    **dict.fromkeys(("LOWER_ROW", "UPPER_COL"), (np.tril_indices, -1)),
    **dict.fromkeys(("UPPER_DIAG_ROW", "LOWER_DIAG_COL"), (np.triu_indices, 0)),
    **dict.fromkeys(("LOWER_DIAG_ROW", "UPPER_DIAG_COL"), (np.tril_indices, 0)),
}
LAYOUTS = (FULL, *TRIANGLES)


def layout_size(layout: str, num_nodes: int) -> int:
    """How many numbers a layout lists."""
    if layout == FULL:
        return num_nodes**2
    _, diagonal = TRIANGLES[layout]
    return num_nodes * (num_nodes - 1 if diagonal else num_nodes + 1) // 2


def layout_places(layout: str, num_nodes: int) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"]]:
    """Row and column of each number that a layout lists."""
    if layout == FULL:
        rows, columns = np.divmod(np.arange(num_nodes**2), num_nodes)
        return rows, columns
    indices, diagonal = TRIANGLES[layout]
    return indices(num_nodes, diagonal)


def laid_out(numbers: Float64[np.ndarray, " E"], layout: str, num_nodes: int) -> Float64[np.ndarray, "N N"]:
    """The matrix whose numbers a layout lists, as many as `layout_size` says."""
    if layout == FULL:
        return numbers.reshape(num_nodes, num_nodes)
    places = layout_places(layout, num_nodes)
    matrix = np.zeros((num_nodes, num_nodes))
    matrix[places] = numbers
    matrix[places[::-1]] = numbers
    return matrix


def numbers_in(fields: Sequence[str]) -> Float64[np.ndarray, " E"]:
    """The numbers that fields hold, NaN where one holds none."""
    # Matrices have millions of fields. Of these characters alone, numpy takes what `number_in` does.
    if re.fullmatch(r"[\d.eE+\- ]*", " ".join(fields), re.ASCII):
        try:
            return np.array(fields, dtype=np.float64)
        except ValueError:
            pass
    numbers = (number_in(field) for field in fields)
    return np.array([np.nan if number is None else number for number in numbers], dtype=np.float64)


def are_costs(numbers: Float64[np.ndarray, "*E"]) -> np.ndarray:
    """Which numbers may be costs, in a bool of the same shape; NaN may not."""
    return (numbers >= 0) & (numbers <= LARGEST_COORDINATE)


def impossible_cost(matrices: Float64[np.ndarray, "*I N N"]) -> tuple[int, ...] | None:
    """The index of the first number between two nodes that is no cost; None where there is none."""
    impossible = ~are_costs(matrices) & ~np.eye(matrices.shape[-1], dtype=bool)
    # Looking for places takes longer than asking whether there is any.
    return tuple(np.argwhere(impossible)[0].tolist()) if impossible.any() else None


def as_costs(matrix: Float64[np.ndarray, "N N"]) -> Num[np.ndarray, "N N"]:
    """The costs of an instance, as `RoutingInstance` has them, where no number is an impossible cost."""
    costs = np.where(np.eye(len(matrix), dtype=bool), 0.0, matrix)
    # Whole numbers add up to whole lengths, without a digit lost.
    whole = costs.astype(np.int64)
    return whole if bool((whole == costs).all()) else costs


def without_positions(num_nodes: int) -> Float64[np.ndarray, "N 0"]:
    """The `coords` of an instance whose file says nothing of where its nodes are."""
    return np.zeros((num_nodes, 0))
