"""Rush hours: how much longer an arc of a network takes at some time of the day."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from streets.network import Network
from streets.roads import CLASS_NAMES

# Hours of the working day for which travel times are computed; after the last comes the first again.
HOURS = (6.5, 8.0, 9.5, 11.0, 12.5, 14.0, 15.5, 17.0)
MORNING, EVENING, SPREAD = 8.0, 17.0, 2.0
# How much longer a jammed arc takes at the worst, how narrow the directions are that jam, and which classes do.
JAM, NARROWNESS = 9.0, 4
JAMMED = {"motorway": 1.0, "trunk": 1.0, "primary": 1.0, "secondary": 1.0, "tertiary": 0.5}


def rush_seconds(network: Network, hour: float) -> Float64[np.ndarray, " A"]:
    """Seconds that every arc takes at an hour of the day: free flow, times

        1 + 9 w (m(hour) ((1 + cos a) / 2)^4 + e(hour) ((1 - cos a) / 2)^4),

    where a is the angle between the arc and the way from its middle to the centre (the mean of all places), m and e are
    bells of height 1 and standard deviation 2 h around 8 h and 17 h, and w is 1 on secondary streets and larger ones,
    0.5 on tertiary ones and 0 on others. So large streets jam towards the centre in the morning and away from it in
    the evening, and small ones never do.
    """
    inwards = (1 + _cosines(network)) / 2
    jams = _bell(hour, MORNING) * inwards**NARROWNESS + _bell(hour, EVENING) * (1 - inwards) ** NARROWNESS
    weights = np.array([JAMMED.get(name, 0.0) for name in CLASS_NAMES])
    return network.free_flow * (1 + JAM * weights[network.kinds] * jams)


def _bell(hour: float, middle: float) -> float:
    return float(np.exp(-(((hour - middle) / SPREAD) ** 2) / 2))


def _cosines(network: Network) -> Float64[np.ndarray, " A"]:
    """Of the angle between each arc and the way to the centre; 0 where either has no direction."""
    begin, end = network.points[network.tails], network.points[network.heads]
    along, inwards = end - begin, network.points[network.places].mean(0) - (begin + end) / 2
    lengths = np.linalg.norm(along, axis=-1) * np.linalg.norm(inwards, axis=-1)
    return (along * inwards).sum(-1) / np.where(lengths > 0, lengths, 1.0)
