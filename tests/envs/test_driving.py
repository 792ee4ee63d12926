"""Drive-v0: its spaces and masks, what ends an episode, seeds, crashes, and pictures. SUMO runs in another process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from driving.baselines import idm
from driving.candidates import ACTIONS, FREE, MODES, STEPS
from driving.features import FEATURES
from driving.processes import SimulationCrashed
from envs.driving import DriveEnv
from envs.tasks import NOTICE
from system.errors import UserError

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def driven() -> Iterator[DriveEnv]:
    """An environment that the tests of this module share: its process starts once."""
    pytest.importorskip("libsumo")
    env = DriveEnv(maps=["ingolstadt"], render_mode="rgb_array")
    yield env
    env.close()


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all((one[name] == other[name]).all() for name in FEATURES)


def test_the_checker_of_gymnasium_is_content():
    pytest.importorskip("libsumo")
    env = gymnasium.make("Drive-v0", maps=["ingolstadt"], render_mode="rgb_array").unwrapped
    check_env(env)
    env.close()


def test_an_episode_follows_from_its_seed(driven: DriveEnv):
    def play(seed: int) -> tuple[list[dict[str, np.ndarray]], list[float]]:
        obs, _ = driven.reset(seed=seed)
        seen, earned = [obs], list[float]()
        for action in (2, 4, FREE):
            obs, reward, *_ = driven.step(action)
            seen, earned = [*seen, obs], [*earned, reward]
        return seen, earned

    first, again, other = play(0), play(0), play(1)
    assert all(same(one, two) for one, two in zip(first[0], again[0], strict=True)) and first[1] == again[1]
    assert not same(first[0][0], other[0][0])


def test_masks_agree_and_an_illegal_action_is_refused(driven: DriveEnv):
    obs, info = driven.reset(seed=2)
    mask = obs["action_mask"]
    assert (mask == info["action_mask"]).all() and (mask == driven.action_masks()).all()
    assert mask.dtype == bool and mask[:MODES].all() and mask[FREE] and not mask.all()
    illegal = int((~mask).argmax())
    for action in (illegal, -1, ACTIONS, 0.5):
        with pytest.raises(ValueError, match=f"action {action} is no candidate now; there are .*36"):
            driven.step(action)
    assert same(driven.ride.obs, obs)
    assert all(mask[driven.action_space.sample()] for _ in range(50))
    assert driven.observation_space.contains(obs)


def test_an_action_drives_its_candidate(driven: DriveEnv):
    for action in (0, 5):
        driven.reset(seed=3)
        wanted, before = driven.candidates()[action], driven.ride.car
        _, reward, *_, info = driven.step(action)
        after = driven.ride.car
        cos, sin = np.cos(before.heading), np.sin(before.heading)
        east, north = after.x - before.x, after.y - before.y
        assert cos * east + sin * north == pytest.approx(wanted[0, 0], abs=0.4)
        assert info["metres"] == pytest.approx(np.hypot(east, north), abs=0.2)
        assert reward == pytest.approx(info["metres"] / 10 - 0.1 * info["discomfort"], abs=1e-4)


def test_the_ego_is_where_it_was_driven_to(driven: DriveEnv):
    driven.reset(seed=4)
    trajectory = np.stack((4.0 * np.arange(1, STEPS + 1), np.zeros(STEPS), np.zeros(STEPS)), 1)
    obs, *_ = driven.drive(trajectory)
    now = driven.ride.frames[-1].agents
    row = int(np.searchsorted(now["id"], driven.ride.agent))
    assert (now["x"][row], now["y"][row]) == pytest.approx((driven.ride.car.x, driven.ride.car.y), abs=1e-3)
    assert obs["ego"][0] == pytest.approx(driven.ride.car.speed, abs=1e-4)


def test_leaving_the_road_ends_an_episode(driven: DriveEnv):
    driven.reset(seed=5)
    away = np.stack((5.0 * np.arange(1, STEPS + 1), 6.0 * np.arange(1, STEPS + 1), np.full(STEPS, 0.9)), 1)
    for _ in range(20):
        _, reward, terminated, truncated, info = driven.drive(away)
        if terminated or truncated:
            break
    assert terminated and not truncated and info["end"] in ("off_road", "contact") and reward < -4
    with pytest.raises(ResetNeeded, match="the episode is over"):
        driven.step(FREE)
    driven.reset(seed=5)


def test_an_episode_is_truncated_after_20_seconds_or_at_the_end_of_the_map(driven: DriveEnv):
    ends = set()
    for seed in range(20, 24):
        obs, _ = driven.reset(seed=seed)
        steps, end, truncated = 0, "", False
        while not end:
            obs, _, terminated, truncated, info = driven.drive(idm(obs))
            steps, end = steps + 1, info["end"]
            assert (terminated or truncated) == bool(end) and terminated == (end in ("contact", "off_road"))
        assert steps <= 40 and (steps == 40) == (end == "time") and info["metres"] > 1
        ends.add(end)
    assert "time" in ends


def test_the_own_driver_of_the_simulator_can_be_measured(driven: DriveEnv, monkeypatch: pytest.MonkeyPatch):
    def play(seed: int) -> tuple[dict[str, np.ndarray], float]:
        obs, _ = driven.reset(seed=seed)
        return obs, [driven.step(FREE)[-1]["metres"] for _ in range(6)][-1]

    braked = [play(seed) for seed in range(22, 25)]
    monkeypatch.setattr(driven, "simulated_driver", True)
    left_alone = [play(seed) for seed in range(22, 25)]
    assert all(same(one, other) for (one, _), (other, _) in zip(braked, left_alone, strict=True))
    assert sum(metres for _, metres in left_alone) > sum(metres for _, metres in braked) + 10


def test_a_crashed_simulation_begins_anew(driven: DriveEnv):
    driven.reset(seed=3)
    process: Any = driven._simulation._process
    os.kill(process.pid, signal.SIGKILL)
    _, reward, terminated, truncated, info = driven.step(FREE)
    assert (reward, terminated, truncated, info["end"]) == (0.0, False, True, "crash")
    topic, line = info[NOTICE]
    assert topic == "crash" and line.startswith("SUMO has crashed, and begins anew: SUMO's process died (exit code -9)")
    obs, _ = driven.reset(seed=3)
    assert driven.observation_space.contains(obs) and driven._simulation._process is not process


def test_mistakes_and_errors_in_the_process_are_told_apart(driven: DriveEnv):
    driven.reset(seed=3)
    with pytest.raises(UserError, match="there is no map 'atlantis'"):
        driven._simulation.begin("atlantis", seed=0, start=0.0)
    with pytest.raises(SimulationCrashed, match="Traceback"):
        driven._simulation._ask("nonsense")
    with pytest.raises(SimulationCrashed, match="begin one"):
        driven._simulation.frame()


def test_a_picture_shows_roads_traffic_and_candidates(driven: DriveEnv):
    driven.reset(seed=2)
    before = driven.render()
    driven.step(5)
    after = driven.render()
    assert before is not None and after is not None and before.shape == (512, 512, 3) and before.dtype == np.uint8
    colours = {tuple(colour) for colour in before.reshape(-1, 3)[::7].tolist()}
    assert {(233, 236, 231), (178, 182, 188)} <= colours and len(colours) > 20
    red = (np.abs(after.astype(int) - [214, 64, 38]).sum(-1) < 30).sum()
    assert red > (np.abs(before.astype(int) - [214, 64, 38]).sum(-1) < 30).sum() > 50
    assert DriveEnv(maps=["ingolstadt"]).render() is None


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"maps": []}, r"maps is \[\]; a list of some of ingolstadt, braunschweig, motorway, town is needed"),
        ({"maps": "ingolstadt"}, "maps is 'ingolstadt'"),
        ({"maps": ["ingolstadt", "atlantis"]}, "atlantis"),
        ({"window": (0.5, 0.5)}, r"window is \(0.5, 0.5\); two shares"),
        ({"window": 0.8}, "window is 0.8; two shares"),
        ({"window": [0, 0.5, 1]}, "two shares"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_arguments_that_make_no_environment_are_refused(arguments: dict[str, Any], fault: str):
    with pytest.raises(UserError, match=fault):
        DriveEnv(**arguments)


def test_a_trajectory_of_another_shape_is_refused(driven: DriveEnv):
    driven.reset(seed=2)
    for trajectory in (np.zeros((STEPS, 2)), np.full((STEPS, 3), np.nan)):
        with pytest.raises(ValueError, match="a trajectory is 16 x 3 finite numbers"):
            driven.drive(trajectory)
    with pytest.raises(ValueError, match="no options"):
        driven.reset(options={"map": "town"})
    with pytest.raises(ResetNeeded, match="no episode has begun"):
        DriveEnv().action_masks()
