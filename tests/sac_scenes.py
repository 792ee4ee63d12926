"""A small SAC agent and what it has lived through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import config
import sac
from envs.tasks import ObservationTask
from guard import Guard, GuardSettings
from sac import SAC
from training import devices, setup
from training.replay import Replay

CPU = torch.device("cpu")
CONFIG_PATH = Path(sac.__file__).with_name("configs.yaml")


def pendulum_agent(**changes: Any) -> tuple[SAC, Replay]:
    """An agent with small networks, and a replay of made-up rows."""
    torch.manual_seed(0)
    settings = config.load(CONFIG_PATH, ["sac", "sac_pendulum", "debug"], {}).replace(**{"sac.units": 16, **changes})
    task = setup.make_setup(settings, CPU).task
    guard = Guard(CPU, GuardSettings(snapshot_every=2, max_skips=3))
    agent = SAC.of(task, settings, device=CPU, generators=devices.make_generators(0, CPU), guard=guard)
    assert isinstance(task, ObservationTask)
    replay = Replay(task.spaces, num_envs=2, capacity=100, device=CPU)
    no = torch.zeros(2, dtype=torch.bool)
    for step in range(40):
        flags = {"is_first": torch.full((2,), step == 0), "is_last": no, "is_terminal": no}
        row = {"observation": torch.randn(2, 3), "action": torch.rand(2, 1) * 2 - 1, "reward": torch.randn(2)}
        replay.add({**row, **flags})
    return agent, replay
