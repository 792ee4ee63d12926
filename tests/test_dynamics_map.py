from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from envs.dynamics_map import GRID, DynamicsMapContext, Posterior, vehicle_basis, vehicle_maps
from envs.gym_vector import GymVectorEnv
from envs.longitudinal import TOP_SPEED, LongitudinalEnv, Plant, acceleration, draw_plants

BASIS = vehicle_basis()


def vehicle(seed: int) -> Plant:
    return Plant(*(float(entry[0]) for entry in draw_plants(np.random.default_rng(seed), 1)))


def drive(posterior: Posterior, plant: Plant, count: int, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        command, speed = rng.uniform(-1, 1), rng.uniform(0, 0.6 * TOP_SPEED)
        posterior.observe(command, speed, float(acceleration(plant, command, speed)) + rng.normal(0, 0.1))


def error(posterior: Posterior, plant: Plant) -> float:
    (truth,) = vehicle_maps(Plant(*(np.array([entry]) for entry in plant)))
    return float(np.sqrt(np.square(posterior.mean_map() - truth).mean()))


def test_basis_holds_999_thousandths_of_the_variance():
    assert BASIS.explained > 0.999
    assert BASIS.mean.shape == (GRID, GRID) == (100, 100)


def test_maps_reach_to_the_speed_of_the_fastest_vehicle():
    # At full throttle and top speed every vehicle slows down: none stays beyond the grid.
    assert (vehicle_maps(draw_plants(np.random.default_rng(5), 5000))[:, -1, -1] < 0).all()


def test_basis_interpolates_exactly_on_the_grid_and_linearly_between():
    speeds = np.linspace(0, TOP_SPEED, GRID)
    mean, components = BASIS.at(-1.0, speeds[7])
    assert mean == pytest.approx(BASIS.mean[0, 7])
    np.testing.assert_allclose(components, BASIS.components[:, 0, 7], atol=1e-12)
    between, _ = BASIS.at(-1.0, (speeds[7] + speeds[8]) / 2)
    assert between == pytest.approx((BASIS.mean[0, 7] + BASIS.mean[0, 8]) / 2)
    assert BASIS.at(2.0, 1e3)[0] == pytest.approx(BASIS.mean[-1, -1])


def test_maps_of_unseen_vehicles_are_found_from_few_measurements():
    errors = []
    for seed in range(30):
        posterior, plant = Posterior(BASIS), vehicle(seed)
        row = [error(posterior, plant)]
        for count in (5, 15):
            drive(posterior, plant, count, seed=100 * seed + count)
            row.append(error(posterior, plant))
        errors.append(row)
    none, five, twenty = np.mean(errors, axis=0)
    assert none > 0.7 and five < 0.4 and twenty < 0.2


def test_posterior_without_forgetting_is_the_batch_solution():
    posterior, rng = Posterior(BASIS, std=0.3, forgetting=1.0), np.random.default_rng(1)
    rows, targets = [], []
    for _ in range(12):
        command, speed, response = rng.uniform(-1, 1), rng.uniform(0, 40), rng.normal()
        posterior.observe(command, speed, response)
        prior, components = BASIS.at(command, speed)
        rows.append(components)
        targets.append(response - prior)
    design = np.array(rows)
    covariance = np.linalg.inv(np.eye(6) + design.T @ design / 0.09)
    mean, variance = posterior.moments()
    np.testing.assert_allclose(mean, covariance @ design.T @ np.array(targets) / 0.09)
    np.testing.assert_allclose(variance, covariance.diagonal())


def test_forgetting_follows_a_vehicle_that_changes():
    posterior, other = Posterior(BASIS, forgetting=0.95), vehicle(2)
    drive(posterior, vehicle(1), 300)
    drive(posterior, other, 200)
    assert error(posterior, other) < 0.3


def test_context_is_bounded_whatever_is_measured():
    posterior = Posterior(BASIS)
    assert np.array_equal(posterior.context(), np.zeros(12))
    for _ in range(5000):
        posterior.observe(1.0, 0.0, 1e9)
    context = posterior.context()
    assert (np.abs(context) <= 1).all() and (context[6:] <= 0).all()
    assert posterior.moments()[1].min() >= posterior.lowest_variance


@pytest.mark.parametrize(("std", "forgetting"), [(0.0, 0.9), (0.1, 0.0), (0.1, 1.1)])
def test_posterior_refuses_what_makes_no_distribution(std: float, forgetting: float):
    with pytest.raises(ValueError, match="std must be positive and forgetting in"):
        Posterior(BASIS, std=std, forgetting=forgetting)


class Measured(gymnasium.Env):
    """Reports the responses it is given, in turn."""

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, *responses: tuple[float, float, float]) -> None:
        self.responses = list(responses)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 0.0, False, False, {"response": self.responses.pop(0)}


