"""Evaluations in gymnasium environments: which episodes are played, and what is told of them."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import config
from dreamer import Dreamer
from envs import workers
from envs.crashes import EnvironmentCrashed, Restarts
from envs.gym_tasks import make_gym
from envs.gym_vector import TRAINING, GymVectorEnv, _seed_of
from guard import Guard
from routing.instances import TEST_SEED
from tests.scenes import random_states
from tests.scripted import CPU, THREE, Scripted, ScriptedAgent, factory, gym_evaluator, report_of, vector_env
from training import devices, episodes, setup
from training.agent import Agent
from training.episodes import play


def test_scripted_agent_is_an_agent():
    assert isinstance(ScriptedAgent(), Agent)


def test_play_counts_one_episode_for_each_row():
    make, made = factory(*THREE)
    episodes = play(ScriptedAgent(), vector_env(make))
    # Rows 0 and 1 went on with further episodes, which do not count, until row 2 had ended.
    assert [len(env.seeds) for env in made] == [2, 3, 1]
    assert episodes.returns.tolist() == [4.0, 20.0, 3.5]
    assert episodes.lengths.tolist() == [4, 2, 7]


def test_play_tells_after_each_step_which_episodes_still_run():
    make, _ = factory(*THREE)
    playing: list[dict[int, int]] = []
    play(ScriptedAgent(), vector_env(make), after_step=playing.append)
    assert [sum(row in still for still in playing) for row in range(3)] == [4, 2, 7]
    assert playing[0] == {0: 0, 1: 1, 2: 2} and playing[-1] == {2: 2}


@pytest.mark.parametrize("order", [THREE, THREE[::-1]], ids=["first ends early", "first ends last"])
def test_play_records_the_first_episode_aligned(order: tuple[dict[str, Any], ...]):
    make, _ = factory(*order)
    first = play(ScriptedAgent(), vector_env(make)).first
    length = order[0]["length"]
    assert first.keys() == {"observation", "prev_action", "is_first"}
    time, last_action = first["observation"].unbind(-1)
    assert time.tolist() == [list(range(length))]
    assert first["is_first"].tolist() == [[True] + [False] * (length - 1)]
    # The environment shows the action that led to what it shows; the first row has none.
    assert first["prev_action"][:, 1:].tolist() == last_action[:, 1:].tolist() == [[10 * t for t in range(length - 1)]]
    assert first["prev_action"].dtype == torch.int64 and first["prev_action"][0, 0] == 0


def test_play_counts_an_endless_episode_as_it_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(episodes, "LONGEST_EPISODE", 5)
    make, _ = factory({"length": 1000}, {"length": 2})
    played = play(ScriptedAgent(), vector_env(make, 2))
    assert played.lengths.tolist() == [5, 2]
    assert played.first["is_first"].shape == (1, 5)


def test_gym_evaluator_reports_mean_length_interval_and_range():
    make, made = factory(*THREE)
    evaluator = gym_evaluator(make)
    report = evaluator.validate(ScriptedAgent())
    # Returns 4, 20 and 3.5: mean 55/6, standard deviation 9.3853, whence 1.96 * 9.3853 / sqrt(3) = 10.62.
    assert report.values == pytest.approx({"return": 55 / 6, "length": 13 / 3})
    assert report.summary == "3 episodes, mean return 9.167 +- 11 (95 %), from 3.5 to 20"
    assert report.pictures == {}
    assert all(env.closed for env in made)
    assert report_of(evaluator).summary.startswith("6 episodes, ")


def test_gym_evaluator_has_no_interval_of_one_episode():
    report = report_of(gym_evaluator(factory(THREE[0])[0], eval_episodes=1))
    assert report.summary == "1 episodes, mean return 4, from 4 to 4"


class Failing(Scripted):
    """In the last step of its episode it crashes, or gives nothing but NaN."""

    def __init__(self, *, crash: bool, length: int) -> None:
        super().__init__(length=length)
        self.crash = crash

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated and self.crash:
            raise RuntimeError("the simulator is gone")
        if terminated:
            return np.full(2, np.nan, np.float32), np.nan, terminated, truncated, info
        return obs, reward, terminated, truncated, info


def failing(*arguments: tuple[bool, int]) -> Callable[[], Failing]:
    rows = itertools.cycle(arguments)

    def make() -> Failing:
        crash, length = next(rows)
        return Failing(crash=crash, length=length)

    return make


def test_gym_evaluator_tells_of_environments_that_crash_every_time():
    report = gym_evaluator(failing((True, 1)), valid_episodes=5).validate(ScriptedAgent())
    assert report.summary == "5 episodes, mean return 0 +- 0 (95 %), from 0 to 0; 5 cut short by crashes"
    assert report.values == {"return": 0, "length": 1, "restarts": 5}
    *crashes, more = report.notices
    assert [line.split(":")[0] for line in crashes] == [
        f"environment {row} of Failing, step 1 of its episode" for row in range(3)
    ]
    assert more == "and 2 more like these" and len(report.crashes) == 5


@pytest.mark.parametrize("remedy", ["zero_keys", "drop_keys"])
def test_gym_evaluator_tells_of_numbers_that_were_not_finite(remedy: str):
    report = report_of(gym_evaluator(failing((False, 9), (False, 3)), eval_episodes=2, **{remedy: ".*"}))
    assert report.values == {"return": 5, "length": 6, "bad_inputs": 2}
    assert report.summary.endswith("from 2 to 8; 2 with numbers that were not finite")
    assert len(report.notices) == 2 and "'observation' has 2 of 2 entries that are NaN" in report.notices[0]


def test_gym_evaluator_counts_faults_of_the_episodes_that_count_only():
    # The second environment goes on, with bad numbers, until the first has ended.
    class Later(Failing):
        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return super().step(action) if len(self.seeds) > 1 else Scripted.step(self, action)

    lengths = itertools.cycle([6, 2])
    evaluator = gym_evaluator(lambda: Later(crash=False, length=next(lengths)), valid_episodes=2, zero_keys=".*")
    report = evaluator.validate(ScriptedAgent())
    assert report.values == {"return": 4, "length": 4}


def test_gym_evaluator_plays_the_same_episodes_each_time_and_others_in_the_test():
    make, made = factory({})
    evaluator = gym_evaluator(make)
    for evaluate in (evaluator.validate, evaluator.validate, evaluator.test):
        evaluate(ScriptedAgent())
    seeds = [env.seeds[0] for env in made]
    one, again, test = seeds[:3], seeds[3:6], seeds[6:]
    assert one == again and len(test) == 6
    assert len(set(one) | set(test)) == 9


def test_gym_evaluator_gives_the_same_report_twice_and_draws_nothing():
    settings = config.load(Path(config.__file__).with_name("configs.yaml"), ["debug"], {"task": "gym_Switches-v0"})
    made, generators = setup.make_setup(settings, CPU), devices.make_generators(0, CPU)
    agent = Dreamer.of(made.task, settings, device=CPU, generators=generators, guard=Guard("cpu"))
    evaluator = gym_evaluator(make_gym(settings.task))
    before = random_states(generators)
    one, other = evaluator.validate(agent), evaluator.validate(agent)
    assert random_states(generators) == before
    assert one == other
    assert one.values["length"] == 6 and one.values["return"] != report_of(evaluator, agent).values["return"]


class Telling(Scripted):
    """Lasts as long, and earns as much, as its seed says."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        obs, info = super().reset(seed=seed)
        self.length, self.reward = 1 + int(self.np_random.integers(9)), self.np_random.random()
        return obs, info


