"""Whether the times of instances are like those that a network was trained on, in its own frame."""

from __future__ import annotations

from collections.abc import Sequence

from routing.files import RoutingInstance
from routing.instances import longer_side
from routing.metrics import plane, plane_unit
from routing.vrptw import DAY, SERVICE, WINDOW
from solving.answers import NAMES_SHOWN
from system.terminal import one_line

# By which share times may exceed those trained on before that is said.
BEYOND = 1.5


def strange_times(instances: Sequence[RoutingInstance]) -> list[str]:
    """A line on instances with days, windows or service longer than any in training; none where there are no such."""
    named = [f"{one_line(each.name)} ({', '.join(long)})" for each in instances if (long := _long_times(each))]
    if not named:
        return []
    shown = ", ".join(named[:NAMES_SHOWN]) + (", ..." if len(named) > NAMES_SHOWN else "")
    return [
        f"{len(named)} of {len(instances)} with other times than those trained on, in sides of the square around their"
        f" nodes: {shown}; with --polish, local search goes on from the plans"
    ]


def _long_times(instance: RoutingInstance) -> list[str]:
    windows = instance.windows
    if windows is None:
        return []
    side = longer_side(plane(instance.coords, instance.metric)) * plane_unit(instance.metric)
    if not side:
        return []
    each = side * windows.pace
    lengths = windows.due - windows.ready
    found = (
        ("a day of", windows.day / each, DAY),
        ("windows up to", float(lengths[1:].max(initial=0.0)) / each, WINDOW[1]),
        ("service up to", float(windows.service.max()) / each, SERVICE[1]),
    )
    return [f"{what} {value:.3g}, not {usual:g}" for what, value, usual in found if value > BEYOND * usual]
