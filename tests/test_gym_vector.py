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
from envs import workers
from envs.gym_vector import BadInput, EnvironmentCrashed, GymVectorEnv, make_gym
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


class Faulty(gymnasium.Env):
    """Action a shows (time, a-th value, time) and rewards as much; action 0 is a good step, 9 one with a bad reward.

    `bad_starts` is how many episodes in a row begin with NaN.
    """

    observation_space = spaces.Dict(
        calm=spaces.Box(-np.inf, np.inf, (1,)), wild=spaces.Box(-np.inf, np.inf, (3,), np.float64)
    )
    action_space = spaces.Discrete(10)
    values = (1.0, np.nan, np.inf, -np.inf, 1e39, -3e38)

    def __init__(self, *, bad_starts=0, length=9):
        self.bad_starts, self.length = bad_starts, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        self.bad_starts -= 1
        return self.observe(np.nan if self.bad_starts >= 0 else 0.0), {}

    def step(self, action):
        self.time += 1
        reward = np.nan if action == 9 else 2.0
        return self.observe(self.values[action % 9]), reward, self.time == self.length, False, {}

    def observe(self, value):
        return {"calm": np.array([self.seed], np.float32), "wild": np.array([self.time, value, self.time])}


class Unsavable(Resumable):
    def state_dict(self):
        return {"socket": {"open": object()}}


@pytest.fixture
def vector_env():
    made = []

    def make(make_env=Scripted, *, num_envs=1, seed=0, **keywords):
        made.append(GymVectorEnv(make_env, num_envs=num_envs, device="cpu", seed=seed, **keywords))
        return made[-1]

    yield make
    for env in made:
        env.close()


def times(obs):
    return obs["observation"][:, 1].tolist()


def seeds(obs):
    return obs["observation"][:, 0].tolist()


def wild(obs):
    return obs["wild"].tolist()


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


class Silent(Scripted):
    """Action 7 never ends."""

    def step(self, action):
        if action == 7:
            time.sleep(600)
        return super().step(action)


def test_gym_vector_replaces_processes_that_do_not_answer_in_time(vector_env, monkeypatch):
    monkeypatch.setattr(workers, "FIRST_ANSWER", 60)
    env = vector_env(Silent, num_envs=3, processes=True, timeout=0.5)
    env.reset()
    pids = [worker._process.pid for worker in env._workers]
    start = time.monotonic()
    assert take(env, 7, 1, 7)[:4] == ([0, 1, 0], [0, 1, 0], [False] * 3, [True, False, True])
    # Both were waited for at once, and neither was asked to close.
    assert 0.5 <= time.monotonic() - start < 0.5 + workers.CLOSE_SECONDS
    assert not is_running(pids[0]) and is_running(pids[1]) and not is_running(pids[2])
    assert env.restarts == 2
    assert env.notices[0] == "environment 0 crashed and is restarted: its process did not answer within 0.5 s"
    assert take(env, 1, 1, 1)[:2] == ([0, 2, 0], [0, 11, 0])


def test_gym_vector_gives_the_first_answer_more_time(vector_env):
    def slow(seconds):
        time.sleep(seconds)
        return Scripted()

    env = vector_env(lambda: slow(1.0), processes=True, timeout=0.6)
    env.reset()
    with pytest.raises(EnvironmentCrashed, match="cannot be made: its process did not answer within 1.5 s$"):
        vector_env(lambda: slow(600), processes=True, timeout=0.3)


def test_gym_vector_waits_for_ever_without_a_timeout(vector_env, monkeypatch):
    class Slow(Scripted):
        def step(self, action):
            time.sleep(0.3)
            return super().step(action)

    env = vector_env(Slow, processes=True, timeout=0.0)
    env.reset()
    assert take(env, 1)[1] == [1] and env.restarts == 0


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gym_vector_process_survives_signals_to_the_group(vector_env, number):
    class Known(Scripted):
        def step(self, action):
            os.kill(os.getpid(), number)
            return super().step(action)

    env = vector_env(Known, processes=True)
    env.reset()
    assert take(env, 1)[1] == [1]
    assert env.restarts == 0


def test_gym_vector_process_can_terminate_what_it_started(vector_env):
    class Simulator(Scripted):
        def step(self, action):
            program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            time.sleep(0.5)
            program.terminate()
            assert program.wait(timeout=5) == -signal.SIGTERM
            return super().step(action)

    env = vector_env(Simulator, processes=True)
    env.reset()
    assert take(env, 1)[1] == [1] and env.notices == []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


