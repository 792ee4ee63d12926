"""An environment that misbehaves in a way that its id says. Importing this module registers the ids."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

FAULT_STEP = 17


class UnprintableError(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise ValueError("no message")


class Misbehaving(gymnasium.Env):
    """Walks along, beside a set of points, until something goes wrong at step `FAULT_STEP` of an episode."""

    observation_space = spaces.Dict(
        {
            "place": spaces.Box(-math.inf, math.inf, (3,), np.float32),
            "points": spaces.Box(-math.inf, math.inf, (4, 2), np.float32),
            "points_mask": spaces.MultiBinary(4),
        }
    )
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str = "", value: float = 0.0):
        self.fault, self.value, self.steps = fault, value, 0

    def observe(self, bad: bool) -> dict[str, np.ndarray]:
        place = np.full(3, self.steps / 10, np.float32)
        if bad and self.fault == "observation":
            place[1] = self.value
        there = np.arange(4) < (0 if self.fault == "empty set" else self.steps % 5)
        points = np.where(there[:, None], np.float32(0.5), np.float32(1e30 if self.fault == "empty set" else 0.0))
        return {"place": place, "points": points.repeat(2, 1), "points_mask": there.astype(np.int8)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(bad=False), {}

    def step(self, action: int):
        self.steps += 1
        bad = self.steps == FAULT_STEP
        # The run's own process is to live on.
        worker = multiprocessing.parent_process() is not None
        if bad and self.fault == "raise":
            raise RuntimeError("the simulator has lost its licence")
        if bad and self.fault == "exit":
            sys.exit(0)
        if bad and self.fault == "unprintable":
            raise UnprintableError
        if bad and self.fault == "wander":
            os.chdir("/")
        if bad and worker and self.fault == "hang":
            time.sleep(600)
        if bad and worker and self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        reward = self.value if bad and self.fault == "reward" else float(action)
        return self.observe(bad), reward, self.steps >= 30, False, {}


FAULTS: dict[str, tuple[str, float]] = {
    "NaNSeen": ("observation", math.nan),
    "InfinitySeen": ("observation", math.inf),
    "NaNEarned": ("reward", math.nan),
    "InfinityEarned": ("reward", math.inf),
    "MillionsLost": ("reward", -2.2e6),
    "FortuneEarned": ("reward", 1e30),
    "EmptySet": ("empty set", 0.0),
    "Raises": ("raise", 0.0),
    "Exits": ("exit", 0.0),
    "SaysNothing": ("unprintable", 0.0),
    "Wanders": ("wander", 0.0),
    "Hangs": ("hang", 0.0),
    "Dies": ("die", 0.0),
}
for _name, (_fault, _value) in FAULTS.items():
    if f"{_name}-v0" not in gymnasium.registry:
        gymnasium.register(
            f"{_name}-v0",
            functools.partial(Misbehaving, _fault, _value),
            disable_env_checker=True,
            order_enforce=False,
        )
