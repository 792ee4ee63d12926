from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from torch import Tensor

import config
from config import UserError
from dreamer import Dreamer
from envs import workers
from envs.crashes import EnvironmentCrashed, Restarts
from envs.gym_tasks import make_gym
from envs.gym_vector import TRAINING, GymVectorEnv, _seed_of
from envs.routing import TSPInstance, TSPRules, tour_length
from envs.tasks import RoutingTask
from guard import Guard
from parts.acting import Sight
from routing.instances import TEST_SEED, VALIDATION_SEED
from training import devices, episodes, setup, tours
from training.agent import Agent
from training.episodes import GymEvaluator, play
from training.evaluation import Report
from training.film import film
from training.tours import Evaluation, RoutingEvaluator

CPU = torch.device("cpu")
NODES = 6
ROUTING = RoutingTask.of(TSPRules, NODES)

# Routing


def routing_agent() -> tuple[Dreamer, dict[str, torch.Generator]]:
    generators = devices.make_generators(0, CPU)
    settings = config.load(Path(config.__file__).with_name("configs.yaml"), ["debug"], {})
    return Dreamer.of(ROUTING, settings, device=CPU, generators=generators, guard=Guard("cpu")), generators


def some_instances(count: int = 8) -> Evaluation:
    return setup.make_evaluation(NODES, count, seed=VALIDATION_SEED)


def random_states(generators: dict[str, torch.Generator]) -> list[Any]:
    return [
        *(generator.get_state().tolist() for generator in generators.values()),
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
    ]


def test_evaluate_draws_from_no_generator():
    agent, generators = routing_agent()
    before = random_states(generators)
    tours.evaluate(agent, ROUTING, some_instances(), device=CPU)
    assert random_states(generators) == before


def test_evaluate_is_greedy_and_repeatable():
    agent, _ = routing_agent()
    one, other = (tours.evaluate(agent, ROUTING, some_instances(), device=CPU) for _ in range(2))
    assert torch.equal(one.tours, other.tours) and one.gap == other.gap


def test_evaluate_measures_its_own_tours():
    agent, _ = routing_agent()
    instances = some_instances(16)
    result = tours.evaluate(agent, ROUTING, instances, device=CPU)
    assert (result.tours.sort(-1).values == torch.arange(NODES)).all()
    torch.testing.assert_close(result.lengths, tour_length(instances.coords, result.tours))
    assert (result.lengths.numpy() > instances.references - 1e-5).all()
    mean = float(tour_length(instances.coords, result.tours).double().mean())
    assert result.gap == pytest.approx(100 * (mean / instances.references.mean() - 1), abs=1e-4)


@pytest.mark.parametrize(
    ("cost", "reference", "gap"),
    [(12.0, 10.0, 20.0), (-8.0, -10.0, 20.0), (-12.0, -10.0, -20.0), (1.0, -10.0, 110.0)],
)
def test_percent_above_is_positive_where_more_is_paid_or_less_is_earned(cost: float, reference: float, gap: float):
    assert tours.percent_above(cost, reference) == pytest.approx(gap)


def test_percent_above_a_reference_of_zero_is_no_number():
    assert math.isnan(tours.percent_above(1.0, 0.0))


class PrizeInstance(NamedTuple):
    coords: Tensor
    valid: Tensor | None = None
    prize: Tensor | None = None
    kind: Tensor | None = None


class PrizeRules(TSPRules):
    @staticmethod
    def field_instances(num_instances: int, num_nodes: int, *, seed: int) -> Any:
        coords = TSPRules.field_instances(num_instances, num_nodes, seed=seed).coords
        return PrizeInstance(coords, prize=coords[..., 0], kind=torch.ones(num_instances, num_nodes, dtype=torch.int32))

    @staticmethod
    def reference_lengths(instance: Any) -> np.ndarray:
        return -instance.coords[..., 0].sum(-1).numpy()


def test_every_part_of_field_instances_may_be_float64():
    made = setup.make_evaluation(6, 3, seed=0, rules=PrizeRules).instance
    assert (made.coords.dtype, made.prize.dtype, made.kind.dtype) == (torch.float32, torch.float32, torch.int32)


def test_routing_evaluator_reports_gap_and_return_of_the_instances_asked_for():
    agent, _ = routing_agent()
    validation, test = some_instances(8), some_instances(5)
    drawn_for = []

    def pictures(instance: TSPInstance) -> dict[str, np.ndarray]:
        drawn_for.append(instance)
        return {"imagined": np.zeros((2, 2, 3), np.uint8)}

    evaluator = RoutingEvaluator(ROUTING, validation=validation, test=test, device=CPU, pictures=pictures)
    for report, instances in ((evaluator.validate(agent), validation), (evaluator.test(agent), test)):
        result = tours.evaluate(agent, ROUTING, instances, device=CPU)
        assert report.values == {"gap": result.gap, "return": -float(result.lengths.mean())}
        assert report.pictures.keys() == {"tour", "imagined"}
        assert report.summary.startswith(
            f"{len(result.lengths)} instances, mean length {result.lengths.mean():.4f} +- "
        )
        assert report.summary.endswith(f"gap {result.gap:.2f} % to the reference")
    assert torch.equal(drawn_for[0].coords, validation.coords)


# Any other task


