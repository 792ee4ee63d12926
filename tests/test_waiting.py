"""An update hands its work to the device and goes on: what would make the host wait is told by the operators called."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dreamer import Dreamer
from guard import Guard
from tests.sac_scenes import pendulum_agent
from tests.scenes import CPU, NODES, debug_config, routing, routing_replay
from training.devices import make_generators

# Numbers read from tensors, and results whose shape depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")
BELIEF = {"model__belief": True, "imag_start": "rows", "imag_first": "stored"}


class Waits(TorchDispatchMode):
    """Notes where an operator is called for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if any(name in str(function) for name in WAITING):
            lines = [f"{frame.filename.rsplit('/')[-1]}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            self.found.append(f"{function} at {' < '.join(lines[:-6:-1])}")
        return function(*arguments, **(keywords or {}))


def waits_of(update: Callable[[], Any]) -> list[str]:
    update()
    with Waits() as waits:
        update()
    return waits.found


@pytest.mark.parametrize("changes", [{}, BELIEF], ids=["euclidean", "stretch"])
def test_update_of_the_dreamer_never_waits(changes: dict[str, Any]):
    task = routing("stretch" if changes else "euclidean")
    settings = debug_config(**{key.replace("__", "."): value for key, value in changes.items()})
    agent = Dreamer.of(task, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))
    replay = routing_replay(num_envs=4, columns=5 * (NODES + 1), rules=task.rules)
    assert waits_of(lambda: agent.update(replay, progress=0.1)) == []


@pytest.mark.parametrize("critic", ["mse", "symlog_disc"])
def test_update_of_sac_never_waits(critic: str):
    agent, replay = pendulum_agent(**{"sac.critic": critic})
    assert waits_of(lambda: agent.update(replay, progress=0.1)) == []


def test_waiting_is_found():
    number = torch.tensor(1.0)
    assert len(waits_of(lambda: float(number))) == 1
    assert len(waits_of(lambda: number[number > 0])) == 1
