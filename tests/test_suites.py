"""Suites of environments: every one of them plays, follows from its seed, and says what it lacks."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
from config import UserError
from envs.gym_tasks import make_gym
from envs.suites import dmc
from envs.suites.registry import SUITES
from envs.suites.suite import Suite
from settings.environment import SUITE_PREFIXES, WrapperSettings
from settings.run import RunSettings
from tests.suite_scenes import marked, require_drawing, require_packages
from tests.test_configs import CONFIG_PATH

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def made(vector_env, task, *, seed=0, num_envs=1, **settings):
    require_packages(task)
    return vector_env(make_gym(task, settings=WrapperSettings(**settings)), num_envs=num_envs, seed=seed)


def episodes(env, steps):
    """Everything that is seen and earned in so many steps of the same random actions, and the ends."""
    env.reset()
    random, seen = np.random.default_rng(0), []
    for _ in range(steps):
        if env.actions.kind == "continuous":
            action = torch.tensor(random.uniform(-1, 1, (1, *env.actions.sizes)), dtype=torch.float32)
        else:
            action = torch.tensor([random.integers(size) for size in env.actions.sizes]).view(1, *env.actions.shape)
        obs, reward, terminated, truncated, _ = env.step(action)
        seen.append(torch.cat([*(part.flatten().float() for part in obs.values()), reward, terminated, truncated]))
    return torch.stack(seen)


# Of crafter the first steps alone: which creatures appear every tenth step depends on where objects lie in memory.
STEPS = {"crafter_reward": 9, "bsuite_memory_len/9": 120}

PLAYED = {
    "dmc_walker_walk": {"height": (1,), "orientations": (14,), "velocity": (9,)},
    "atari_pong": {"observation": (224, 160, 3)},
    "crafter_reward": {"observation": (64, 64, 3)},
    "minatar_breakout": {"observation": (400,)},
    "bsuite_cartpole/0": {"observation": (6,)},
    "bsuite_memory_len/9": {"observation": (3,)},
    "minigrid_MiniGrid-MemoryS7-v0": {"direction": (1,), "image": (147,), "mission": (6,)},
    "memory_RepeatFirstEasy": {"observation": (1,)},
}


@pytest.mark.parametrize(("task", "shapes"), [marked(*played) for played in PLAYED.items()])
def test_suite_plays_and_follows_from_its_seed(task, shapes, vector_env):
    env = made(vector_env, task)
    assert {name: key.shape for name, key in env.observations.items()} == shapes
    steps = STEPS.get(task, 40)
    played = episodes(env, steps)
    assert played.isfinite().all()
    assert played.equal(episodes(made(vector_env, task), steps))
    assert not played.equal(episodes(made(vector_env, task, seed=1), steps))


def test_suites_are_all_there():
    assert tuple(SUITES) == SUITE_PREFIXES and {*PLAYED} >= {next(t for t in PLAYED if t.startswith(p)) for p in SUITES}
    extras = PYPROJECT.read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    assert [suite.EXTRA for suite in SUITES.values() if f"\n{suite.EXTRA} = [" not in extras] == []


@pytest.mark.parametrize("prefix", SUITE_PREFIXES)
def test_section_of_a_suite_lies_under_its_tasks(prefix):
    name = prefix.removesuffix("_")
    chosen = config.load(CONFIG_PATH, [], {"task": f"{prefix}any"})
    assert RunSettings.of(chosen).task.is_gym and chosen.imag_start == "replay"
    named = config.load(CONFIG_PATH, [name], {})
    assert named.task.startswith(prefix)
    assert chosen == named.replace(task=f"{prefix}any")


@pytest.mark.run(shapes=True)
def test_dmc_names_the_environment_and_ends_episodes_by_time(vector_env):
    env = made(vector_env, "dmc_cartpole_balance", repeat=500)
    assert env.name == "dmc_cartpole_balance"
    env.reset()
    ends = [env.step(torch.zeros(1, 1))[2:4] for _ in range(2)]
    assert [(terminated.item(), truncated.item()) for terminated, truncated in ends] == [(False, False), (False, True)]


def test_bsuite_terminates_where_nothing_comes_after(vector_env):
    env = made(vector_env, "bsuite_deep_sea/0")
    env.reset()
    for step in range(10):
        _, _, terminated, truncated, _ = env.step(torch.tensor([0]))
        assert (terminated.item(), truncated.item()) == (step == 9, False)


def test_bsuite_episode_follows_from_its_seed_in_wrapped_experiments_too():
    require_packages("bsuite_any")
    env: Any = make_gym("bsuite_catch_noise/3")()

    def rewards():
        env.reset(seed=3)
        return [env.step(1)[1] for _ in range(9)]

    assert rewards() == rewards() and len({*rewards()}) == 9


def test_bsuite_takes_arguments_of_the_experiment(vector_env):
    assert made(vector_env, "bsuite_deep_sea/0", kwargs="{size: 4}").observations["observation"].shape == (16,)


@pytest.mark.run(shapes=True)
def test_dmc_shows_images(vector_env):
    require_packages("dmc_any")
    require_drawing()
    env = made(vector_env, "dmc_ball_in_cup_catch", kwargs="{proprio: false, vision: true, size: [64, 48]}")
    obs, _ = env.reset()
    assert env.observations["image"].shape == (64, 48, 3) and obs["image"].float().std() > 1


@pytest.mark.parametrize(
    ("libraries", "given", "chosen"),
    [({"EGL", "OSMesa"}, None, "egl"), ({"OSMesa"}, None, "osmesa"), (set(), None, None), ({"EGL"}, "glfw", "glfw")],
)
def test_dmc_chooses_what_draws_without_a_screen(libraries, given, chosen, monkeypatch):
    monkeypatch.setattr(dmc.sys, "platform", "linux")
    monkeypatch.setattr(dmc.ctypes.util, "find_library", lambda name: name if name in libraries else None)
    monkeypatch.setenv("MUJOCO_GL", "") if given is None else monkeypatch.setenv("MUJOCO_GL", given)
    if given is None:
        monkeypatch.delenv("MUJOCO_GL")
    assert dmc.choose_gl() == chosen


def test_dmc_says_what_is_missing_to_draw(monkeypatch):
    monkeypatch.setattr(dmc, "choose_gl", lambda: None)
    monkeypatch.setattr(dmc.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match="images need EGL or OSMesa here: install libegl1 or libosmesa6"):
        dmc.DMC().make("walker_walk", vision=True)
    with pytest.raises(UserError, match="proprio: false, and nothing else is observed: add vision: true"):
        dmc.DMC().make("walker_walk", proprio=False)


def test_minigrid_tells_the_colours_and_things_of_a_mission():
    require_packages("minigrid_any")
    env: Any = make_gym("minigrid_MiniGrid-GoToObject-6x6-N2-v0")()
    mission = env.reset(seed=0)[0]["mission"]
    words = env.unwrapped.mission.split()  # such as "go to the green box"
    from minigrid.core.constants import COLOR_NAMES, OBJECT_TO_IDX

    numbers = [*sorted(COLOR_NAMES), *sorted(OBJECT_TO_IDX)]
    assert [numbers[number - 1] for number in mission[:2]] == words[-2:] and mission[2:].tolist() == [0] * 4
    without: Any = make_gym(
        "minigrid_MiniGrid-GoToObject-6x6-N2-v0", settings=WrapperSettings(kwargs="{mission: false}")
    )()
    assert without.reset(seed=0)[0].keys() == {"image", "direction"}


def test_crafter_terminates_at_death_and_truncates_at_the_end_of_time():
    require_packages("crafter_reward")
    env: Any = make_gym("crafter_reward", settings=WrapperSettings(kwargs="{length: 3}"))()
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env.reset(seed=0)
    env.unwrapped._env._player.health = 0
    assert env.step(0)[2:4] == (True, False)


def test_atari_shows_the_brighter_of_the_last_two_frames_of_four():
    require_packages("atari_pong")
    env: Any = make_gym("atari_pong", settings=WrapperSettings(kwargs="{sticky: 0.0, idle: 0, all_actions: false}"))()
    env.reset(seed=0)
    plain = env.unwrapped
    frames, step = [], plain.step

    def noted(action):
        frames.append(step(action))
        return frames[-1]

    plain.step = noted
    obs, *_ = env.step(2)
    assert len(frames) == 4
    np.testing.assert_array_equal(obs, np.maximum(frames[2][0], frames[3][0]))
    assert env.action_space.n == 6


def test_minatar_can_be_filmed():
    require_packages("minatar_breakout")
    env: Any = make_gym("minatar_breakout", render_mode="rgb_array")()
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (160, 160, 3) and len(np.unique(frame.reshape(-1, 3), axis=0)) >= 3


@pytest.mark.parametrize(
    ("task", "kwargs", "message"),
    [
        marked("dmc_walker_wolk", "", "there is no task dmc_walker_wolk; did you mean dmc_walker_walk or"),
        ("minatar_pong", "", "there is no task minatar_pong; the first is minatar_asterix"),
        marked(
            "dmc_walker_walk",
            "{a: 1}",
            "env.kwargs has a, which dmc_walker_walk does not take; it takes proprio, vision,",
        ),
        (
            "atari_pong",
            "{frames: 1}",
            "env.kwargs has .*frames 1.*; pong takes sticky from 0 to below 1, frames from 2",
        ),
        ("minatar_breakout", "{sticky: 2.0}", "env.kwargs has sticky 2.0; breakout takes a probability"),
        ("memory_RepeatFirstEasy", "{a: 1}", "env.kwargs has a, which memory_RepeatFirstEasy does not take"),
    ],
)
def test_suite_refuses_what_there_is_not_in_one_line(task, kwargs, message, vector_env):
    require_packages(task)
    with pytest.raises(UserError, match=message) as refusal:
        made(vector_env, task, kwargs=kwargs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("task", ["bsuite_catch/0", "memory_RepeatFirstEasy"])
def test_suite_refuses_to_be_filmed_where_nothing_draws(task):
    require_packages(task)
    with pytest.raises(UserError, match="it cannot be filmed"):
        make_gym(task, render_mode="rgb_array")()


@pytest.mark.parametrize("prefix", SUITE_PREFIXES)
def test_suite_says_how_to_install_what_is_missing(prefix, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    suite: Suite = SUITES[prefix]
    with pytest.raises(UserError, match="which is not installed: pip install -e ") as refusal:
        make_gym(f"{prefix}any")
    assert f'".[{suite.EXTRA}]" -c constraints.txt' in str(refusal.value)
