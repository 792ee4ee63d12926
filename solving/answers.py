"""What is told of solutions: a table, the tours themselves, warnings, or one JSON object for machines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from routing.files import RoutingInstance
from routing.metrics import unit
from routing.solutions import route_counts, split_routes
from solving.decoding import FARTHEST_SIZE, Decoding, Imagined, is_far
from solving.intervals import SHARE, Forecast, least_tours
from system.terminal import one_line

# More tours than this do not fit a screen: the means are printed before the rows.
MOST_SHOWN = 20
# Percent by which a tour may be shorter than its reference, which is near-optimal at times.
DOUBTFUL_GAP = 5.0
NAMES_SHOWN = 3
# Who chooses tours, where no solver does.
NETWORK, NETWORK_IN_PARTS = "network", "network, in parts"


class Solution(NamedTuple):
    """A checked solution of an instance, with lengths in the instance's own metric.

    Where moves cost no distances, lengths are what is paid by the true costs; where something is hidden, on average;
    where nobody knows, they are None.

    Attributes:
        instance: what was solved.
        tour: as in `routing.solutions`.
        length: of the closed tour.
        seconds: what decoding took; instances that were solved together share it.
        chosen_by: `NETWORK`, `NETWORK_IN_PARTS`, or the name of a solver.
        by_model: whether a trained model had a part in it.
        forecast: what the model expects it to cost; None where positions tell, or no model does.
        reference: length to compare with; None where it is neither known nor asked for.
        imagined: the tour that the model imagines, and the length it expects; None where it was not asked for.
        nearest: length of the tour that always goes to the nearest node; None where it was not computed.
        polished_by: the library whose local search went on from there; None where none did, or it found nothing.
    """

    instance: RoutingInstance
    tour: Int64[np.ndarray, " L"]
    length: int | float | None
    seconds: float
    reference: int | float | None = None
    imagined: Imagined | None = None
    nearest: float | None = None
    chosen_by: str = NETWORK
    by_model: bool = True
    forecast: Forecast | None = None
    polished_by: str | None = None

    @property
    def chooser(self) -> str:
        """Who chose the tour, and by whose costs where a solver did."""
        if self.polished_by is not None:
            return f"{self.chosen_by}, then {self.polished_by}"
        if self.chosen_by in (NETWORK, NETWORK_IN_PARTS):
            return self.chosen_by
        return f"{self.chosen_by} by the model's costs" if self.by_model else f"{self.chosen_by}, no model"

    @property
    def routes(self) -> int | None:
        """How many vehicles are on their way; None of a tour."""
        return None if self.instance.demand is None else int(route_counts(self.tour[None])[0])

    @property
    def gap(self) -> float | None:
        """How much longer than the reference, in percent; None without one, or where all its legs round to 0."""
        return 100 * (self.length / self.reference - 1) if self.reference and self.length is not None else None

    @property
    def imagined_real_length(self) -> int | float | None:
        """What the imagined tour is long; None where there is none."""
        if self.imagined is None or not self.instance.is_priced:
            return None
        return self.instance.tour_length(self.imagined.tour)


def averaged(solutions: Sequence[Solution]) -> Sequence[Solution]:
    """Those that means are over: all that have a gap, so that length, reference and gap are of the same instances.

    Where none has one, all of them.
    """
    return [solution for solution in solutions if solution.gap is not None] or solutions


def totals(solutions: Sequence[Solution]) -> dict[str, int | float | None]:
    """Means over the instances that `averaged` chooses, and the seconds that decoding all took; None: nothing there.

    The gap is the mean of the instances' own gaps, so that long tours do not count more than short ones. Lengths in
    several units have no mean.
    """

    def mean(values: list[int | float]) -> float | None:
        return float(np.mean(values)) if values else None

    chosen = averaged(solutions)
    # Kilometres and plain numbers have no common mean; gaps do.
    lengths = chosen if len({unit(solution.instance.metric) for solution in chosen}) == 1 else []
    gaps = [solution.gap for solution in chosen if solution.gap is not None]
    return {
        "mean_of": len(chosen),
        "mean_length": mean([each.length for each in lengths if each.length is not None]),
        "mean_reference": mean([each.reference for each in lengths if each.reference is not None and gaps]),
        "mean_gap_percent": mean(gaps),
        "seconds": sum(solution.seconds for solution in solutions),
    }


def as_json(solutions: Sequence[Solution]) -> str:
    """Totals and every solution as one JSON object; nodes are counted from 0."""
    rows = []
    for solution in solutions:
        row: dict[str, Any] = {
            "name": solution.instance.name,
            "n": len(solution.instance.coords),
            "length": solution.length,
            "unit": unit(solution.instance.metric).strip() or None,
            "reference": solution.reference,
            "gap_percent": solution.gap,
            "chosen_by": solution.chosen_by,
            "by_model": solution.by_model,
            "polished_by": solution.polished_by,
            "routes": solution.routes,
            "minimised": "length",
            "seconds": solution.seconds,
            "tour": solution.tour.tolist(),
        }
        if solution.forecast is not None:
            row["expected"] = solution.forecast.cost
            row["interval"] = [solution.forecast.low, solution.forecast.high]
            row["interval_of"] = "driven trips" if solution.forecast.driven else "chosen tours"
        if solution.imagined is not None:
            row["imagined_length"] = solution.imagined.length
            row["imagined_real_length"] = solution.imagined_real_length
            row["imagined_tour"] = solution.imagined.tour.tolist()
        rows.append(row)
    return json.dumps({**totals(solutions), "instances": rows}, allow_nan=False)


def table(solutions: Sequence[Solution]) -> str:
    """One line for each solution, and one with the means: the last, or the first where there are many."""
    with_imagined = any(solution.imagined is not None for solution in solutions)
    with_forecast = any(solution.forecast is not None for solution in solutions)
    of_what = " of trips" if any(_trips_told(solution) for solution in solutions) else ""
    heads = ["instance", "n"] + (["expected", f"{100 * SHARE:.0f} %{of_what} within"] if with_forecast else [])
    heads += ["in truth" if with_forecast else "length", "reference", "gap, %", "seconds"]
    heads += ["imagined", "in truth"] if with_imagined else []
    with_routes = any(solution.routes is not None for solution in solutions)
    heads += ["routes"] if with_routes else []
    heads.append("chosen by")
    rows = [
        _cells(solution, with_imagined=with_imagined, with_forecast=with_forecast, with_routes=with_routes)
        for solution in solutions
    ]
    if len(solutions) > MOST_SHOWN:
        rows.insert(0, _mean_cells(solutions, with_forecast=with_forecast))
    elif len(solutions) > 1:
        rows.append(_mean_cells(solutions, with_forecast=with_forecast))
    rows.insert(0, heads)
    columns = [max(len(row[index]) for row in rows if index < len(row)) for index in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, columns, strict=False))
        )
        for row in rows
    )


def _cells(solution: Solution, *, with_imagined: bool, with_forecast: bool, with_routes: bool) -> list[str]:
    instance = solution.instance
    lengths = [solution.length, solution.reference]
    cells = [one_line(instance.name), str(len(instance.coords))]
    if with_forecast:
        expected = None if solution.forecast is None else solution.forecast.cost
        cells += [length_text(expected, instance.metric), bounds(solution) or "-"]
    cells += [length_text(length, instance.metric) for length in lengths]
    cells += [_percent(solution.gap), f"{solution.seconds:.3f}"]
    if with_imagined:
        expected = None if solution.imagined is None else solution.imagined.length
        cells += [length_text(each, instance.metric) for each in (expected, solution.imagined_real_length)]
    if with_routes:
        cells.append("-" if solution.routes is None else str(solution.routes))
    return [*cells, solution.chooser]


def _trips_told(solution: Solution) -> int:
    """By how many driven trips it is known how far costs are from those expected."""
    return 0 if solution.forecast is None else solution.forecast.driven


def bounds(solution: Solution) -> str:
    """Between which costs the true one is expected; empty where nobody knows."""
    forecast, metric = solution.forecast, solution.instance.metric
    if forecast is None or forecast.low is None:
        return ""
    low, high = (length_text(each, metric).removesuffix(unit(metric)) for each in (forecast.low, forecast.high))
    return f"{low} to {high}{unit(metric)}"


def _mean_cells(solutions: Sequence[Solution], *, with_forecast: bool) -> list[str]:
    total, chosen = totals(solutions), averaged(solutions)
    metrics = {solution.instance.metric for solution in chosen}
    metric = metrics.pop() if len(metrics) == 1 else ""
    name = f"mean of {len(chosen)}" + (" with a reference" if len(chosen) < len(solutions) else "")
    means = [length_text(total[key], metric) for key in ("mean_length", "mean_reference")]
    if with_forecast:
        expected = [solution.forecast.cost for solution in chosen if solution.forecast is not None]
        means = [length_text(float(np.mean(expected)), metric) if expected and metric else "-", "", *means]
    return [name, "", *means, _percent(total["mean_gap_percent"]), f"{total['seconds']:.3f} in all"]


def length_text(length: int | float | None, metric: str) -> str:
    """A length as it is shown, with its unit where that is known."""
    if length is None:
        return "-"
    if unit(metric):
        return f"{length:.1f}{unit(metric)}"
    return f"{length:.0f}" if float(length).is_integer() else f"{length:.4f}"


def _percent(gap: float | None) -> str:
    # Adding 0 takes the sign from a gap of -0.00.
    return "-" if gap is None else f"{round(gap, 2) + 0.0:.2f}"


def tours(solutions: Sequence[Solution], *, columns: int | None = None) -> str:
    """The tours as numbers of nodes, each on one line, counted as in the files that hold them.

    Args:
        solutions: up to `MOST_SHOWN`; of more there is nothing to show.
        columns: of the screen; what it has, or 80, where not given.
    """
    if not solutions or len(solutions) > MOST_SHOWN:
        return ""
    columns = columns or shutil.get_terminal_size().columns
    plans = solutions[0].instance.demand is not None
    lines = ["routes, customers counted from 1:" if plans else "tours, nodes counted from 1:"]
    if any(solution.instance.windows is not None for solution in solutions):
        lines[0] = "routes of least length in all, not the fewest of them, customers counted from 1:"
    longest = columns // 3
    for solution in solutions:
        name = one_line(solution.instance.name)
        name = name if len(name) <= longest else name[: longest - 3] + "..."
        lines.append(_shortened(f"{name}:", _numbers(solution.instance, solution.tour), columns))
        if solution.imagined is not None:
            numbers = _numbers(solution.instance, solution.imagined.tour)
            lines.append(_shortened(f"{name}, imagined:", numbers, columns))
    return "\n".join(lines)


def _numbers(instance: RoutingInstance, tour: Int64[np.ndarray, " L"]) -> list[str]:
    if instance.demand is None:
        return [str(node + 1) for node in tour]
    return " | ".join(" ".join(map(str, route)) for route in split_routes(tour)).split()


def _shortened(name: str, words: list[str], columns: int) -> str:
    """A name and words behind it, those in the middle left out where a line would be longer than the screen."""
    line = " ".join([name, *words])
    if len(line) <= columns:
        return line
    # A quarter of the room is for the end of the tour.
    end: list[str] = []
    room = columns - len(name) - len(" ...")
    for word in reversed(words):
        if len(" ".join([word, *end])) + 1 > room // 4:
            break
        end.insert(0, word)
    begin: list[str] = []
    for word in words:
        if len(" ".join([*begin, word])) + 1 > room - sum(len(last) + 1 for last in end):
            break
        begin.append(word)
    return " ".join([name, *begin, "...", *end])


def warnings(solutions: Sequence[Solution], decoding: Decoding, *, trained_on: int) -> list[str]:
    """Lines on networks' tours that are worse than going to the nearest node, and on sizes far from those trained on.

    Args:
        solutions: with `nearest`.
        decoding: how they were looked for.
        trained_on: nodes of the instances that the agent learnt from; 0 without one.
    """
    lines = []
    worse = [each for each in solutions if _is_worse(each)]
    if worse:
        named = [
            f"{one_line(each.instance.name)} ({length_text(each.length, each.instance.metric)} where that gives"
            f" {length_text(each.nearest, each.instance.metric)})"
            for each in worse[:NAMES_SHOWN]
        ]
        lines.append(
            f"{len(worse)} of {len(solutions)} worse than going to the nearest node each time: "
            f"{_listed(named, len(worse))}; {_advice(decoding)}, or a run trained longer and on instances like these"
        )
    doubtful = [each for each in solutions if each.gap is not None and each.gap < -DOUBTFUL_GAP]
    if doubtful:
        named = [one_line(each.instance.name) for each in doubtful[:NAMES_SHOWN]]
        lines.append(
            f"{len(doubtful)} of {len(solutions)} far shorter than what is known of them:"
            f" {_listed(named, len(doubtful))}; the length beside the file, or in its comment, is of something else:"
            " try --reference lkh or pyvrp"
        )
    lines += _of_bounds(solutions)
    by_network = [each for each in solutions if each.chosen_by == NETWORK]
    far = [each for each in by_network if is_far(len(each.instance.coords), trained_on)]
    if far:
        named = [f"{one_line(each.instance.name)} ({len(each.instance.coords)} nodes)" for each in far[:NAMES_SHOWN]]
        lines.append(
            f"{len(far)} of {len(solutions)} with more than {FARTHEST_SIZE} times the {trained_on} nodes trained on:"
            f" {_listed(named, len(far))}; tours of such sizes are far from short: --decode {Decoding.PARTS} solves"
            " parts of the size trained on"
        )
    return lines


def _is_worse(solution: Solution) -> bool:
    """Whether it is longer than going to the nearest node each time, where both lengths are known."""
    length, nearest = solution.length, solution.nearest
    return length is not None and nearest is not None and length > nearest * (1 + 1e-9)


def _of_bounds(solutions: Sequence[Solution]) -> list[str]:
    """What there is to say of forecasts without bounds, or with bounds that were found out about other sizes."""
    lines = []
    unbounded = [each for each in solutions if each.forecast is not None and each.forecast.low is None]
    if any(each.length is None for each in unbounded):
        lines.append(
            "nothing says how far costs may be from those expected: of a log that is found out when training ends, by"
            f" held-out trips (one in ten), and takes {least_tours()} of two moves or more, which a column `trip` tells"
        )
    elif unbounded:
        lines.append(
            "nothing says how far costs may be from those expected: the run was not trained to its end in this version,"
            " or on fewer than 19 validation instances; its own command goes on with it, with more --steps"
        )
    if driven := max(map(_trips_told, solutions), default=0):
        lines.append(
            f"bounds are by {driven:,} held-out trips of the log, as they were driven: tours that are chosen for"
            " looking cheap keep them less often"
        )
    others = [
        each
        for each in solutions
        if each.forecast is not None and each.forecast.nodes not in (None, len(each.instance.coords))
    ]
    if others:
        named = [f"{one_line(each.instance.name)} ({len(each.instance.coords)} nodes)" for each in others[:NAMES_SHOWN]]
        assert others[0].forecast is not None
        lines.append(
            f"{len(others)} of {len(solutions)} with other than the {others[0].forecast.nodes} nodes for which it was"
            f" found out how far costs are from those expected: {_listed(named, len(others))}; bounds may hold less"
            " often"
        )
    return lines


def _listed(named: list[str], count: int) -> str:
    return ", ".join([*named, *([f"and {count - len(named)} more"] if count > len(named) else [])])


def _advice(decoding: Decoding) -> str:
    if decoding.method in ("greedy", Decoding.PLAN):
        return "try --decode augment"
    samples = 10 * decoding.samples if decoding.method == "sample" else 1000
    return f"try --decode sample --samples {samples}"
