"""Every section of configs.yaml, as it stands and under the overlay `debug`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import config
import dreamer
import grpo
import imitation.setup
import planner
import sac
from config import Config
from dreamer import Dreamer
from envs.gym_vector import GymVectorEnv
from envs.routing import RULES
from envs.tasks import RoutingTask, Task
from envs.vector import RoutingVectorEnv
from guard import Guard
from networks import MaskedActor, TSPPointerActor
from parts.acting import Sight
from sac import SAC
from settings.run import RunSettings
from tests.suite_scenes import marked, require_drawing, require_packages
from training import devices, logdirs, replay_room, setup
from training.replay import Replay

CPU = torch.device("cpu")
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")
SECTIONS = list(YAML(typ="safe", pure=True).load(CONFIG_PATH))
NAMED = [name for name in SECTIONS if name not in ("defaults", "debug")]
# Sections of the other agent, which have its base under them.
SAC_SECTIONS = [name for name in NAMED if "sac" in name.split("_")]
# Sections of a trainer that makes what it learns from, likewise.
GROUP_SECTIONS = [name for name in NAMED if name == "grpo" or name.startswith(("grpo_", "ppo_", "reinforce_"))]
# Sections of a planner that learns from logs.
PLANNER_SECTIONS = ["planner", "drive", "drive_closed_loop"]
COLLECTING = [name for name in NAMED if name not in [*GROUP_SECTIONS, *PLANNER_SECTIONS]]
# Sections whose environment is another program; tests/test_driving_dreamer.py has a run of it.
SIMULATED = ["drive_dreamer"]
# Sections that say how to play any gymnasium task, without naming one.
ANY_GYM_TASK = [name for name in NAMED if name in ("gym", "sac", "sac_conservative") or name.startswith("size")]
# Sections whose observations take long to draw, and something that draws.
DRAWN = ["dmc_vision"]
# Sections whose networks take long for one update.
LARGE = [name for name in NAMED if name.startswith("size") and name != "size1m"]

# These settings only change how long an update takes.
TINY: dict[str, Any] = {"envs": 2, "batch_size": 2}


def section(*names: str, **changes: Any) -> Config:
    task = {"task": "gym_CartPole-v1"} if set(names) & set(ANY_GYM_TASK) else {}
    if {"sac_halfcheetah", "sac_two_hot"} & set(names):
        # The one's own task needs mujoco; the other is about continuous actions.
        task = {"task": "gym_Pendulum-v1"}
    if set(names) & set(SAC_SECTIONS):
        names = ("sac", *names)
    if set(names) & set(GROUP_SECTIONS):
        names = ("grpo", *names)
    if set(names) & set(PLANNER_SECTIONS):
        names = ("planner", *names)
    return config.load(CONFIG_PATH, [name for name in names if name != "defaults"], task).replace(**changes)


def make_setup(chosen: Config, generators: dict[str, torch.Generator]) -> tuple[Task, RoutingVectorEnv | GymVectorEnv]:
    world = setup.make_setup(chosen, CPU)
    if not isinstance(world.task, RoutingTask):
        return world.task, world.make_env(generators)
    env = RoutingVectorEnv(
        world.task.rules,
        num_envs=chosen.envs,
        num_nodes=chosen.nodes,
        device=CPU,
        generator=generators["environment"],
        check_actions=True,
    )
    return world.task, env


def random_actions(task: Task, obs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    if task.actions.kind == "continuous":
        return torch.rand(count, *task.actions.sizes)
    mask = obs["action_mask"] if task.actions.masked else torch.ones(count, task.num_actions)
    return torch.multinomial(mask.float(), 1)[:, 0]


def act_and_update(chosen: Config, make_agent: Any = Dreamer) -> tuple[Any, dict[str, torch.Tensor]]:
    """One greedy and one sampled action, then one update on a replay of random actions."""
    require_packages(chosen.task)
    if "vision: true" in chosen.env.kwargs:
        require_drawing()
    guard, generators = Guard(CPU), devices.make_generators(0, CPU)
    task, env = make_setup(chosen, generators)
    agent = make_agent.of(task, chosen, device=CPU, generators=generators, guard=guard)
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    replay = Replay(
        {**spaces, "action": (task.actions.shape, task.actions.dtype)},
        num_envs=chosen.envs,
        capacity=chosen.envs * agent.batch_length,
        device=CPU,
        memory=agent.memory_spaces,
    )
    reward, terminated = torch.zeros(chosen.envs), torch.zeros(chosen.envs, dtype=torch.bool)
    truncated, state = terminated, agent.initial_state(chosen.envs)
    for step in range(agent.batch_length):
        if step < 2:
            generator = generators["acting"] if step else None
            action, state = agent.act(Sight.of(obs, info), state, generator=generator)
        else:
            action = random_actions(task, obs, chosen.envs)
        flags = {"is_first": info["is_first"], "is_last": terminated | truncated, "is_terminal": terminated}
        replay.add({**obs, **flags, "action": action, "reward": reward, **agent.memory(state)})
        obs, reward, terminated, truncated, info = env.step(action)
    metrics = agent.update(replay, progress=0.5)
    assert guard.findings() == []
    return agent, metrics


def section_names(capsys: pytest.CaptureFixture[str], program: ModuleType) -> set[str]:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    return {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()} & set(NAMED)


def test_every_section_is_for_a_program(capsys: pytest.CaptureFixture[str]):
    programs = (dreamer, sac, grpo, planner)
    of_dreamer, of_sac, of_grpo, of_planner = (section_names(capsys, program) for program in programs)
    assert of_sac - of_dreamer - of_grpo - of_planner == set(SAC_SECTIONS) - {"sac"}
    assert of_grpo - of_dreamer - of_sac - of_planner == set(GROUP_SECTIONS)
    assert of_planner - of_dreamer - of_sac - of_grpo == set(PLANNER_SECTIONS)
    assert of_sac | of_dreamer | of_grpo | of_planner | {"sac", "grpo"} == set(NAMED)


@pytest.mark.parametrize("program", [dreamer, sac, grpo, planner], ids=lambda program: program.__name__)
def test_what_only_another_program_reads_is_in_the_config(program: ModuleType):
    flat = section("defaults").flat()
    for key in program.FOREIGN_KEYS:
        assert any(f"{name}.".startswith(f"{key}.") for name in flat), key


@pytest.mark.parametrize(
    "name",
    [
        marked(name, marks=[pytest.mark.slow] if name in DRAWN else [])
        for name in SECTIONS
        if name not in [*LARGE, *SAC_SECTIONS, *GROUP_SECTIONS, *PLANNER_SECTIONS, *SIMULATED]
    ],
)
def test_section_acts_and_updates(name: str):
    chosen = section(name, **TINY)
    agent, metrics = act_and_update(chosen)
    assert all(metric.isfinite() for metric in metrics.values())
    practised = {"actor_loss", "critic_loss"}
    assert metrics.keys() & practised == (practised if chosen.imag_policy else set())
    assert "model_loss" in metrics
    assert metrics.get("miss_rate", 0) == 0
    assert agent.learner.updates == 1


@pytest.mark.parametrize("name", SAC_SECTIONS)
def test_section_of_sac_acts_and_updates(name: str):
    agent, metrics = act_and_update(section(name, **TINY), SAC)
    assert all(metric.isfinite() for metric in metrics.values())
    assert {"q_loss", "policy_loss", "alpha_loss"} <= metrics.keys()
    assert agent.learner.updates == 1


@pytest.mark.parametrize(
    "names", [[name, *extra] for name in GROUP_SECTIONS for extra in ([], ["debug"])], ids="+".join
)
def test_section_of_groups_draws_and_learns(names: list[str]):
    if "grpo_words" in names:
        pytest.importorskip("transformers")
    chosen = section(*names, **{"groups.prompts": 2})
    guard, generators = Guard(CPU), devices.make_generators(0, CPU)
    task = setup.make_setup(chosen, CPU).task
    agent = grpo.GRPO.of(task, chosen, device=CPU, generators=generators, guard=guard)
    metrics, steps = agent.practise(progress=0.5)
    assert all(metric.isfinite() for metric in metrics.values()) and int(steps) > 0
    assert guard.findings() == [] and agent.learner.updates == chosen.groups.epochs


@pytest.mark.parametrize("names", [["planner"], ["drive"], ["drive_closed_loop"], ["drive", "debug"]], ids="+".join)
def test_section_of_the_planner_has_settings_and_a_network(names: list[str]):
    chosen = section(*names)
    world, generators = imitation.setup.make_setup(chosen, CPU), devices.make_generators(0, CPU)
    agent = planner.Imitator.of(world.task, chosen, device=CPU, generators=generators, guard=Guard(CPU))
    assert RunSettings.of(chosen).loop.updates > 0 and agent.batch_size > 0


@pytest.mark.parametrize(
    "name",
    [
        marked(name, marks=[pytest.mark.slow] if name in [*DRAWN, "crafter"] else [])
        for name in COLLECTING
        if name not in SIMULATED
    ],
)
def test_debug_overlays_every_section(name: str):
    chosen = section(name, "debug")
    assert (chosen.nodes, chosen.envs) == (6, 4)
    _, metrics = act_and_update(chosen, SAC if name in SAC_SECTIONS else Dreamer)
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize(
    "names",
    [[name] for name in ["defaults", "debug", *COLLECTING]] + [[name, "debug"] for name in COLLECTING],
    ids="+".join,
)
def test_section_keeps_within_the_runs_ranges_and_prefills_what_is_sampled(names: list[str]):
    chosen = section(*names)
    settings = RunSettings.of(chosen)
    if chosen.task in RULES:
        replay_room.require_episodes(settings, RULES[chosen.task].episode_steps(chosen.nodes) + 1)
    else:
        replay_room.require_windows(settings, chosen.batch_length)
    assert chosen.prefill < chosen.steps, "a run that ends before its first update"


@pytest.mark.parametrize(("actor_type", "expected"), [("tsp_pointer", TSPPointerActor), ("masked", MaskedActor)])
def test_every_actor_type_acts_and_updates(actor_type: str, expected: type):
    agent, metrics = act_and_update(section("debug", **{"actor.type": actor_type}))
    assert type(agent.behavior.actor) is expected
    assert metrics["miss_rate"] == 0


@pytest.mark.parametrize("baseline", ["critic", "leave_one_out"])
@pytest.mark.parametrize("scaling", ["percentile", "mean_abs", "none"])
def test_every_baseline_goes_with_every_scaling(baseline: str, scaling: str):
    _, metrics = act_and_update(section("debug", baseline=baseline, **{"actor.advantage_scale": scaling}))
    assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize(
    ("program", "base", "argv", "name"),
    [
        ("dreamer.py", [], [], "tsp-seed0"),
        ("dreamer.py", [], ["--configs=tsp_attn", "--seed", "2"], "tsp_attn-seed2"),
        ("dreamer.py", [], ["--configs", "tsp_few_steps", "tsp_river"], "tsp_few_steps-tsp_river-seed0"),
        ("dreamer.py", [], ["--task", "gym_ALE/Pong-v5"], "gym_ALE_Pong-v5-seed0"),
        ("sac.py", ["sac"], ["--task", "gym_Pendulum-v1"], "sac-gym_Pendulum-v1-seed0"),
        ("sac.py", ["sac"], ["--configs", "sac_pendulum"], "sac_pendulum-seed0"),
    ],
)
def test_run_is_named_after_its_sections_or_its_task(program: str, base: list[str], argv: list[str], name: str):
    command = config.parse_command_line(argv, config_path=CONFIG_PATH, description="", entry_keys={}, base=base)
    assert logdirs.default_logdir(program, command) == Path("logdir") / name
