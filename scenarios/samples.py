"""The samples of scenarios: computed frame by frame for all egos at once, and laid out as an episode each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from driving.roads import RoadMap
from driving.scene import Log
from scenarios.parts import Part, Scene
from scenarios.scenario import Scenario

# Flags of the rows of an episode, as files of episodes have them (docs/offline.md).
FLAGS = ("is_first", "is_last", "is_terminal")

Samples = dict[str, np.ndarray]


class Computed(NamedTuple):
    """What has come of a scenario.

    Attributes:
        scenario: which, with as many rows as there are samples of; it ends where the ego's drive would be over.
        samples: by name, with an axis of rows in front.
        fault: why they cannot be used; empty where they can.
    """

    scenario: Scenario
    samples: Samples
    fault: str


def compute(log: Log, road_map: RoadMap, scenarios: Sequence[Scenario], parts: Sequence[Part]) -> Iterator[Computed]:
    """The samples of some scenarios of a log, each as soon as its last frame is done.

    Args:
        log: that they are all of.
        road_map: of that log.
        scenarios: which.
        parts: that a sample consists of.
    """
    of_frame: dict[int, list[int]] = defaultdict(list)
    for index, scenario in enumerate(scenarios):
        for frame in range(scenario.frame, scenario.frame + scenario.rows):
            of_frame[frame].append(index)
    underway: dict[int, Samples] = {}
    for frame in sorted(of_frame):
        indices = of_frame[frame]
        agents = np.array([scenarios[index].agent for index in indices], np.int64)
        built = _build(Scene(log, road_map, agents, frame), parts)
        for place, index in enumerate(indices):
            scenario = scenarios[index]
            row = frame - scenario.frame
            if not row:
                underway[index] = _empty(scenario.rows, parts)
            for name, values in built.items():
                underway[index][name][row] = values[place]
            if row == scenario.rows - 1:
                samples = episode_of(underway.pop(index))
                fault = fault_of(samples)
                done = scenario if fault else scenario._replace(rows=len(samples["is_first"]))
                yield Computed(done, samples, fault)


def fault_of(samples: Mapping[str, np.ndarray]) -> str:
    """Why the samples of an episode cannot be used; empty where they can."""
    if samples["is_terminal"][0]:
        return "the ego touches another, or is off the road, from the beginning"
    for name in sorted(samples):
        values = samples[name]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name} is not finite"
    if "action" in samples and "action_mask" in samples:
        # Of the last row nothing is done.
        legal = np.take_along_axis(samples["action_mask"], samples["action"][:, None], -1)[:-1]
        if not legal.all():
            return "an action is illegal"
    return ""


def _build(scene: Scene, parts: Sequence[Part]) -> Samples:
    built: Samples = {}
    for part in parts:
        arrays = part.build(scene)
        for name, spec in part.arrays.items():
            values = arrays[name]
            expected = (len(scene.agents), *spec.shape)
            assert values.shape == expected and values.dtype == spec.dtype, (part.name, name, values.shape, expected)
            built[name] = values
    return built


def _empty(rows: int, parts: Sequence[Part]) -> Samples:
    return {name: np.empty((rows, *spec.shape), spec.dtype) for part in parts for name, spec in part.arrays.items()}


def episode_of(samples: Mapping[str, np.ndarray]) -> Samples:
    """Samples as an episode. It ends with the first row that is terminal, or else as a time limit would end it.

    What was before its first row has earned nothing in it.
    """
    terminal = samples.get("is_terminal", np.zeros(len(next(iter(samples.values()))), bool))
    count = int(terminal.argmax()) + 1 if terminal.any() else len(terminal)
    episode = {name: values[:count] for name, values in samples.items()}
    if "reward" in episode:
        episode["reward"] = np.concatenate((np.zeros(1, np.float32), episode["reward"][1:]))
    rows = np.arange(count)
    return {**episode, "is_first": rows == 0, "is_last": rows == rows[-1], "is_terminal": terminal[:count]}