PROGRAM = """
    import os, signal, time
    import gymnasium, torch
    from envs.gym_vector import GymVectorEnv

    class Hanging(gymnasium.Wrapper):
        def step(self, action):
            if action == 1:
                time.sleep(600)
            return super().step(action)

    if __name__ == "__main__":
        def make_env():
            return Hanging(gymnasium.make("CartPole-v1"))

        env = GymVectorEnv(make_env, num_envs=2, device="cpu", seed=0, processes=True)
        env.reset()
        print(*(worker._process.pid for worker in env._workers), flush=True)
"""
HANG = "env._workers[0].send('step', 1); time.sleep(0.2)"
NOTE = "signal.signal(signal.SIGTERM, lambda *_: print('noted'))"
TO_GROUP = "os.killpg(os.getpgrp(), signal.SIGTERM); time.sleep(0.2)"


def run_program(tmp_path, ending):
    """What a program printed that ended so, after the ids of its environments' processes are gone."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM) + f"    {ending}\n")
    finished = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    first, *lines = finished.stdout.splitlines()
    processes = [int(pid) for pid in first.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, processes))
    return lines


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "ending",
    ["env.close()", "pass", "raise SystemExit(3)", "os.kill(os.getpid(), 9)", TO_GROUP, f"{NOTE}; {TO_GROUP}"]
    + [f"{HANG}; {ending}" for ending in ("pass", "os.kill(os.getpid(), 9)", f"{NOTE}; {TO_GROUP}")],
)
def test_gym_vector_processes_end_with_the_program(tmp_path, ending):
    run_program(tmp_path, ending)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_gym_vector_goes_on_after_sigterm_to_the_whole_group(tmp_path):
    step = "env.step(torch.tensor([0, 0]))"
    lines = run_program(
        tmp_path, f"{NOTE}; {step}; {TO_GROUP}; {step}; print(env.restarts, env.state_dict()['lengths'])"
    )
    assert lines == ["noted", "0 [2, 2]"]


@pytest.mark.parametrize(("action", "key"), [(1, "wild"), (2, "wild"), (3, "wild"), (4, "wild"), (9, "reward")])
@MODES
def test_gym_vector_refuses_numbers_that_are_not_finite(vector_env, processes, action, key):
    env = vector_env(Faulty, num_envs=2, processes=processes)
    env.reset()
    env.step(torch.tensor([5, 0]))
    with pytest.raises(BadInput) as refusal:
        env.step(torch.tensor([0, action]))
    size = 1 if key == "reward" else 3
    assert str(refusal.value) == (
        f"environment 1, step 2 of its episode: '{key}' has 1 of {size} entries that are NaN, infinite or beyond "
        f"float32; mend the environment, or let such entries be set to 0 with --guard.zero_keys {key}, or such "
        f"episodes be dropped with --guard.drop_keys {key}"
    )


def test_gym_vector_refuses_a_reward_beyond_float32(vector_env):
    class Rich(Scripted):
        def step(self, action):
            return self.observe(), 1e39 if action else 3e38, False, False, {}

    env = vector_env(Rich)
    env.reset()
    assert take(env, 0)[1] == [np.float32(3e38)]
    with pytest.raises(BadInput, match="step 2 of its episode: 'reward' has 1 of 1"):
        take(env, 1)


def test_gym_vector_refuses_a_first_observation_that_is_not_finite(vector_env):
    with pytest.raises(BadInput, match="^environment 0, step 0 of its episode: 'wild' has 1 of 3 entries"):
        vector_env(lambda: Faulty(bad_starts=1)).reset()


@MODES
def test_gym_vector_sets_bad_numbers_to_zero_by_key(vector_env, processes):
    # What is set to 0 is not dropped.
    env = vector_env(Faulty, num_envs=2, processes=processes, zero_keys="wild|reward", drop_keys="w.*")
    env.reset()
    obs, reward, terminated, truncated, _ = env.step(torch.tensor([1, 5]))
    assert wild(obs) == [[1, 0, 1], [1, np.float32(-3e38), 1]] and reward.tolist() == [2, 2]
    obs, reward, *_ = env.step(torch.tensor([2, 9]))
    assert wild(obs) == [[2, 0, 2], [2, 1, 2]] and reward.tolist() == [2, 0]
    assert not (terminated | truncated).any() and env.bad_inputs == {"wild": 2, "reward": 1} and env.restarts == 0
    assert env.notices == [
        "environment 0, step 1 of its episode: 'wild' has 1 of 3 entries that are NaN, infinite or beyond float32; "
        "they are set to 0, now and whenever it happens again",
        "environment 1, step 2 of its episode: 'reward' has 1 of 1 entries that are NaN, infinite or beyond float32; "
        "they are set to 0, now and whenever it happens again",
    ]
    for _ in range(7):
        *_, info = env.step(torch.tensor([0, 0]))
    assert info["returns"] == [18, 16]


@pytest.mark.parametrize(("action", "key"), [(1, "wild"), (9, "reward")])
@MODES
def test_gym_vector_drops_the_rest_of_an_episode_by_key(vector_env, processes, action, key):
    # The bad step would also have ended the episode.
    env = vector_env(lambda: Faulty(length=2), num_envs=2, processes=processes, drop_keys=".*")
    env.reset()
    before = env.step(torch.tensor([0, 0]))[0]
    obs, reward, terminated, truncated, info = env.step(torch.tensor([action, 0]))
    assert obs["wild"][0].equal(before["wild"][0]) and wild(obs)[1] == [2, 1, 2]
    assert reward.tolist() == [0, 2] and terminated.tolist() == [False, True] and truncated.tolist() == [True, False]
    assert info["returns"] == [2, 4] and info["lengths"] == [2, 2]
    assert env.bad_inputs == {key: 1} and env.restarts == 0
    assert env.notices == [
        f"environment 0, step 2 of its episode: '{key}' has 1 of {1 if key == 'reward' else 3} entries that are NaN, "
        "infinite or beyond float32; the rest of the episode is dropped, now and whenever it happens again"
    ]
    obs, _, _, truncated, info = env.step(torch.tensor([0, 0]))
    assert wild(obs) == [[0, 0, 0]] * 2 and info["is_first"].all() and not truncated.any()
    assert obs["calm"][0] == np.float32(np.random.SeedSequence(0, spawn_key=(0, 2)).generate_state(1)[0])


@pytest.mark.parametrize("key", ["wil", "eward", ""])
def test_gym_vector_takes_only_keys_that_match_as_a_whole(vector_env, key):
    env = vector_env(Faulty, zero_keys=key, drop_keys=key)
    env.reset()
    with pytest.raises(BadInput):
        env.step(torch.tensor([1]))


@pytest.mark.parametrize("begun", [False, True])
def test_gym_vector_begins_another_episode_where_the_first_observation_is_dropped(vector_env, begun):
    def make(bad_starts):
        return vector_env(lambda: Faulty(bad_starts=bad_starts, length=1), drop_keys="wild")

    def begin(env):
        if not begun:
            return env.reset()
        env.load_state_dict({**saved, "bad_inputs": {"wild": 10}})
        obs, _, _, _, info = env.step(torch.tensor([0]))
        return obs, info

    good = make(0)
    good.reset()
    saved = good.state_dict()
    env = make(5)
    obs, info = begin(env)
    # The environment went through five seeds more.
    expected = np.random.SeedSequence(0, spawn_key=(0, 6 + begun)).generate_state(1)[0]
    assert obs["calm"].item() == np.float32(expected) and wild(obs) == [[0, 0, 0]] and info["is_first"].all()
    assert env.bad_inputs == {"wild": 5 + 10 * begun} and len([line for line in env.notices if "wild" in line]) == 1
    assert env.step(torch.tensor([0]))[1].tolist() == [2]
    with pytest.raises(BadInput, match="^environment 0, step 0 .* and so began 6 episodes in a row; mend"):
        begin(make(6))


def test_gym_vector_keeps_the_count_of_bad_inputs(vector_env, tmp_path):
    env = vector_env(Faulty, zero_keys="wild")
    env.reset()
    env.step(torch.tensor([1]))
    restored = vector_env(Faulty)
    restored.load_state_dict(through_file(env.state_dict(), tmp_path))
    assert restored.bad_inputs == {"wild": 1}


@MODES
@pytest.mark.parametrize(("make_env", "steps_before"), [(Faulty, 0), (Resumable, 8)])
def test_gym_vector_after_a_step_that_raised_has_the_state_before_it(
    vector_env, tmp_path, make_env, steps_before, processes
):
    env = vector_env(make_env, num_envs=2, processes=processes)
    env.reset()
    for _ in range(steps_before):
        env.step(torch.tensor([9, 0]))
    before = env.observe()
    with pytest.raises((BadInput, EnvironmentCrashed)):
        env.step(torch.tensor([9, 0]))
    restored = vector_env(make_env, num_envs=2, processes=processes)
    # The environments themselves went on, so that their episodes are lost.
    assert restored.load_state_dict(through_file(env.state_dict(), tmp_path)).tolist() == [True, True]
    assert all(value.equal(before[key]) for key, value in restored.observe().items())
    assert restored.step(torch.tensor([0, 0]))[4]["is_first"].all()


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
    with pytest.raises(ValueError, match="timeout is -1.0"):
        vector_env(timeout=-1.0)


@pytest.mark.parametrize("name", ["zero_keys", "drop_keys"])
def test_gym_vector_refuses_what_is_no_regular_expression(vector_env, name):
    with pytest.raises(ValueError, match=r"^'a\(' is no regular expression: missing \)"):
        vector_env(**{name: "a("})


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