def count_at_once() -> tuple[Callable[[], Telling], list[int]]:
    """What makes a `Telling`, and how many were open after each was made."""
    made: list[Telling] = []
    open_at_once: list[int] = []

    def make() -> Telling:
        made.append(Telling())
        open_at_once.append(sum(not env.closed for env in made))
        return made[-1]

    return make, open_at_once


@pytest.mark.parametrize("processes", [False, True])
def test_gym_evaluator_plays_the_same_episodes_in_few_environments(processes: bool):
    alone = GymVectorEnv(Telling, num_envs=7, device=CPU, seed=TEST_SEED, evaluation=True)
    expected = play(ScriptedAgent(), alone)
    few = GymVectorEnv(Telling, num_envs=2, device=CPU, seed=TEST_SEED, evaluation=True, processes=processes)
    found = play(ScriptedAgent(), few, episodes=7)
    few.close()
    assert torch.equal(found.returns, expected.returns) and torch.equal(found.lengths, expected.lengths)
    assert len(set(found.returns.tolist())) == 7
    assert found.first.keys() == expected.first.keys()
    assert all(torch.equal(value, expected.first[name]) for name, value in found.first.items())


def test_gym_evaluator_makes_no_more_environments_than_the_config_has():
    make, open_at_once = count_at_once()
    evaluator = gym_evaluator(make, most_envs=2)
    assert report_of(evaluator).summary.startswith("6 episodes, ")
    assert open_at_once == [1, 2]


def test_gym_evaluator_obeys_processes_and_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "FIRST_ANSWER", 60)

    class Hanging(Scripted):
        def step(self, action: int) -> Any:
            assert multiprocessing.parent_process() is not None
            time.sleep(600)

    evaluator = gym_evaluator(Hanging, processes=True, timeout=0.5, restarts=Restarts(), valid_episodes=1)
    with pytest.raises(EnvironmentCrashed, match=r"step 1 of its episode: .* did not answer within"):
        evaluator.validate(ScriptedAgent())


