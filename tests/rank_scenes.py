"""Agents that learn on several ranks, each in a process of its own, or on one that is fed all of their rows and noise.

`python -m tests.rank_scenes FOLDER UPDATES CASE ...` is a rank, in the environment that torchrun gives it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import config
from config import Config
from dreamer import Dreamer
from envs.tasks import ACTION_MASK
from guard import Guard
from parts.acting import random_actions
from sac import SAC
from system.ranks import apart, here, joined
from training import devices, setup
from training.replay import Replay

CPU = torch.device("cpu")
SINGLE = torch.float32
ROOT = Path(__file__).resolve().parents[1]
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")
# No other dimension of a tensor is a multiple of a rank's share of the batch.
SHARE, RANKS, UPDATES = 11, 2, 100
ENVS, NODES = 6, 5
# The update in which the second rank meets a reward that is not finite, in cases that have one.
BROKEN_AT = 10

CASES: dict[str, tuple[type[Dreamer] | type[SAC], list[str], dict[str, Any]]] = {
    # With a share of 1, the critic learns from the same instances whoever has which.
    "routing": (Dreamer, ["debug"], {"task": "cvrp", "nodes": NODES, "imag_first": "stored", "critic.share": 1.0}),
    "observed": (
        Dreamer,
        ["debug"],
        {
            "task": "gym_CartPole-v1",
            "baseline": "critic",
            "replay_context": False,
            "batch_length": 6,
            "optimizer.algorithm": "adam",
        },
    ),
    "routing_sac": (SAC, ["sac", "tsp_sac", "debug"], {"task": "cvrp", "nodes": NODES, "sac.units": 16}),
    "continuous_sac": (SAC, ["sac", "sac_pendulum", "debug"], {"sac.units": 16}),
}


def make_config(case: str) -> Config:
    _, sections, changes = CASES[case.removeprefix("broken_")]
    family = ["gym"] if changes.get("task", "").startswith("gym_") else []
    loaded = config.load(CONFIG_PATH, [*family, *sections], {"task": changes["task"]} if "task" in changes else {})
    return loaded.replace(**changes, envs=ENVS, batch_size=SHARE * RANKS)


def make_replay(settings: Config, made: setup.Setup) -> Replay:
    """What a random agent has lived through, in double precision where that is possible."""
    env = made.make_env(devices.make_generators(0, CPU))
    replay = Replay(made.task.stored(env), num_envs=ENVS, capacity=ENVS * 60, device=CPU)
    noise = torch.Generator(CPU).manual_seed(7)
    obs, _ = env.reset()
    yes = torch.ones(ENVS, dtype=torch.bool)
    flags = {"reward": torch.zeros(ENVS), "is_first": yes, "is_last": ~yes, "is_terminal": ~yes}
    for _ in range(60):
        spec = made.task.actions
        action = random_actions(spec, torch.rand((ENVS, *spec.shape), generator=noise), obs.get(ACTION_MASK))
        replay.add({**obs, **flags, "action": action})
        obs, reward, terminated, truncated, info = env.step(action)
        last = terminated | truncated
        flags = {"reward": reward, "is_first": info["is_first"], "is_last": last, "is_terminal": terminated}
    env.close()
    return replay


class SharedReplay:
    """Batches of all ranks, of which each gets its rows."""

    def __init__(self, replay: Replay, *, case: str) -> None:
        self.replay, self.case, self.batches = replay, case, 0
        self.rewards = replay.rewards._replace(low=replay.rewards.low.double(), high=replay.rewards.high.double())

    def sample(self, batch: int, length: int, *, generator: torch.Generator, **kwargs: Any) -> dict[str, Tensor]:
        with whole_noise():
            joint = self.replay.sample(SHARE * RANKS, length, generator=generator, **kwargs)
        rows = slice(here().index * batch, (here().index + 1) * batch)
        mine = {name: value[rows] for name, value in joint.items()}
        mine = {name: value.double() if value.is_floating_point() else value for name, value in mine.items()}
        self.batches += 1
        if self.case.startswith("broken_") and self.batches == BROKEN_AT and here().index == 1:
            mine["reward"] = mine["reward"].index_fill(0, torch.tensor([0]), torch.nan)
        return mine


class Adam(torch.optim.Adam):
    """PyTorch's, which takes its flag in single precision, whatever the parameters are."""

    def step(self, closure: Any = None) -> Any:
        self.found_inf = self.found_inf.to(SINGLE)  # type: ignore[has-type]
        return super().step(closure)


_rand, _randn = torch.rand, torch.randn
_whole = False


@contextlib.contextmanager
def whole_noise() -> Iterator[None]:
    """Within this, noise is as it was asked for."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def shared_noise(draw: Any) -> Any:
    """A function that draws noise: what all ranks would draw together, and of that this rank's rows."""

    def drawn(*sizes: Any, **options: Any) -> Tensor:
        shape = sizes if isinstance(sizes[0], int) else sizes[0]
        dims = [dim for dim, size in enumerate(shape) if size and size % SHARE == 0]
        if _whole or not dims or here().count == 1:
            return draw(shape, **options)
        (dim,) = dims
        joint = draw([size * here().count if at == dim else size for at, size in enumerate(shape)], **options)
        return joint.narrow(dim, here().index * shape[dim], shape[dim])

    return drawn


def learn(case: str, updates: int = UPDATES) -> dict[str, Any]:
    """The agent's state after some updates on the batches that this rank gets, and how they went."""
    settings = make_config(case)
    # All have lived through the same.
    with apart():
        made = setup.make_setup(settings, CPU)
        replay = SharedReplay(make_replay(settings, made), case=case)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    before, adam = torch.Tensor.float, torch.optim.Adam
    torch.float32 = torch.float64  # type: ignore[misc]
    torch.optim.Adam = Adam  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    torch.manual_seed(0)
    # All ranks draw the same numbers, and take their rows of them.
    generators = {name: torch.Generator(CPU).manual_seed(seed) for seed, name in enumerate(devices.ROLES)}
    guard = Guard(CPU)
    make_agent = CASES[case.removeprefix("broken_")][0]
    own = settings.replace(batch_size=here().share(SHARE * RANKS, "batch_size"))
    try:
        agent = make_agent.of(made.task, own, device=CPU, generators=generators, guard=guard)
        torch.rand, torch.randn = shared_noise(_rand), shared_noise(_randn)  # type: ignore[assignment]
        for number in range(updates):
            agent.update(replay, progress=number / updates)  # type: ignore[arg-type]
        skips = {name: each.skips for name, each in agent.learner.optimizers.items()}
        return {"agent": agent.state_dict(), "skips": skips, "notices": list(guard.notices)}
    finally:
        torch.Tensor.float, torch.optim.Adam = before, adam  # type: ignore[method-assign, misc]
        torch.rand, torch.randn = _rand, _randn
        torch.float32 = SINGLE  # type: ignore[misc]
        torch.set_default_dtype(SINGLE)


def on_ranks(arguments: list[str], folder: Path, *, count: int = RANKS) -> list[subprocess.Popen[str]]:
    """Start a Python program as several ranks, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
        with (folder / f"rank{rank}.txt").open("a") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
                    stderr=log,
                    stdout=log,
                    text=True,
                )
            )
    return ranks


def main(folder: str, updates: str, *cases: str) -> None:
    with joined() as ranks:
        found = {case: learn(case, int(updates)) for case in cases}
    checkpoint.save(Path(folder) / f"rank{ranks.index}.pt", found)


if __name__ == "__main__":
    main(*sys.argv[1:])
