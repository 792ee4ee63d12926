"""Distances as TSPLIB and CVRPLIB define them, with their own rounding, and the plane that networks see instead.

The formulas are those of G. Reinelt, "TSPLIB 95" (1995), section 2; great circles are those of a sphere.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Float64, Int

# For coordinates without a file format of their own: Euclidean and unrounded.
EXACT = "exact"
# For latitude and longitude in degrees: kilometres, unrounded.
GREAT_CIRCLE = "great_circle"
UNROUNDED = (EXACT, GREAT_CIRCLE)
# For costs that stand in a matrix, of which positions tell nothing.
GIVEN = "given"
# For what is paid in a cost world that a run learnt, in its own unit or in seconds; positions alone do not tell it.
PAID, SECONDS = "paid", "seconds"
FILE_METRICS = (
    *("EUC_2D", "EUC_3D", "CEIL_2D", "CEIL_3D", "FLOOR_2D", "MAN_2D", "MAN_3D", "MAX_2D", "MAX_3D"),
    *("ATT", "GEO"),
)

# Reinelt's own digits: published optima rest on them.
GEO_PI = 3.141592
EARTH_RADIUS_KM = 6378.388
# The mean radius of the earth, of the International Union of Geodesy and Geophysics.
MEAN_RADIUS_KM = 6371.0088


def leg_lengths(
    origin: Float[np.ndarray, "*B D"], target: Float[np.ndarray, "*B D"], metric: str
) -> Float64[np.ndarray, "*B"]:
    """Distances between pairs of positions, whole numbers in every metric that is not among `UNROUNDED`."""
    if metric == "GEO":
        return _geographical(origin, target)
    if metric == GREAT_CIRCLE:
        return _great_circle(origin, target)
    difference = np.abs(origin.astype(np.float64) - target)
    if metric == "ATT":
        # Pseudo-Euclidean: the nearest integer, or the next one where that is too short.
        pseudo = np.sqrt(np.square(difference).sum(-1) / 10)
        nearest = np.floor(pseudo + 0.5)
        return nearest + (nearest < pseudo)
    if metric.startswith("MAX_"):
        # Each difference is rounded, and so is the largest of them.
        return np.floor(difference + 0.5).max(-1)
    if metric.startswith("MAN_"):
        return np.floor(difference.sum(-1) + 0.5)
    straight = np.sqrt(np.square(difference).sum(-1))
    if metric == EXACT:
        return straight
    if metric.startswith("CEIL_"):
        return np.ceil(straight)
    if metric.startswith("FLOOR_"):
        return np.floor(straight)
    assert metric.startswith("EUC_"), f"{metric} is none of {FILE_METRICS}"
    return np.floor(straight + 0.5)


def _great_circle(origin: Float[np.ndarray, "*B 2"], target: Float[np.ndarray, "*B 2"]) -> Float64[np.ndarray, "*B"]:
    # The haversine formula keeps its digits where places lie close together.
    (latitude, longitude), (other_latitude, other_longitude) = (
        np.moveaxis(np.radians(position.astype(np.float64)), -1, 0) for position in (origin, target)
    )
    across = np.square(np.sin((longitude - other_longitude) / 2))
    haversine = np.square(np.sin((latitude - other_latitude) / 2)) + np.cos(latitude) * np.cos(other_latitude) * across
    return 2 * MEAN_RADIUS_KM * np.arcsin(np.sqrt(np.clip(haversine, 0, 1)))


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
    coords: Float[np.ndarray, "I N D"], tours: Int[np.ndarray, "I Q L"], metric: str
) -> Float64[np.ndarray, "I Q"]:
    """Lengths of Q closed tours of each instance; a leg from a node to itself has none."""
    rows = np.arange(len(coords))[:, None, None]
    following = np.roll(tours, -1, axis=-1)
    legs = leg_lengths(coords[rows, tours], coords[rows, following], metric)
    return np.where(tours == following, 0.0, legs).sum(-1)


def tour_length(coords: Float[np.ndarray, "N D"], tour: Int[np.ndarray, " L"], metric: str) -> int | float:
    """Length of one closed tour; an int in every metric that is not among `UNROUNDED`."""
    length = float(tour_lengths(coords[None], tour[None, None], metric)[0, 0])
    return length if metric in UNROUNDED else int(length)


def longest_leg(coords: Float[np.ndarray, "N D"], metric: str) -> float:
    """A length that no leg between two of the nodes exceeds."""
    if metric in ("GEO", GREAT_CIRCLE):
        return EARTH_RADIUS_KM * math.pi + 1
    # Corners of the box around the nodes are at least as far apart as any two of them.
    return float(leg_lengths(coords.min(0, keepdims=True), coords.max(0, keepdims=True), metric)[0])


def is_paid(metric: str) -> bool:
    """Whether what moves cost has to be learnt, so that positions do not tell how long a tour is."""
    return metric in (PAID, SECONDS)


def unit(metric: str) -> str:
    """What lengths are counted in, as it stands behind a number; empty where the file does not say."""
    return {GREAT_CIRCLE: " km", SECONDS: " s"}.get(metric, "")


def distance_matrix(coords: Float[np.ndarray, "N D"], metric: str) -> Float64[np.ndarray, "N N"]:
    """Distances between all nodes; 0 from a node to itself, which `GEO` would not give."""
    origin, target = np.broadcast_arrays(coords[:, None], coords[None])
    distances = leg_lengths(origin, target, metric)
    np.fill_diagonal(distances, 0.0)
    return distances


def plane(coords: Float[np.ndarray, "N D"], metric: str) -> Float64[np.ndarray, "N 2"]:
    """Positions whose Euclidean distances are about proportional to those of the metric.

    Of latitude and longitude, east and north in degrees at the middle latitude; of three coordinates, those along the
    two directions in which the nodes spread most.
    """
    if metric in ("GEO", GREAT_CIRCLE):
        degrees = _whole_degrees(coords) if metric == "GEO" else coords.astype(np.float64)
        latitude, longitude = degrees[:, 0], _without_date_line(degrees[:, 1])
        middle = math.radians((latitude.min() + latitude.max()) / 2)
        return np.stack((longitude * math.cos(middle), latitude), -1)
    coords = coords.astype(np.float64)
    if coords.shape[1] == 2:
        return coords
    centred = coords - coords.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, :-3:-1]


def _without_date_line(longitude: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Longitudes that run on where the nodes lie on both sides of 180 degrees."""
    if np.ptp(longitude) <= 180:
        return longitude
    ordered = np.sort(longitude)
    gaps = np.diff(ordered, append=ordered[0] + 360)
    east = ordered[gaps.argmax()]
    return np.where(longitude <= east, longitude + 360, longitude)


def plane_unit(metric: str) -> float:
    """How long a leg of length 1 in `plane` is in the metric, but for rounding, on average over all directions."""
    if metric.startswith("MAN_"):
        return 4 / math.pi
    if metric.startswith("MAX_"):
        return 2 * math.sqrt(2) / math.pi
    degrees = {"GEO": EARTH_RADIUS_KM * math.pi / 180, GREAT_CIRCLE: MEAN_RADIUS_KM * math.pi / 180}
    return {"ATT": math.sqrt(0.1), **degrees}.get(metric, 1.0)