def test_gym_evaluator_ends_with_a_crash_that_may_not_be_restarted():
    budget = Restarts(allowed=1)
    evaluator = gym_evaluator(failing((True, 1)), valid_episodes=1, restarts=budget)
    assert evaluator.validate(ScriptedAgent()).values["restarts"] == 1
    with pytest.raises(EnvironmentCrashed, match="the simulator is gone"):
        evaluator.validate(ScriptedAgent())
    assert budget.used == 1


def test_gym_evaluator_says_that_it_cuts_an_episode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(episodes, "LONGEST_EPISODE", 5)
    lengths = itertools.cycle([1000, 5, 3])
    report = gym_evaluator(lambda: Scripted(length=next(lengths)), most_envs=3).validate(ScriptedAgent())
    assert report.values == {"return": pytest.approx(13 / 3), "length": pytest.approx(13 / 3), "cut": 1}
    assert report.summary.endswith("; 1 cut at 5 steps")
    (notice,) = report.notices
    assert "max_episode_steps" in notice


def test_gym_evaluator_goes_on_after_an_episode_that_it_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(episodes, "LONGEST_EPISODE", 5)
    make, made = factory({"length": 1000})
    evaluator = gym_evaluator(make, most_envs=1)
    assert evaluator.validate(ScriptedAgent()).values["cut"] == 3
    assert len(set(made[0].seeds)) == 3


def test_gym_evaluator_without_episodes_makes_no_test():
    make, made = factory({})
    assert gym_evaluator(make, eval_episodes=0).test(ScriptedAgent()) is None and not made


class TellingAndResumable(Telling):
    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time, "length": self.length, "reward": self.reward}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time, self.length, self.reward = state["time"], state["length"], state["reward"]


@pytest.mark.parametrize(("make", "resumable"), [(Telling, False), (TellingAndResumable, True)])
def test_gym_evaluator_plays_in_the_environments_of_training(make: type[Telling], resumable: bool):
    env, undisturbed = (GymVectorEnv(make, num_envs=2, device=CPU, seed=3) for _ in range(2))
    actions = torch.tensor([1, 2])
    for each in (env, undisturbed):
        each.reset()
        each.step(actions)
    ended = env._ended.copy()
    own = gym_evaluator(make).validate(ScriptedAgent())
    assert gym_evaluator(make, training_env=env).validate(ScriptedAgent()) == own
    lost = env.take_lost().tolist()
    assert lost == [not resumable and not over for over in ended]
    assert env.observe()["observation"].equal(undisturbed.observe()["observation"])
    assert not env.take_lost().any() and env.notices == []
    for _ in range(12):
        obs, reward, *_ = env.step(actions)
        if resumable:
            expected = undisturbed.step(actions)
            assert obs["observation"].equal(expected[0]["observation"]) and reward.equal(expected[1])
    state = env.state_dict()
    assert state["seeds"] == [_seed_of(3, TRAINING, row, episode) for row, episode in enumerate(state["episodes"])]


def test_gym_evaluator_leaves_training_as_it_was_after_a_crash():
    env = GymVectorEnv(Scripted, num_envs=2, device=CPU, seed=3)
    env.reset()
    env.step(torch.tensor([1, 2]))
    before = env.state_dict()

    class Failing(ScriptedAgent):
        def act(self, *_arguments: Any, **_keywords: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gym_evaluator(Scripted, training_env=env).validate(Failing())
    assert env.take_lost().all()
    after = env.state_dict()
    assert after["episodes"] == before["episodes"] and after["ended"] == [True, True]


def test_gym_evaluator_draws_the_first_episode():
    shown: list[dict[str, Tensor]] = []

    def pictures(sequence: dict[str, Tensor]) -> dict[str, np.ndarray]:
        shown.append(sequence)
        return {"open_loop": np.zeros((2, 2, 3), np.uint8)}

    report = gym_evaluator(factory(*THREE)[0], pictures=pictures).validate(ScriptedAgent())
    assert report.pictures.keys() == {"open_loop"}
    assert shown[0]["observation"].shape == (1, 4, 2)


def test_gym_evaluator_closes_its_environments_after_a_failure():
    class Failing(ScriptedAgent):
        def act(self, *_arguments: Any, **_keywords: Any) -> Any:
            raise ZeroDivisionError

    make, made = factory(*THREE)
    with pytest.raises(ZeroDivisionError):
        gym_evaluator(make).validate(Failing())
    assert made and all(env.closed for env in made)
