"""Pictures of tours and of what a model imagined, as arrays that TensorBoard, gymnasium and image files take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64, Int, Shaped, UInt8

from streets.network import Network, quickest_way
from system.terminal import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 4.8
# A panel is no narrower, so that its title has room.
LEAST_INCHES = 3.2
# Room for a title above a panel.
TITLE_INCHES = 0.384
# And for a note between the two.
NOTE_INCHES = 0.16
DOTS_PER_INCH, POINTS_PER_INCH = 100, 72
# Points between a panel and what stands above it.
TITLE_PAD = 6

NODE_COLOR = "#1f3a5f"
LEG_COLOR = "#4c8bc0"
START_COLOR = "#d1495b"
OPEN_COLOR = "#9aa5b1"
STREET_COLOR = "#c3cad2"
ATTRIBUTION = "© OpenStreetMap contributors"
# The colours of a plan's routes, in turn; a tour has the first one.
ROUTE_COLORS = (LEG_COLOR, "#e08e45", "#5aa469", "#9b5fc0", "#c7a531", "#3fa7a5", "#b5577f", "#7f8c4f")

# The most lines and frames in an open-loop picture: more cannot be read.
MOST_LINES = 8
MOST_FRAMES = 12


def draw_tour(
    coords: Float[np.ndarray, "N 2"],
    tour: Int[np.ndarray, " L"],
    *,
    title: str | None = None,
    note: str | None = None,
    visited_only: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a closed tour, its first node marked; one that passes its first node in between, as routes in colours.

    Args:
        coords: node positions.
        tour: nodes in visiting order. Nodes that it leaves out are drawn hollow; it may repeat nodes.
        title: a line above the picture.
        note: a smaller line below the title.
        visited_only: draw only the legs between the nodes in `tour`, not the one that closes it.
    """
    figure, (axes,) = _panels(1, above=_room(note))
    _draw_on(axes, coords, tour, title=title, note=note, closed=not visited_only)
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
    return draw_tours(coords, (left_tour, right_tour), titles=(left_title, right_title))


