from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401
from envs.longitudinal import EPISODE_STEPS, LongitudinalEnv, Plant, acceleration

CAR = Plant(mass=1000.0, power=100e3, force=5000.0, drag=0.6, rolling=0.01, brake=10e3, lag=0.2)


def started(seed: int = 0, **arguments: Any) -> LongitudinalEnv:
    env = LongitudinalEnv(**arguments)
    env.reset(seed=seed)
    return env


def drive(env: LongitudinalEnv, command: float) -> float:
    """The return of an episode with one command all along."""
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(np.full(env.action_space.shape, command))
        total, over = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("horizon", [1, 10])
def test_longitudinal_passes_gymnasiums_own_check(horizon: int):
    with warnings.catch_warnings():
        # It can only try render modes of what `make` made.
        warnings.filterwarnings("ignore", message=".*Not able to test alternative render modes.*")
        check_env(LongitudinalEnv(horizon=horizon))


def test_longitudinal_is_registered():
    assert isinstance(gymnasium.make("Longitudinal-v0").unwrapped, LongitudinalEnv)


@pytest.mark.parametrize(
    ("command", "speed", "expected"),
    [
        # 0.5 x 5000 N, less 36 N of drag, over 1000 kg, less 0.01 g.
        (0.5, 10.0, 2.464 - 0.0981),
        # At 40 m/s the motor's 100 kW are 2500 N; drag is 576 N.
        (1.0, 40.0, 1.924 - 0.0981),
        (-1.0, 10.0, -10.036 - 0.0981),
        (0.0, 0.0, -0.0981),
    ],
)
def test_acceleration_of_a_car_computed_by_hand(command: float, speed: float, expected: float):
    assert acceleration(CAR, command, speed) == pytest.approx(expected)


def test_reward_is_the_squared_error_and_jerk():
    env = started()
    env.step(np.array([0.3]))
    before = env.ride
    _, reward, *_ = env.step(np.array([-0.2]))
    after = env.ride
    felt = (after.speed - before.speed) / 0.1
    jerk = (felt - before.acceleration) / 0.1
    assert reward == pytest.approx(-(10 * (after.reference[2] - after.speed) ** 2 + jerk**2))


def test_one_step_computed_by_hand():
    """With the car above at 10 m/s, its actuator at rest, on a slope of 0.05 rad."""
    env = started()
    env._ride = env.ride._replace(plant=list(CAR), speed=10.0, grade=[0.05] * 513, reference=[12.0] * 600)
    _, reward, *_ = env.step(np.array([1.0]))
    # The actuator closes 1 - exp(-0.1 s / 0.2 s) = 0.39347 of the gap: 1967.3 N, less 36 N of drag, over 1000 kg; less
    # 0.01 g of rolling resistance and g sin(0.05) = 0.49030 of gravity.
    felt = 1.96735 - 0.036 - 0.0981 - 0.49030
    assert env.ride.actuator == pytest.approx(0.393469, abs=1e-5)
    assert env.ride.speed == pytest.approx(10 + 0.1 * felt, abs=1e-4)
    assert reward == pytest.approx(-(10 * (2 - 0.1 * felt) ** 2 + (10 * felt) ** 2), abs=1e-2)


def test_observation_is_of_the_ride_entry_by_entry():
    env = started()
    seen = []
    for command in (0.5, -0.25, 0.75):
        obs, *_ = env.step(np.array([command]))
        seen.append(env.ride.measured[-1])
    ride, now = env.ride, seen[-1]
    expected = [speed / 20 for speed in reversed(seen)]
    expected += [0.75, (ride.reference[3] - now) / 5, ride.grade[3] / 0.05]
    expected += [(ride.reference[3 + ahead] - now) / 5 for ahead in (3, 6, 9, 12, 15, 18, 21, 24, 27, 30)]
    assert obs.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(seen)) == 3 and ride.grade[3] != 0


def test_speeds_are_measured_with_noise():
    env = started()
    errors = []
    for _ in range(EPISODE_STEPS):
        env.step(np.array([0.3]))
        errors.append(env.ride.measured[-1] - env.ride.speed)
    assert np.mean(errors) == pytest.approx(0, abs=0.01) and np.std(errors) == pytest.approx(0.05, rel=0.15)


def test_every_episode_has_another_vehicle_road_and_reference():
    env = started()
    rides = [env.ride]
    for _ in range(20):
        env.reset()
        rides.append(env.ride)
    for entry in zip(*(ride.plant for ride in rides), strict=True):
        assert len(set(entry)) == len(rides)
    assert len({ride.reference[0] for ride in rides}) == len({ride.grade[0] for ride in rides}) == len(rides)
    steepest = [max(map(abs, ride.grade)) for ride in rides]
    assert 0.03 < max(steepest) <= 0.06


def test_an_idle_vehicle_is_hundreds_of_thousands_below_zero_and_a_follower_is_not():
    idle = np.mean([drive(started(seed), 0.0) for seed in range(6)])
    assert -1e6 < idle < -1e5

    def follow(seed: int) -> float:
        env = LongitudinalEnv()
        (obs, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            obs, reward, _, over, _ = env.step(np.clip([1.7 * obs[7] + 0.1], -1, 1))
            total += reward
        return total

    assert np.mean([follow(seed) for seed in range(6)]) > -5e3


def test_a_bad_driver_reaches_millions_below_zero():
    assert np.mean([drive(started(seed), 1.0) for seed in range(4)]) < -2e6


def test_episode_is_truncated_after_512_steps_and_refuses_more():
    env = started()
    for step in range(1, EPISODE_STEPS + 1):
        _, _, terminated, truncated, _ = env.step(np.zeros(1))
        assert not terminated and truncated == (step == 512)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(1))


def test_horizon_executes_the_first_action_of_a_plan():
    plan, single = started(horizon=10), started()
    first = plan.step(np.array([0.7] + [-1.0] * 9))
    assert first[1] == single.step(np.array([0.7]))[1]


def test_response_is_what_the_vehicle_does_on_level_ground():
    env = started()
    for _ in range(50):
        before = env.ride
        *_, info = env.step(np.array([0.4]))
        command, speed, response = info["response"]
        assert command == env.ride.actuator and abs(speed - before.speed) < 0.3
        # Five standard deviations of the sensor.
        assert response == pytest.approx(float(acceleration(Plant(*before.plant), command, before.speed)), abs=0.25)


def test_response_is_missing_at_rest():
    env = started()
    for _ in range(120):
        *_, info = env.step(np.array([-1.0]))
    assert env.ride.speed == 0 and "response" not in info


def test_resumed_ride_goes_on_exactly():
    env, other = started(3), LongitudinalEnv()
    for _ in range(20):
        env.step(np.array([0.5]))
    other.reset(seed=9)
    other.load_state_dict(env.state_dict())
    for _ in range(5):
        mine, theirs = env.step(np.array([0.1])), other.step(np.array([0.1]))
        assert np.array_equal(mine[0], theirs[0]) and mine[1:] == theirs[1:]


@pytest.mark.parametrize("action", [np.zeros(2), np.array([np.nan])])
def test_step_refuses_what_is_no_action(action: np.ndarray):
    with pytest.raises(ValueError, match="should be 1 finite numbers in"):
        started().step(action)


def test_reset_refuses_options_and_a_plan_of_nothing():
    with pytest.raises(ValueError, match="reset\\(\\) has no options, got \\['plant'\\]"):
        LongitudinalEnv().reset(options={"plant": 1})
    with pytest.raises(ValueError, match="horizon is 0"):
        LongitudinalEnv(horizon=0)
