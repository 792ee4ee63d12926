"""Distances as TSPLIB and CVRPLIB define them, with their own rounding, and the plane that networks see instead.

The formulas are those of G. Reinelt, "TSPLIB 95" (1995), section 2.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Float64, Int

# Of coordinates without a file format of their own: Euclidean and unrounded.
EXACT = "exact"
FILE_METRICS = ("EUC_2D", "CEIL_2D", "ATT", "GEO")

# Reinelt's own digits: published optima rest on them.
GEO_PI = 3.141592
EARTH_RADIUS_KM = 6378.388


def leg_lengths(
    origin: Float[np.ndarray, "*B 2"], target: Float[np.ndarray, "*B 2"], metric: str
) -> Float64[np.ndarray, "*B"]:
    """Distances between pairs of positions, whole numbers in every metric but `exact`."""
    if metric == "GEO":
        return _geographical(origin, target)
    straight = np.sqrt(np.square(origin.astype(np.float64) - target).sum(-1))
    if metric == EXACT:
        return straight
    if metric == "EUC_2D":
        return np.floor(straight + 0.5)
    if metric == "CEIL_2D":
        return np.ceil(straight)
    assert metric == "ATT", f"{metric} is none of {FILE_METRICS}"
    # Pseudo-Euclidean: the nearest integer, or the next one where that is too short.
    pseudo = np.sqrt(np.square(origin.astype(np.float64) - target).sum(-1) / 10)
    nearest = np.floor(pseudo + 0.5)
    return nearest + (nearest < pseudo)


def _geographical(origin: Float[np.ndarray, "*B 2"], target: Float[np.ndarray, "*B 2"]) -> Float64[np.ndarray, "*B"]:
    # The text of TSPLIB rounds to the nearest degree; its published optima come from the whole part.
    radians = [GEO_PI * _whole_degrees(position) / 180 for position in (origin, target)]
    (latitude, longitude), (other_latitude, other_longitude) = (np.moveaxis(angle, -1, 0) for angle in radians)
    q1 = np.cos(longitude - other_longitude)
    q2 = np.cos(latitude - other_latitude)
    q3 = np.cos(latitude + other_latitude)
    cosine = np.clip(0.5 * ((1 + q1) * q2 - (1 - q1) * q3), -1, 1)
    return np.floor(EARTH_RADIUS_KM * np.arccos(cosine) + 1)


def _whole_degrees(position: Float[np.ndarray, "*B 2"]) -> Float64[np.ndarray, "*B 2"]:
    """DDD.MM, degrees and minutes, in degrees."""
    position = position.astype(np.float64)
    degrees = np.trunc(position)
    return degrees + 5 * (position - degrees) / 3


def tour_lengths(
    coords: Float[np.ndarray, "I N 2"], tours: Int[np.ndarray, "I Q L"], metric: str
) -> Float64[np.ndarray, "I Q"]:
    """Lengths of Q closed tours of each instance; a leg from a node to itself has none."""
    rows = np.arange(len(coords))[:, None, None]
    following = np.roll(tours, -1, axis=-1)
    legs = leg_lengths(coords[rows, tours], coords[rows, following], metric)
    return np.where(tours == following, 0.0, legs).sum(-1)


def tour_length(coords: Float[np.ndarray, "N 2"], tour: Int[np.ndarray, " L"], metric: str) -> int | float:
    """Length of one closed tour; an int in every metric but `exact`."""
    length = float(tour_lengths(coords[None], tour[None, None], metric)[0, 0])
    return length if metric == EXACT else int(length)


def distance_matrix(coords: Float[np.ndarray, "N 2"], metric: str) -> Float64[np.ndarray, "N N"]:
    """Distances between all nodes; 0 from a node to itself, which `GEO` would not give."""
    origin, target = np.broadcast_arrays(coords[:, None], coords[None])
    distances = leg_lengths(origin, target, metric)
    np.fill_diagonal(distances, 0.0)
    return distances


def plane(coords: Float[np.ndarray, "N 2"], metric: str) -> Float64[np.ndarray, "N 2"]:
    """Positions whose Euclidean distances are about proportional to those of the metric.

    `GEO` gives latitude and longitude; east and north in degrees at the middle latitude stand for them.
    """
    if metric != "GEO":
        return coords.astype(np.float64)
    degrees = _whole_degrees(coords)
    latitude, longitude = degrees[:, 0], degrees[:, 1]
    middle = math.radians((latitude.min() + latitude.max()) / 2)
    return np.stack((longitude * math.cos(middle), latitude), -1)


def plane_unit(metric: str) -> float:
    """How long a leg of length 1 in `plane` is in the metric, but for rounding."""
    return {"ATT": math.sqrt(0.1), "GEO": EARTH_RADIUS_KM * math.pi / 180}.get(metric, 1.0)
