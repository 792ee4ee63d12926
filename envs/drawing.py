"""Pictures of tours, as arrays that TensorBoard, gymnasium and image files take."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANEL_INCHES = 4.8
DOTS_PER_INCH = 100

NODE_COLOR = "#1f3a5f"
LEG_COLOR = "#4c8bc0"
START_COLOR = "#d1495b"
OPEN_COLOR = "#9aa5b1"


def draw_tour(
    coords: Float[np.ndarray, "N 2"],
    tour: Int[np.ndarray, " L"],
    *,
    title: str | None = None,
    visited_only: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a closed tour, its first node marked.

    Args:
        coords: node positions.
        tour: nodes in visiting order. Nodes that it leaves out are drawn hollow; it may repeat nodes.
        title: a line above the picture.
        visited_only: draw only the legs between the nodes in `tour`, not the one that closes it.
    """
    figure, (axes,) = _panels(1)
    _draw_on(axes, coords, tour, title=title, closed=not visited_only)
    return _pixels(figure)


def draw_tour_pair(
    coords: Float[np.ndarray, "N 2"],
    left_tour: Int[np.ndarray, " L"],
    right_tour: Int[np.ndarray, " R"],
    *,
    left_title: str,
    right_title: str,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw two closed tours of one instance side by side."""
    figure, (left, right) = _panels(2)
    _draw_on(left, coords, left_tour, title=left_title, closed=True)
    _draw_on(right, coords, right_tour, title=right_title, closed=True)
    return _pixels(figure)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    # A Figure made without pyplot is registered nowhere, and is freed with its last reference.
    figure = Figure(figsize=(PANEL_INCHES * count, PANEL_INCHES), dpi=DOTS_PER_INCH, facecolor="white")
    panels = []
    for index in range(count):
        axes = figure.add_axes(((index + 0.02) / count, 0.02, 0.96 / count, 0.9))
        axes.set_aspect("equal")
        axes.margins(0.06)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#d5dae0")
        panels.append(axes)
    return figure, panels


def _draw_on(axes: Axes, coords: np.ndarray, tour: np.ndarray, *, title: str | None, closed: bool) -> None:
    nodes = np.append(tour, tour[:1]) if closed else tour
    stops = coords[nodes]
    visited, start, left_out = coords[tour], coords[tour[:1]], np.delete(coords, tour, axis=0)
    # Dots that suit 20 nodes would cover a picture of 1,000.
    dot_area = float(np.clip(900 / len(coords), 4, 36))
    axes.plot(stops[:, 0], stops[:, 1], color=LEG_COLOR, linewidth=1.6, solid_joinstyle="round", zorder=1)
    axes.scatter(visited[:, 0], visited[:, 1], s=dot_area, color=NODE_COLOR, linewidths=0, zorder=2)
    axes.scatter(left_out[:, 0], left_out[:, 1], s=dot_area, facecolor="white", edgecolor=OPEN_COLOR, zorder=2)
    axes.plot(start[:, 0], start[:, 1], "*", markersize=14, color=START_COLOR, markeredgecolor="white", zorder=3)
    if title is not None:
        axes.set_title(title, fontsize=11, color=NODE_COLOR)


def _pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
