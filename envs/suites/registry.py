"""Which suite a task is of, by the prefix of its name."""

from __future__ import annotations

from envs.suites.atari import Atari
from envs.suites.bsuite import BSuite
from envs.suites.crafter import Crafter
from envs.suites.dmc import DMC
from envs.suites.memory import Memory
from envs.suites.minatar import MinAtar
from envs.suites.minigrid import MiniGrid
from envs.suites.suite import Suite

SUITES: dict[str, Suite] = {
    "atari_": Atari(),
    "bsuite_": BSuite(),
    "crafter_": Crafter(),
    "dmc_": DMC(),
    "memory_": Memory(),
    "minatar_": MinAtar(),
    "minigrid_": MiniGrid(),
}


def suite_of(task: str) -> tuple[Suite, str] | None:
    """The suite of a task, and the task's name there; None where it is of none."""
    found = [(suite, task.removeprefix(prefix)) for prefix, suite in SUITES.items() if task.startswith(prefix)]
    return found[0] if found else None