class ScriptedAgent:
    """Action 10 t + row at its t-th decision; likes no noise."""

    rows_per_update, batch_length = 1, 1
    memory_spaces: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    players: dict[str, Any] = {}

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        return {"time": 0, "num_envs": num_envs}

    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Any]]:
        assert generator is None, "an evaluation draws nothing"
        assert bool(sight.is_first.any()) == sight.any_first
        action = 10 * state["time"] + torch.arange(state["num_envs"])
        return action, {**state, "time": state["time"] + 1}

    def memory(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def update(self, replay: Any, *, progress: float) -> dict[str, Tensor]:
        raise AssertionError("an evaluation learns nothing")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


class Scripted(gymnasium.Env):
    """Shows (time, last action); every step is worth `reward`, and `length` of them make an episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(1000)

    def __init__(
        self, *, length: int = 3, reward: float = 1.0, by_time: bool = False, render_mode: str | None = "rgb_array"
    ) -> None:
        self.length, self.reward, self.by_time, self.render_mode = length, reward, by_time, render_mode
        self.seeds: list[int | None] = []
        self.closed = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.time, self.last_action = 0, -1
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time, self.last_action = self.time + 1, int(action)
        ended = self.time == self.length
        return self.observe(), self.reward, ended and not self.by_time, ended and self.by_time, {}

    def observe(self) -> np.ndarray:
        return np.array([self.time, self.last_action], np.float32)

    def render(self) -> np.ndarray:
        # Another colour each time: a GIF stores equal frames in a row as one.
        image = np.zeros((8, 8, 3), np.uint8)
        image[:] = (40 * self.time, 20 * len(self.seeds), (self.seeds[-1] or 0) % 200)
        return image

    def close(self) -> None:
        self.closed = True


def factory(*arguments: dict[str, Any]) -> tuple[Callable[[], Scripted], list[Scripted]]:
    """Makes a `Scripted` with each of the arguments in turn, and the list of those made."""
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(**arguments[len(made) % len(arguments)]))
        return made[-1]

    return make, made


THREE = ({"length": 4, "reward": 1.0}, {"length": 2, "reward": 10.0}, {"length": 7, "reward": 0.5, "by_time": True})


def vector_env(make: Callable[[], gymnasium.Env], num_envs: int = 3) -> GymVectorEnv:
    return GymVectorEnv(make, num_envs=num_envs, device=CPU, seed=0, evaluation=True)


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


def gym_evaluator(make: Callable[[], gymnasium.Env], **changes: Any) -> GymEvaluator:
    settings = {"valid_episodes": 3, "eval_episodes": 6, "most_envs": 6, "restarts": Restarts(allowed=99), **changes}
    return GymEvaluator(make, device=CPU, **settings)


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


def report_of(evaluator: GymEvaluator, agent: Agent | None = None) -> Report:
    report = evaluator.test(ScriptedAgent() if agent is None else agent)
    assert report is not None
    return report


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


def test_film_writes_every_step_of_every_episode(tmp_path: Path):
    make, made = factory(*THREE)
    path = film(ScriptedAgent(), make, folder=tmp_path / "not" / "yet", device=CPU)
    assert path == tmp_path / "not" / "yet" / "episodes.gif"
    with GifImageFile(path) as gif:
        assert gif.n_frames == 4 + 2 + 7
        # 25 frames a second.
        assert gif.info["duration"] == 40
        reds = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            reds.append(int(np.asarray(gif.convert("RGB"))[4, 4, 0]))
    assert reds == [40 * time for length in (4, 2, 7) for time in range(length)]
    assert made[0].seeds[0] != made[1].seeds[0]
    assert all(env.closed for env in made)


def test_film_shows_the_first_test_episode_first(tmp_path: Path):
    make, made = factory({})
    report_of(gym_evaluator(make, eval_episodes=1))
    film(ScriptedAgent(), make, folder=tmp_path, device=CPU, episodes=1)
    assert made[0].seeds == made[1].seeds
    assert (
        GymVectorEnv(make, num_envs=1, device=CPU, seed=TEST_SEED, evaluation=True).reset()
        and made[2].seeds == made[0].seeds
    )


def test_film_of_pixels_shows_what_the_environment_draws(tmp_path: Path):
    agent = ScriptedAgent()
    agent.act = lambda _sight, state, **_: (torch.zeros(1, dtype=torch.int64), state)  # type: ignore[method-assign]
    path = film(agent, make_gym("gym_PixelGrid-v0", render_mode="rgb_array"), folder=tmp_path, device=CPU, episodes=1)
    with Image.open(path) as gif:
        assert gif.size == (64, 64)


def test_film_refuses_an_environment_that_draws_nothing(tmp_path: Path):
    make, _ = factory({"render_mode": None})
    with pytest.raises(ValueError, match="has no render_mode rgb_array, so it cannot be filmed") as error:
        film(ScriptedAgent(), make, folder=tmp_path / "film", device=CPU)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "film").exists()


def test_film_refuses_what_is_no_picture_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, made = factory(*THREE)
    monkeypatch.setattr(Scripted, "render", lambda _self: None)
    with pytest.raises(UserError, match=r"draws object \(\), so it cannot be filmed"):
        film(ScriptedAgent(), make, folder=tmp_path, device=CPU)
    assert made[0].time == 0


def test_film_says_in_one_line_that_it_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no film can be written"):
        film(ScriptedAgent(), factory(*THREE)[0], folder=tmp_path / "file" / "film", device=CPU)