ACTION = np.zeros(1, np.float32)


def test_context_joins_the_observation_and_passes_gymnasiums_check():
    with warnings.catch_warnings():
        # The checker warns that it is given a wrapper.
        warnings.filterwarnings("ignore", message=".*(alternative render modes|different from the unwrapped).*")
        check_env(DynamicsMapContext(LongitudinalEnv()))


def test_context_begins_anew_with_each_episode():
    env = DynamicsMapContext(Measured((0.5, 10.0, 3.0)))
    first, _ = env.reset(seed=0)
    driven = env.step(ACTION)[0]
    again, _ = env.reset()
    assert driven["dynamics_map"].any() and driven["observation"].shape == (2,)
    assert np.array_equal(first["dynamics_map"], again["dynamics_map"])


@pytest.mark.parametrize("bad", [(0.5, 10.0, np.nan), (np.inf, 10.0, 1.0), (0.5, 10.0, 1e308)])
def test_measurement_that_is_not_finite_gives_a_zero_context_for_that_step(bad: tuple[float, float, float]):
    good = (0.5, 10.0, 3.0)
    env, undisturbed = DynamicsMapContext(Measured(good, bad, bad, good)), DynamicsMapContext(Measured(good, good))
    env.reset(seed=0)
    undisturbed.reset(seed=0)
    env.step(ACTION)
    for _ in range(2):
        obs, _, _, _, info = env.step(ACTION)
        assert not obs["dynamics_map"].any()
        assert info["bad_input"][0] == "response" and "no finite context follows" in info["bad_input"][1]
    assert env.bad_measurements == 2
    undisturbed.step(ACTION)
    obs, _, _, _, info = env.step(ACTION)
    assert "bad_input" not in info
    assert np.array_equal(obs["dynamics_map"], undisturbed.step(ACTION)[0]["dynamics_map"])


def test_environment_that_measures_nothing_is_told_of():
    env = DynamicsMapContext(gymnasium.make("Pendulum-v1", max_episode_steps=3))
    env.reset(seed=0)
    infos = [env.step(ACTION)[-1] for _ in range(3)]
    assert ["notice" in info for info in infos] == [False, False, True]
    assert "no step of this episode had an info['response']" in infos[-1]["notice"][1]
    # A missing response is no value that was not finite.
    assert not any("bad_input" in info for info in infos)
    driven = DynamicsMapContext(LongitudinalEnv())
    driven.reset(seed=0)
    assert not any({"bad_input", "notice"} & driven.step(ACTION)[-1].keys() for _ in range(512))


def test_vector_environment_passes_on_that_nothing_is_measured_and_counts_no_bad_input():
    env = GymVectorEnv(
        lambda: DynamicsMapContext(gymnasium.make("Pendulum-v1", max_episode_steps=2)),
        num_envs=2,
        device=torch.device("cpu"),
        seed=0,
    )
    env.reset()
    for _ in range(2):
        env.step(torch.zeros(2, 1))
    (line,) = env.notices
    assert line.startswith("environment 0 of ") and "step 2 of its episode: no step of this episode had an info" in line
    assert env.bad_inputs == {}
    env.close()


@pytest.mark.parametrize("response", [(0.5, 3.0), None, ("a", 1, 2)])
def test_response_that_is_not_three_numbers_is_refused(response: Any):
    env = DynamicsMapContext(Measured(response))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^info\['response'\] is .*; the dynamics map needs three numbers"):
        env.step(ACTION)


def test_context_refuses_a_name_that_is_taken():
    with pytest.raises(ValueError, match="hold a 'dynamics_map' already"):
        DynamicsMapContext(DynamicsMapContext(LongitudinalEnv()))