def draw_tours(
    coords: Float[np.ndarray, "N 2"],
    tours: Sequence[Int[np.ndarray, " _"]],
    *,
    titles: Sequence[str],
    inches: float = PANEL_INCHES,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw closed tours of one instance side by side, each under its title and that wide."""
    figure, panels = _panels(len(tours), inches=inches)
    for axes, tour, title in zip(panels, tours, titles, strict=True):
        _draw_on(axes, coords, tour, title=title, closed=True)
    return _pixels(figure)


def draw_streets(
    network: Network,
    tours: Sequence[Int[np.ndarray, " _"]],
    *,
    titles: Sequence[str],
    note: str | None = None,
    seconds: Float64[np.ndarray, " A"] | None = None,
    inches: float = PANEL_INCHES,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw closed tours side by side along the streets that they drive, on the grey network.

    Args:
        network: the streets.
        tours: places in visiting order, as indices of `network.places`.
        titles: a line above each.
        note: a smaller line below each title.
        seconds: that each arc takes, which decides by which streets one drives; free flow where not given.
        inches: height of the picture.
    """
    times = network.free_flow if seconds is None else seconds
    points, _ = network.unit_square()
    east, north = np.ptp(points, axis=0)
    width = max(LEAST_INCHES, inches * min(1.0, east / north))
    figure, panels = _panels(len(tours), inches=inches, above=_room(note), width=width)
    for axes, tour, title in zip(panels, tours, titles, strict=True):
        ways = points[quickest_way(network, times, np.append(tour, tour[:1]))]
        arcs = points[np.stack((network.tails, network.heads))]
        axes.plot(*arcs.transpose(2, 0, 1), color=STREET_COLOR, linewidth=1.0, zorder=0)
        axes.plot(ways[:, 0], ways[:, 1], color=LEG_COLOR, linewidth=1.8, solid_joinstyle="round", zorder=1)
        _mark_stops(axes, points[network.places[tour]])
        _write_above(axes, title, note)
        axes.text(0.99, 0.01, ATTRIBUTION, transform=axes.transAxes, ha="right", fontsize=6, color=OPEN_COLOR)
    return _pixels(figure)


def _mark_stops(axes: Axes, stops: np.ndarray) -> None:
    axes.scatter(stops[:, 0], stops[:, 1], s=30, color=NODE_COLOR, linewidths=0, zorder=2)
    axes.plot(stops[:1, 0], stops[:1, 1], "*", markersize=14, color=START_COLOR, markeredgecolor="white", zorder=3)


def _figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure of that many inches."""
    # matplotlib takes as long to import as some hundred tours to find, and most programs draw nothing.
    from matplotlib.figure import Figure

    # A Figure made without pyplot is registered nowhere, and is freed with its last reference.
    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", **options)


def _panels(
    count: int, *, inches: float = PANEL_INCHES, above: float = TITLE_INCHES, width: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Panels side by side, that high and as wide unless a width is given, with room `above` each."""
    figure = _figure((width or inches) * count, inches)
    panels = []
    for index in range(count):
        axes = figure.add_axes(((index + 0.02) / count, 0.02, 0.96 / count, 0.98 - above / inches))
        axes.set_aspect("equal")
        axes.margins(0.06)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#d5dae0")
        panels.append(axes)
    return figure, panels


def _draw_on(
    axes: Axes, coords: np.ndarray, tour: np.ndarray, *, title: str | None, note: str | None = None, closed: bool
) -> None:
    nodes = np.append(tour, tour[:1]) if closed else tour
    visited, start, left_out = coords[np.unique(tour)], coords[tour[:1]], np.delete(coords, tour, axis=0)
    # Dots that suit 20 nodes would cover a picture of 1,000.
    dot_area = float(np.clip(900 / len(coords), 4, 36))
    for route, color in zip(_routes(nodes), itertools.cycle(ROUTE_COLORS)):
        stops = coords[route]
        axes.plot(stops[:, 0], stops[:, 1], color=color, linewidth=1.6, solid_joinstyle="round", zorder=1)
    axes.scatter(visited[:, 0], visited[:, 1], s=dot_area, color=NODE_COLOR, linewidths=0, zorder=2)
    axes.scatter(left_out[:, 0], left_out[:, 1], s=dot_area, facecolor="white", edgecolor=OPEN_COLOR, zorder=2)
    axes.plot(start[:, 0], start[:, 1], "*", markersize=14, color=START_COLOR, markeredgecolor="white", zorder=3)
    if title is not None:
        _write_above(axes, title, note)


def _room(note: str | None) -> float:
    """Inches above a panel for a title, and for a note where there is one."""
    return TITLE_INCHES + (NOTE_INCHES if note else 0)


def _write_above(axes: Axes, title: str, note: str | None) -> None:
    # Names come from files: text between two dollars would be drawn as mathematics, and fonts lack control characters.
    pad = TITLE_PAD + (POINTS_PER_INCH * NOTE_INCHES if note else 0)
    axes.set_title(one_line(title), fontsize=11, color=NODE_COLOR, parse_math=False, pad=pad)
    if note is not None:
        axes.annotate(
            one_line(note),
            xy=(0.5, 1.0),
            xycoords="axes fraction",
            xytext=(0, TITLE_PAD),
            textcoords="offset points",
            horizontalalignment="center",
            fontsize=8,
            color=NODE_COLOR,
            parse_math=False,
        )


def _routes(nodes: np.ndarray) -> list[np.ndarray]:
    """A walk cut where it passes its first node, each part with the node at both ends."""
    passes = np.flatnonzero(nodes[1:] == nodes[0]) + 1
    cuts = itertools.pairwise([0, *passes.tolist(), len(nodes) - 1])
    # A vehicle that waits at the first node drives no route.
    return [nodes[begin : end + 1] for begin, end in cuts if (nodes[begin : end + 1] != nodes[0]).any()]


def _pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_open_loop(
    truth: Shaped[np.ndarray, "T *F"], predicted: Shaped[np.ndarray, "T *F"], *, seen: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw what a model imagined beside what happened: lines for numbers, strips of frames for images.

    Args:
        truth: one key of the observation over an episode.
        predicted: the same as the model has it; it saw the first `seen` rows and imagined the rest.
        seen: rows that the model saw.
    """
    if truth.dtype == np.uint8 and truth.ndim == 4:
        return _frame_strips(truth, predicted, seen=seen)
    return _lines(truth.reshape(len(truth), -1), predicted.reshape(len(predicted), -1), seen=seen)


def _lines(
    truth: Shaped[np.ndarray, "T F"], predicted: Shaped[np.ndarray, "T F"], *, seen: int
) -> UInt8[np.ndarray, "H W 3"]:
    count = min(truth.shape[1], MOST_LINES)
    figure = _figure(7.2, 1.3 * count + 0.5, layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    steps = np.arange(len(truth))
    for index, axes in enumerate(panels):
        axes.axvspan(-0.5, seen - 0.5, color=OPEN_COLOR, alpha=0.25, linewidth=0)
        axes.plot(steps, truth[:, index].astype(float), color=NODE_COLOR, label="happened")
        axes.plot(steps, predicted[:, index].astype(float), color=START_COLOR, linestyle="--", label="model")
        axes.set_ylabel(f"[{index}]")
        axes.set_xlim(-0.5, len(truth) - 0.5)
    panels[0].set_title(f"the model sees the first {seen} steps (grey) and imagines the rest", fontsize="medium")
    panels[0].legend(loc="upper right", fontsize="small")
    panels[-1].set_xlabel("step")
    return _pixels(figure)


def _frame_strips(
    truth: UInt8[np.ndarray, "T H W C"], predicted: UInt8[np.ndarray, "T H W C"], *, seen: int
) -> UInt8[np.ndarray, "Y X 3"]:
    chosen = np.unique(np.linspace(0, len(truth) - 1, min(MOST_FRAMES, len(truth))).round().astype(int))
    difference = np.abs(truth.astype(np.int16) - predicted).astype(np.uint8)
    figure = _figure(1.0 * len(chosen) + 1.2, 3.6, layout="constrained")
    panels = figure.subplots(3, len(chosen), squeeze=False)
    # A picture shows the last channels: of stacked frames they are the latest one.
    colored = truth.shape[-1] % 3 == 0
    for row, (name, frames) in enumerate((("happened", truth), ("model", predicted), ("difference", difference))):
        for column, step in enumerate(chosen):
            axes = panels[row, column]
            pixels = frames[step][..., -3:] if colored else frames[step][..., -1]
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                state = "seen" if step < seen else "imagined"
                axes.set_title(f"{step}\n{state}", fontsize="small", color=NODE_COLOR if step < seen else START_COLOR)
        panels[row, 0].set_ylabel(name)
    return _pixels(figure)
