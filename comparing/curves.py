"""Draws the curves of groups of runs against env steps and against minutes, with a band over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from comparing.published import Scores
from comparing.runs import Series
from comparing.summary import interval
from config import ConfigError
from system.safe_files import replacing
from system.terminal import one_line

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")
MOST_POINTS = 300
# Where one run is so many times longer than another, a linear axis would hide the shorter one.
WIDE = 8
AXES = {"steps": "env steps", "minutes": "training time, minutes"}
CAPTION = "thick: interquartile mean over seeds; band: its 95 % bootstrap interval; thin: each seed"


def draw(
    groups: Mapping[str, Sequence[Series]],
    path: Path,
    *,
    label: str,
    log_scale: bool,
    behind: tuple[str, Scores] | None = None,
) -> None:
    """Write the picture.

    Args:
        groups: the curves of each group's seeds; those without a finite value are left out.
        path: its suffix tells the format.
        label: what the values are, and their unit.
        log_scale: whether values, where all are positive, are on a logarithmic axis.
        behind: what published figures are called, and the figures, at steps of the simulator like the groups' own.

    Raises:
        ConfigError: the suffix is of no picture, or values are too large for one.
        OSError: the file cannot be written.
    """
    drawn = {name: [one for one in series if np.isfinite(one.values).any()] for name, series in groups.items()}
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    supported = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in supported:
        raise ConfigError(f"--out is {path}; its suffix must be one of {', '.join(sorted(supported))}")
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        for index, (name, series) in enumerate(drawn.items()):
            if series:
                _draw_group(axes, series, axis, name=name, index=index)
        _dress(axes, axis, [one for series in drawn.values() for one in series], log_scale=log_scale)
    if behind is not None:
        _draw_behind(figure.axes[0], *behind)
    figure.axes[0].set_ylabel(one_line(label), parse_math=False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(handles), 4), frameon=False)
    figure.supxlabel(CAPTION, fontsize=8, color="0.4")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary)
    except ValueError as error:
        # matplotlib fails on numbers near the largest float, which only logs of other programs hold.
        raise ConfigError(f"{path} cannot be drawn ({error})") from error


def curve(
    series: Sequence[Series], axis: str
) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"], Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """Interquartile mean and interval over seeds; the curve of each is straight between its points.

    Args:
        series: one for each seed, each with a finite value.
        axis: steps or minutes.

    Returns:
        Positions, from the latest of the beginnings to the earliest of the ends, so that all seeds are in every mean;
        the means there, and the lower and upper limits.
    """
    positions, values = zip(*(_points(one, axis) for one in series), strict=True)
    begin, end = max(place[0] for place in positions), min(place[-1] for place in positions)
    grid = np.unique(np.concatenate(positions))
    grid = grid[(grid >= begin) & (grid <= end)]
    if len(grid) > MOST_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, MOST_POINTS).astype(int)]
    of_seeds = [np.interp(grid, place, value) for place, value in zip(positions, values, strict=True)]
    return (grid, *interval(np.stack(of_seeds, axis=-1)))


def _draw_group(axes: Axes, series: Sequence[Series], axis: str, *, name: str, index: int) -> None:
    color, line = COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]
    grid, mean, low, high = curve(series, axis)
    if len(series) > 1:
        for one in series:
            axes.plot(*_points(one, axis), color=color, linestyle=line, linewidth=0.7, alpha=0.35)
        axes.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)
    seeds = "1 seed" if len(series) == 1 else f"{len(series)} seeds"
    # Text between two dollars would be drawn as mathematics.
    label = one_line(f"{name} ({seeds})").replace("$", r"\$")
    axes.plot(grid, mean, color=color, linestyle=line, linewidth=1.8, label=label)


def _draw_behind(axes: Axes, name: str, scores: Scores) -> None:
    """Published means with a standard deviation to both sides, as far as the curves go and one figure further."""
    end = axes.dataLim.x1
    last = min(int(np.searchsorted(scores.steps, end)) + 1, len(scores.steps))
    steps, mean, std = scores.steps[:last], scores.mean[:last], scores.std[:last]
    axes.fill_between(steps, mean - std, mean + std, color="0.85", linewidth=0, zorder=0)
    label = f"{name} ({scores.seeds} seeds; band: 1 standard deviation)"
    axes.plot(steps, mean, color="0.45", marker="o", markersize=3, linewidth=1.2, zorder=1, label=label)
    axes.set_xlabel("steps of the simulator")


def _dress(axes: Axes, axis: str, series: Sequence[Series], *, log_scale: bool) -> None:
    """Scales, labels and a quiet frame."""
    ends = [getattr(one, axis)[-1] for one in series]
    if ends and 0 < WIDE * min(ends) < max(ends):
        axes.set_xscale("log")
    if log_scale and all(one.values[np.isfinite(one.values)].min() > 0 for one in series):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(_plain_or_nothing)
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if axis == "steps" else _plain)
    axes.set_xlabel(AXES[axis])
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@FuncFormatter
def _plain(value: float, _place: int | None) -> str:
    return f"{value:g}"


@FuncFormatter
def _plain_or_nothing(value: float, _place: int | None) -> str:
    """Between the powers of ten only 2 and 5 have room for a label."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _points(series: Series, axis: str) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Positions in rising order and the finite values there."""
    position, finite = getattr(series, axis), np.isfinite(series.values)
    order = np.argsort(position[finite], kind="stable")
    return position[finite][order], series.values[finite][order]
