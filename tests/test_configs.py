"""Every section of configs.yaml, as it stands and under the overlay `debug`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import config
import launch
from config import Config
from dreamer import Dreamer
from envs.vector import RoutingVectorEnv
from guard import Guard
from launch import make_task
from networks import MaskedActor, TSPPointerActor
from replay import Replay

CPU = torch.device("cpu")
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")
SECTIONS = list(YAML(typ="safe", pure=True).load(CONFIG_PATH))
NAMED = [name for name in SECTIONS if name not in ("defaults", "debug")]

# What decides the cost of an update and nothing else.
TINY: dict[str, Any] = {"envs": 2, "batch_size": 2}


def section(*names: str, **changes: Any) -> Config:
    return config.load(CONFIG_PATH, [name for name in names if name != "defaults"], {}).replace(**changes)


def act_and_update(chosen: Config) -> tuple[Dreamer, dict[str, torch.Tensor]]:
    """One greedy and one sampled action, then one update on a replay of random tours."""
    task, guard = make_task(chosen), Guard(CPU)
    generators = launch.make_generators(0, CPU)
    agent = Dreamer(task, chosen, device=CPU, generators=generators, guard=guard)
    assert task.rules is not None
    env = RoutingVectorEnv(
        task.rules,
        num_envs=chosen.envs,
        num_nodes=chosen.nodes,
        device=CPU,
        generator=generators["environment"],
        check_actions=True,
    )
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()} | {"action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=chosen.envs, capacity=chosen.replay_capacity, device=CPU)
    reward, ended = torch.zeros(chosen.envs), torch.zeros(chosen.envs, dtype=torch.bool)
    state = agent.initial_state(chosen.envs)
    for step in range(agent.batch_length):
        if step < 2:
            generator = generators["acting"] if step else None
            action, state = agent.act(
                obs, state, is_first=info["is_first"], any_first=info["any_first"], generator=generator
            )
        else:
            action = torch.multinomial(obs["action_mask"].float(), 1)[:, 0]
        flags = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **flags, "action": action, "reward": reward})
        obs, reward, ended, _, info = env.step(action)
    metrics = agent.update(replay, progress=0.5)
    assert guard.report() is None
    return agent, metrics


@pytest.mark.parametrize("name", SECTIONS)
def test_section_acts_and_updates(name: str):
    chosen = section(name, **TINY)
    agent, metrics = act_and_update(chosen)
    assert all(metric.isfinite() for metric in metrics.values())
    assert {"model_loss", "actor_loss", "critic_loss"} <= metrics.keys()
    assert metrics["miss_rate"] == 0
    assert agent.updates == 1


@pytest.mark.parametrize("name", NAMED)
def test_debug_overlays_every_section(name: str):
    chosen = section(name, "debug")
    assert (chosen.nodes, chosen.envs) == (6, 4)
    _, metrics = act_and_update(chosen)
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize("names", [[name] for name in SECTIONS] + [[name, "debug"] for name in NAMED], ids="+".join)
def test_section_keeps_within_the_loops_ranges_and_prefills_whole_episodes(names: list[str]):
    chosen = section(*names)
    config.validate_ranges(chosen, launch.RANGES)
    config.validate_choices(chosen, launch.CHOICES)
    launch._require_episodes(chosen, chosen.nodes + 1)
    assert chosen.prefill < chosen.steps, "a run that ends before its first update"


@pytest.mark.parametrize(
    ("actor_type", "expected"), [("tsp_pointer", TSPPointerActor), ("masked", MaskedActor), ("mlp", MaskedActor)]
)
def test_every_actor_type_acts_and_updates(actor_type: str, expected: type):
    agent, metrics = act_and_update(section("debug", **{"actor.type": actor_type}))
    assert type(agent.behavior.actor) is expected
    assert metrics["miss_rate"] == 0


@pytest.mark.parametrize("baseline", ["critic", "leave_one_out"])
@pytest.mark.parametrize("scaling", ["percentile", "mean_abs", "none"])
def test_every_baseline_goes_with_every_scaling(baseline: str, scaling: str):
    _, metrics = act_and_update(section("debug", baseline=baseline, **{"actor.advantage_scale": scaling}))
    assert all(metric.isfinite() for metric in metrics.values())
