"""A trained agent in somebody else's program."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import checkpoint
import config
import dreamer
import sac
from checkpoint import CheckpointError
from config import ConfigError, UserError
from dreamer import load
from envs.gym_vector import GymVectorEnv
from envs.routing import TSPEnv
from guard import Guard
from routing.instances import TEST_SEED
from solving.decoding import Decoding
from tests.scenes import debug_config, without_zero_outputs
from training.devices import make_generators
from training.episodes import play
from training.setup import make_setup

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"model__units": 16, "model__rssm__deter": 16, "model__rssm__hidden": 16}


def make_weights(path: Path, section: str = "gym", *, agent: Any = dreamer.Dreamer, **changes: Any) -> Path:
    """Weights of an agent that has learnt nothing, whose actions differ from state to state all the same."""
    settings = debug_config(section, **changes)
    setup = make_setup(settings, CPU)
    setup.close()
    made = agent.of(setup.task, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
    for part in (made.model, made.behavior) if agent is dreamer.Dreamer else (made.soft,):
        without_zero_outputs(part)
    state = {"config": settings.to_dict(), "agent": made.state_dict(), "step": 0, "agent_class": agent.__name__}
    checkpoint.save(path, state)
    return path


class Noting(gymnasium.Wrapper):
    """Notes its episodes: the seed, then the actions."""

    def __init__(self, env: gymnasium.Env, notes: list[list[Any]]) -> None:
        super().__init__(env)
        self.notes = notes

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.episode = [seed]
        self.notes.append(self.episode)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        self.episode.append(action)
        return super().step(action)


def episode(agent: Any, env: gymnasium.Env, seed: int) -> list[Any]:
    obs, _ = env.reset(seed=seed)
    actions, state, over = [], None, False
    while not over:
        action, state = agent(obs, state)
        actions.append(action)
        obs, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    return actions


def evaluated(path: Path, task: str) -> list[list[Any]]:
    """The seed and the actions of an episode that the trainer's evaluation plays with these weights."""
    state = checkpoint.load(path, CPU)
    notes: list[list[Any]] = []
    settings = config.Config(state["config"])
    setup = make_setup(settings, CPU)
    agent = dreamer.Dreamer.of(setup.task, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
    agent.load_weights(state["agent"])
    setup.close()
    env = GymVectorEnv(
        lambda: Noting(gymnasium.make(task), notes), num_envs=1, device=CPU, seed=TEST_SEED, evaluation=True
    )
    play(agent, env, episodes=1)
    env.close()
    return notes[:1]


@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1", "Switches-v0"])
def test_loaded_agent_plays_the_episodes_that_the_evaluation_plays(task: str, tmp_path: Path):
    path = make_weights(tmp_path / "own.pt", task=f"gym_{task}", **SMALL)
    agent = load(path, device="cpu")
    for seed, *actions in evaluated(path, task):
        ours = episode(agent, gymnasium.make(task), seed)
        assert len(ours) >= 6 and len({str(action) for action in ours}) > 1
        np.testing.assert_array_equal(ours, actions[: len(ours)])


def test_loaded_agent_walks_the_tours_that_decoding_finds(tmp_path: Path):
    import solve

    path = Path(dreamer.__file__).parent / "checkpoints" / "tsp20.pt"
    (instance,) = solve.random_instances(solve.load_agent(path, CPU), 1, 9, seed=5)
    (solution,) = solve.solve(solve.load_agent(path, CPU), [instance], Decoding())
    env = TSPEnv(num_nodes=9)
    obs, _ = env.reset(options={"coords": instance.coords})
    agent, state, tour = load(path, device="cpu"), None, [0]
    for _ in range(8):
        action, state = agent(obs, state)
        tour.append(int(action))
        obs, *_ = env.step(action)
    assert not isinstance(solution, UserError) and tour == solution.tour.tolist()


@pytest.mark.parametrize("task", ["CartPole-v1", "Switches-v0", "Pendulum-v1", "TSP-v0", "ATSP-v0"])
def test_loaded_agent_answers_a_batch_as_it_answers_each(task: str, tmp_path: Path):
    if task in (sections := {"TSP-v0": "tsp_attn", "ATSP-v0": "atsp_attn"}):
        path = make_weights(tmp_path / "own.pt", sections[task], nodes=20)
    else:
        path = make_weights(tmp_path / "own.pt", task=f"gym_{task}", **SMALL)
    many = gymnasium.make_vec(task, num_envs=3, vectorization_mode="sync")
    agent = load(path, env=many, device="cpu")
    obs, _ = many.reset(seed=0)
    state, is_first = None, None
    states: list[Any] = [None] * 3
    for step in range(4):
        action, state = agent(obs, state, is_first=is_first)
        assert many.action_space.contains(action)
        for row in range(3):
            alone = {key: value[row] for key, value in obs.items()} if isinstance(obs, dict) else obs[row]
            # The second environment begins anew at the third step.
            states[row] = None if step == 2 and row == 1 else states[row]
            own, states[row] = agent(alone, states[row])
            np.testing.assert_allclose(own, action[row], atol=1e-6)
        obs, *_ = many.step(action)
        is_first = np.array([False, step == 1, False])


def test_loaded_agent_draws_only_where_it_is_asked_to(tmp_path: Path):
    path = make_weights(tmp_path / "own.pt", task="gym_Pendulum-v1", **SMALL)
    obs = np.array([1.0, 0.0, 0.5], np.float32)
    greedy, seed_0, seed_1 = (
        [float(load(path, device="cpu", **options)(obs)[0][0]) for _ in range(2)]
        for options in ({}, {"sample": True}, {"sample": True, "seed": 1})
    )
    assert greedy[0] == greedy[1] and seed_0[0] == seed_0[1] and len({greedy[0], seed_0[0], seed_1[0]}) == 3


def test_loaded_agent_of_sac_plays(tmp_path: Path):
    path = make_weights(tmp_path / "own.pt", "sac", agent=sac.SAC, task="gym_Pendulum-v1")
    actions = episode(sac.load(path, device="cpu"), gymnasium.make("Pendulum-v1"), seed=0)
    assert len(actions) == 200 and gymnasium.make("Pendulum-v1").action_space.contains(actions[0])
    with pytest.raises(CheckpointError, match="holds a SAC, where a Dreamer is needed"):
        load(path)


def test_load_imports_nothing_where_the_environment_is_given(tmp_path: Path):
    path = make_weights(tmp_path / "own.pt", task="gym_CartPole-v1", **SMALL)
    state = checkpoint.load(path, CPU)
    state["config"] |= {"import": "payload", "task": "gym_payload:Own-v0"}
    checkpoint.save(path, state)
    with pytest.raises(ConfigError, match="names code: import is 'payload'"):
        load(path)
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(load(path, env=env)(obs)[0])
    state["config"]["imag_reward"] = "payload:reward"
    checkpoint.save(path, state)
    with pytest.raises(ConfigError, match="names code: imag_reward"):
        load(path, env=env)


def test_load_refuses_the_environment_of_another_task(tmp_path: Path):
    path = make_weights(tmp_path / "own.pt", task="gym_CartPole-v1", **SMALL)
    with pytest.raises(CheckpointError, match="does not fit this config"):
        load(path, env=gymnasium.make("Acrobot-v1"))
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load("nowhere")


def test_loaded_agent_refuses_what_it_cannot_take(tmp_path: Path):
    agent = load(make_weights(tmp_path / "own.pt", task="gym_CartPole-v1", **SMALL), device="cpu")
    obs = np.zeros(4, np.float32)
    _, state = agent(obs)
    for mistake, message in (
        (lambda: agent(np.zeros(5, np.float32)), "has shape (5,), but its space is"),
        (lambda: agent(np.array([0, np.nan, 0, 0], np.float32)), "has 1 of 4 entries that are NaN"),
        (lambda: agent(np.zeros((2, 4), np.float32), state), "there are 2 observations, and state"),
        (lambda: agent(obs, state, is_first=np.array([True, False])), "there are 1 observations"),
    ):
        with pytest.raises(UserError) as refused:
            mistake()
        assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs["coords"], "is a dict with coords [N, 2]"),
        (lambda obs: {**obs, "coords": obs["coords"][0]}, "is a dict with coords [N, 2]"),
        (lambda obs: {key: value for key, value in obs.items() if key != "visited"}, "'visited' is missing"),
        (lambda obs: {**obs, "visited": obs["visited"][:-1]}, "'visited' has shape (6,)"),
    ],
)
def test_loaded_agent_of_routing_refuses_what_it_cannot_take(change, message: str, tmp_path: Path):
    obs, _ = TSPEnv(num_nodes=7).reset(seed=0)
    agent = load(Path(dreamer.__file__).parent / "checkpoints" / "tsp20.pt", device="cpu")
    with pytest.raises(UserError) as refused:
        agent(change(obs))
    assert message in str(refused.value)
