import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded

import checkpoint
from envs.gym_vector import EnvironmentCrashed, GymVectorEnv, make_gym
from envs.spaces import observation_keys

MODES = pytest.mark.parametrize("processes", [False, True], ids=["local", "processes"])


class Scripted(gymnasium.Env):
    """Shows (seed, time); the reward for action a at time t is 10 t + a. Action 9 crashes it, 8 ends it by time."""

    mask_rules = "rules"
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space: spaces.Space = spaces.Discrete(10)

    def __init__(self, *, length=3):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        return self.observe(), {"not picklable": lambda: None}

    def step(self, action):
        if action == 9:
            raise RuntimeError("the simulator\nis gone")
        reward = 10.0 * self.time + action
        self.time += 1
        return self.observe(), reward, self.time == self.length, bool(action == 8), {}

    def observe(self):
        return np.array([self.seed, self.time], np.float64)


class Resumable(Scripted):
    """A `Scripted` with noise in its reward, whose state can be taken."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + self.np_random.random(), terminated, truncated, info

    def state_dict(self):
        numbers = {"array": np.arange(3)[::-1], "scalar": np.float32(0.5), "flags": (True, [None, "text"])}
        state = {"seed": self.seed, "time": self.time, "random": self.np_random.bit_generator.state}
        return state | numbers | {"tensor": torch.ones(2)}

    def load_state_dict(self, state):
        np.testing.assert_array_equal(state["array"], np.array([2, 1, 0]), strict=True)
        assert type(state["scalar"]) is np.float32 and state["scalar"] == 0.5
        assert state["flags"] == (True, [None, "text"]) and state["tensor"].equal(torch.ones(2))
        self.seed, self.time = state["seed"], state["time"]
        self.np_random.bit_generator.state = state["random"]


class Unsavable(Resumable):
    def state_dict(self):
        return {"socket": {"open": object()}}


@pytest.fixture
def vector_env():
    made = []

    def make(make_env=Scripted, *, num_envs=1, seed=0, processes=False):
        made.append(GymVectorEnv(make_env, num_envs=num_envs, device="cpu", seed=seed, processes=processes))
        return made[-1]

    yield make
    for env in made:
        env.close()


def times(obs):
    return obs["observation"][:, 1].tolist()


def seeds(obs):
    return obs["observation"][:, 0].tolist()


def take(env, *actions):
    """One step; returns what it gave as plain numbers, and its info."""
    obs, reward, terminated, truncated, info = env.step(torch.tensor(actions))
    return times(obs), reward.tolist(), terminated.tolist(), truncated.tolist(), info


@MODES
def test_gym_vector_aligns_observation_reward_and_end_with_the_action(vector_env, processes):
    env = vector_env(num_envs=2, processes=processes)
    obs, info = env.reset()
    assert times(obs) == [0, 0] and obs["observation"].dtype == torch.float32
    assert info["is_first"].tolist() == [True, True] and info["any_first"] and info["decisions"] == 0
    rewards = []
    for now in range(3):
        time_now, reward, terminated, truncated, info = take(env, 1, 2)
        rewards.append(reward)
        assert time_now == [now + 1] * 2 and terminated == [now == 2] * 2 and truncated == [False] * 2
        assert info["is_first"].tolist() == [False, False] and not info["any_first"] and info["decisions"] == 2
    assert rewards == [[1, 2], [11, 12], [21, 22]]
    assert (info["returns"], info["lengths"]) == ([33, 36], [3, 3])
    assert env.all_ended
    # The actions of ended rows are ignored, even one that would crash.
    time_now, reward, terminated, _, info = take(env, 9, 9)
    assert time_now == [0, 0] and reward == [0, 0] and terminated == [False, False]
    assert info["is_first"].all() and info["any_first"] and info["decisions"] == 0 and info["returns"] == []
    assert not env.all_ended and env.restarts == 0


def test_gym_vector_resets_rows_that_end_at_different_times(vector_env):
    env = vector_env(num_envs=2)
    env.reset()
    assert take(env, 8, 0)[:4] == ([1, 1], [8, 0], [False, False], [True, False])
    time_now, reward, _, truncated, info = take(env, 5, 5)
    assert (time_now, reward, truncated) == ([0, 2], [0, 15], [False, False])
    assert info["is_first"].tolist() == [True, False] and info["any_first"] and info["decisions"] == 1
    assert take(env, 5, 5)[4]["returns"] == [0 + 15 + 25]


@pytest.mark.parametrize(
    ("length", "action", "flags"), [(3, 8, (False, True)), (1, 0, (True, False)), (1, 8, (True, False))]
)
def test_gym_vector_keeps_truncation_apart_and_termination_first(vector_env, length, action, flags):
    env = vector_env(lambda: Scripted(length=length))
    env.reset()
    _, _, terminated, truncated, _ = take(env, action)
    assert (terminated[0], truncated[0]) == flags


def test_gym_vector_time_limit_truncates(vector_env):
    env = vector_env(lambda: gymnasium.wrappers.TimeLimit(Scripted(length=9), 2))
    env.reset()
    assert take(env, 0)[2:4] == ([False], [False])
    assert take(env, 0)[2:4] == ([False], [True])


def test_gym_vector_returns_tensors_of_their_own(vector_env):
    env = vector_env()
    first, _ = env.reset()
    step = env.step(torch.tensor([1]))
    env.step(torch.tensor([2]))
    assert times(first) == [0] and times(step[0]) == [1] and step[1].tolist() == [1]


@MODES
def test_gym_vector_seeds_differ_by_environment_episode_and_seed_and_repeat(vector_env, processes):
    def episodes(seed):
        env = vector_env(lambda: Scripted(length=1), num_envs=2, seed=seed, processes=processes)
        found = [seeds(env.reset()[0])]
        for _ in range(2):
            env.step(torch.tensor([0, 0]))
            found.append(seeds(env.step(torch.tensor([0, 0]))[0]))
        return [seed for row in found for seed in row]

    first = episodes(0)
    assert len({*first, *episodes(1)}) == 12
    assert episodes(0) == first
    expected = np.random.SeedSequence(0, spawn_key=(1, 1)).generate_state(1)[0]
    assert first[1] == np.float32(expected)


@MODES
def test_gym_vector_ends_a_crashed_episode_as_truncated_and_goes_on(vector_env, processes):
    env = vector_env(num_envs=2, processes=processes)
    seed_before = seeds(env.reset()[0])
    take(env, 1, 1)
    time_now, reward, terminated, truncated, info = take(env, 9, 1)
    assert (time_now, reward, terminated, truncated) == ([1, 2], [0, 11], [False, False], [True, False])
    assert env.restarts == 1 and info["returns"] == [1] and info["decisions"] == 2
    assert env.notices == ["environment 0 crashed and is restarted: RuntimeError: the simulator is gone"]
    obs, *_, info = env.step(torch.tensor([1, 1]))
    assert times(obs) == [0, 3] and info["is_first"].tolist() == [True, False]
    assert seeds(obs)[0] != seed_before[0] and seeds(obs)[1] == seed_before[1]
    # A second crash of the same environment is counted, and not announced.
    take(env, 9, 1)
    assert env.restarts == 2 and len(env.notices) == 1


@MODES
def test_gym_vector_gives_up_after_five_crashes_without_a_step(vector_env, processes):
    env = vector_env(processes=processes)
    env.reset()
    for _ in range(4):
        take(env, 9)
        take(env, 9)
    with pytest.raises(
        EnvironmentCrashed, match="^environment 0 crashed 5 times.*RuntimeError: the simulator is gone$"
    ):
        take(env, 9)


def test_gym_vector_crash_count_begins_again_after_a_completed_step(vector_env):
    env = vector_env()
    env.reset()
    for _ in range(3):
        for _ in range(4):
            take(env, 9)
            take(env, 0)
        take(env, 0)
    assert env.restarts == 12


class Restarting(Scripted):
    """Of its first two instances, the second cannot be reset, as if its server were still busy."""

    made = 0

    def __init__(self):
        super().__init__()
        Restarting.made += 1
        self.busy = Restarting.made == 2

    def reset(self, *, seed=None, options=None):
        if self.busy:
            raise ConnectionError("port in use")
        return super().reset(seed=seed)


def test_gym_vector_tries_again_where_a_later_reset_crashes(vector_env, monkeypatch):
    monkeypatch.setattr(Restarting, "made", 0)
    env = vector_env(Restarting)
    env.reset()
    take(env, 9)
    time_now, _, _, truncated, info = take(env, 0)
    assert (time_now, truncated, info["is_first"].tolist(), env.restarts) == ([0], [False], [True], 2)


@MODES
def test_gym_vector_raises_at_once_where_an_environment_cannot_be_made(vector_env, processes):
    with pytest.raises(EnvironmentCrashed, match="^the environment cannot be made: ZeroDivisionError: .* by zero$"):
        vector_env(lambda: 1 // 0, processes=processes)


@MODES
def test_gym_vector_raises_at_once_where_the_first_reset_crashes(vector_env, processes):
    class Broken(Scripted):
        def reset(self, *, seed=None, options=None):
            raise OSError("no licence")

    env = vector_env(Broken, num_envs=2, processes=processes)
    with pytest.raises(EnvironmentCrashed, match="environment 0 cannot begin its first episode: OSError: no licence"):
        env.reset()


def test_gym_vector_lets_an_interrupt_through(vector_env):
    class Interrupted(Scripted):
        def step(self, action):
            raise KeyboardInterrupt

    env = vector_env(Interrupted)
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        take(env, 0)


def test_gym_vector_replaces_a_process_that_dies(vector_env):
    class Fatal(Scripted):
        def step(self, action):
            if action == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(action)

    env = vector_env(Fatal, num_envs=2, processes=True)
    env.reset()
    assert take(env, 7, 1)[:4] == ([0, 1], [0, 1], [False, False], [True, False])
    assert env.notices == ["environment 0 crashed and is restarted: its process died (exit code -9)"]
    assert take(env, 1, 1)[:2] == ([0, 2], [0, 11])


def test_gym_vector_processes_step_together_and_answer_in_their_order(vector_env):
    class Unequal(Scripted):
        """Takes as long as its action says."""

        def step(self, action):
            time.sleep(0.2 * action)
            return super().step(action)

    env = vector_env(Unequal, num_envs=4, processes=True)
    env.reset()
    start = time.monotonic()
    assert take(env, 4, 3, 2, 0)[1] == [4, 3, 2, 0]
    assert time.monotonic() - start < 1.6


def test_gym_vector_process_ignores_ctrl_c(vector_env):
    class Known(Scripted):
        def step(self, action):
            os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)

    env = vector_env(Known, processes=True)
    env.reset()
    assert take(env, 1)[1] == [1]
    assert env.restarts == 0


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("ending", ["env.close()", "pass", "raise SystemExit(3)", "os.kill(os.getpid(), 9)"])
def test_gym_vector_processes_end_with_the_program(ending, tmp_path):
    script = tmp_path / "program.py"
    text = """
        import os, gymnasium
        from envs.gym_vector import GymVectorEnv

        if __name__ == "__main__":
            env = GymVectorEnv(lambda: gymnasium.make("CartPole-v1"), num_envs=2, device="cpu", seed=0, processes=True)
            env.reset()
            print(*(worker._process.pid for worker in env._workers), flush=True)
    """
    script.write_text(textwrap.dedent(text) + f"    {ending}\n")
    root = Path(__file__).resolve().parents[1]
    finished = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
    )
    processes = [int(pid) for pid in finished.stdout.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 5
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, processes))


def limited(env_type):
    # The order of wrappers in gymnasium.make.
    return lambda: gymnasium.wrappers.TimeLimit(gymnasium.wrappers.OrderEnforcing(env_type(length=6)), 4)


def through_file(state, folder):
    checkpoint.save(folder / "saved.pt", {"env": state})
    return checkpoint.load(folder / "saved.pt", torch.device("cpu"))["env"]


@MODES
@pytest.mark.parametrize("steps_before", [0, 2, 4, 5])
def test_gym_vector_goes_on_exactly_where_environments_have_a_state(vector_env, tmp_path, steps_before, processes):
    env = vector_env(limited(Resumable), num_envs=2, processes=processes)
    env.reset()
    for _ in range(steps_before):
        env.step(torch.tensor([1, 2]))
    restored = vector_env(limited(Resumable), num_envs=2, processes=processes)
    lost = restored.load_state_dict(through_file(env.state_dict(), tmp_path))
    assert lost.tolist() == [False, False] and restored.notices == []
    assert restored.observe()["observation"].equal(env.observe()["observation"])
    for _ in range(7):
        expected, found = env.step(torch.tensor([3, 4])), restored.step(torch.tensor([3, 4]))
        assert found[0]["observation"].equal(expected[0]["observation"])
        assert [tensor.tolist() for tensor in found[1:4]] == [tensor.tolist() for tensor in expected[1:4]]
        for name in ("returns", "lengths", "decisions", "any_first"):
            assert found[4][name] == expected[4][name]


@MODES
def test_gym_vector_loses_only_running_episodes_without_a_state(vector_env, tmp_path, processes):
    env = vector_env(num_envs=2, processes=processes)
    env.reset()
    take(env, 8, 1)
    env.restarts = 7
    restored = vector_env(num_envs=2, processes=processes)
    assert restored.load_state_dict(through_file(env.state_dict(), tmp_path)).tolist() == [False, True]
    assert restored.notices == ["running episodes of environments 1 could not be resumed and end as truncated"]
    assert restored.all_ended and restored.restarts == 7
    assert restored.observe()["observation"].equal(env.observe()["observation"])
    # Both rows begin their second episode, with the seeds that it would have had.
    obs, *_, info = restored.step(torch.tensor([0, 0]))
    expected = [np.random.SeedSequence(0, spawn_key=(row, 2)).generate_state(1)[0] for row in range(2)]
    assert seeds(obs) == [np.float32(seed) for seed in expected] and info["decisions"] == 0
    for _ in range(3):
        *_, info = take(restored, 1, 1)
    assert info["returns"] == [33, 33]


def test_gym_vector_says_once_that_a_state_cannot_be_saved(vector_env, tmp_path):
    env = vector_env(Unsavable, num_envs=2)
    env.reset()
    state = env.state_dict()
    env.state_dict()
    assert env.notices == [
        "environment 0 counts as one without state_dict(): TypeError: state_dict()['socket']['open'] is a object, "
        "and only arrays, tensors and plain values can be saved"
    ]
    assert vector_env(Unsavable, num_envs=2).load_state_dict(through_file(state, tmp_path)).all()


def test_gym_vector_refuses_a_state_of_another_size(vector_env):
    env = vector_env(num_envs=2)
    env.reset()
    with pytest.raises(ValueError, match="saved state has 2 environments, not 3"):
        vector_env(num_envs=3).load_state_dict(env.state_dict())


def test_gym_vector_gives_the_mask_and_all_observations(vector_env):
    env = vector_env(make_gym("gym_TSP-v0", imports=""), num_envs=3)
    obs, info = env.reset()
    assert env.observations == observation_keys(gymnasium.make("TSP-v0").observation_space)
    assert env.actions.masked and obs.keys() == {*env.observations, "action_mask"}
    for _ in range(20):
        assert info["action_mask"].equal(obs["action_mask"]) and obs["action_mask"].dtype == torch.bool
        obs, _, terminated, _, info = env.step(obs["action_mask"].int().argmax(-1))
    assert terminated.all() and env.restarts == 0


@MODES
def test_gym_vector_describes_the_task(vector_env, processes):
    env = vector_env(processes=processes)
    assert env.mask_rules == "rules"
    assert env.actions.sizes == (10,) and list(env.observations) == ["observation"]
    assert vector_env(make_gym("gym_CartPole-v1", imports=""), processes=processes).mask_rules is None


def test_gym_vector_scales_continuous_actions(vector_env):
    class Echo(Scripted):
        action_space = spaces.Box(-2, 6, (1,))

        def step(self, action):
            return self.observe(), action, False, False, {}

    env = vector_env(Echo, num_envs=3)
    env.reset()
    assert env.step(torch.tensor([[-1.0], [0.5], [7.0]]))[1].tolist() == [-2, 4, 6]


def test_gym_vector_names_an_observation_that_does_not_fit_its_space(vector_env):
    class Misfit(Scripted):
        def observe(self):
            return np.zeros(3)

    env = vector_env(Misfit)
    with pytest.raises(ValueError, match=r"'observation' has shape \(3,\), but its space is Box"):
        env.reset()


def test_gym_vector_must_be_reset_first(vector_env):
    env = vector_env()
    for call in (lambda: env.step(torch.tensor([0])), env.observe, env.state_dict):
        with pytest.raises(ResetNeeded, match="before the first episode"):
            call()


def test_gym_vector_refuses_impossible_arguments(vector_env):
    with pytest.raises(ValueError, match="num_envs is 0"):
        vector_env(num_envs=0)


def test_make_gym_makes_the_environment_of_the_task():
    env = make_gym("gym_CartPole-v1", imports="", render_mode="rgb_array")()
    assert env.spec is not None and env.spec.id == "CartPole-v1" and env.render_mode == "rgb_array"
    env.close()


def test_make_gym_imports_modules_that_register_ids(tmp_path, monkeypatch):
    register = "import gymnasium\ngymnasium.register('Own-v0', entry_point='test_own_module:Own')\n"
    (tmp_path / "test_own_module.py").write_text(register + "class Own(gymnasium.Env): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    make_gym("gym_Own-v0", imports="math, test_own_module")
    gymnasium.registry.pop("Own-v0")


@pytest.mark.parametrize(
    ("task", "imports", "message"),
    [
        ("gym_CartPol-v1", "", "no environment is registered as 'CartPol-v1'; did you mean CartPole-v1"),
        ("gym_CartPole-v7", "", "'CartPole-v7'; did you mean CartPole-v"),
        ("gym_zzzzzz", "", "'zzzzzz'; import the module that registers it"),
        ("gym_CartPole-v1", "math,no_such_module", "module 'no_such_module' cannot be imported"),
    ],
)
def test_make_gym_refuses_unknown_names_in_one_line(task, imports, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_gym(task, imports=imports)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@MODES
def test_gym_vector_keeps_every_tensor_on_the_gpu(processes):
    env = GymVectorEnv(Scripted, num_envs=2, device="cuda", seed=0, processes=processes)
    obs, info = env.reset()
    step_obs, *tensors, step_info = env.step(torch.zeros(2, dtype=torch.long, device="cuda"))
    found = [*obs.values(), *step_obs.values(), *tensors, info["is_first"], step_info["is_first"]]
    assert {tensor.device.type for tensor in found} == {"cuda"}
    env.close()
