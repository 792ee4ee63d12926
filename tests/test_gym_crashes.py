"""Environments that crash, hang or die, in this process and in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from config import UserError
from envs import workers
from envs.crashes import EnvironmentCrashed, Restarts
from tests.gym_scenes import MODES, Scripted, seeds, take, times


@MODES
def test_gym_vector_ends_a_crashed_episode_as_truncated_and_goes_on(vector_env, processes):
    env = vector_env(num_envs=2, processes=processes)
    seed_before = seeds(env.reset()[0])
    take(env, 1, 1)
    time_now, reward, terminated, truncated, info = take(env, 9, 1)
    assert (time_now, reward, terminated, truncated) == ([1, 2], [0, 11], [False, False], [True, False])
    assert env.restarts.used == 1 and info["returns"] == [1] and info["decisions"] == 2
    (notice,) = env.notices
    assert notice.startswith("environment 0 of Scripted, step 2 ") and notice.endswith("the simulator is gone")
    obs, *_, info = env.step(torch.tensor([1, 1]))
    assert times(obs) == [0, 3] and info["is_first"].tolist() == [True, False]
    assert seeds(obs)[0] != seed_before[0] and seeds(obs)[1] == seed_before[1]
    # A second crash of the same environment is counted, and not announced.
    take(env, 9, 1)
    assert env.restarts.used == 2 and len(env.notices) == 1


@MODES
def test_gym_vector_gives_up_after_five_crashes_without_a_step(vector_env, processes):
    env = vector_env(processes=processes)
    env.reset()
    for _ in range(4):
        take(env, 9)
        take(env, 9)
    with pytest.raises(
        EnvironmentCrashed, match="^environment 0 of Scripted, step 1 .* crashed 5 times.*the simulator is gone$"
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
    assert env.restarts.used == 12


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
    assert (time_now, truncated, info["is_first"].tolist(), env.restarts.used) == ([0], [False], [True], 2)


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
    with pytest.raises(
        EnvironmentCrashed, match="environment 0 of Broken cannot begin its first episode: OSError: no licence"
    ):
        env.reset()


def test_gym_vector_lets_an_interrupt_through(vector_env):
    class Interrupted(Scripted):
        def step(self, action):
            raise KeyboardInterrupt

    env = vector_env(Interrupted)
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        take(env, 0)


@MODES
def test_gym_vector_ends_with_the_crash_after_those_that_it_may_replace(vector_env, processes):
    env = vector_env(processes=processes, restarts=Restarts(allowed=1))
    env.reset()
    for action in (0, 9, 0, 0):
        take(env, action)
    assert env.restarts.used == 1 and len(env.crashes) == 1
    with pytest.raises(
        EnvironmentCrashed, match="^environment 0 of Scripted, step 2 .* after 1 restart.*is gone$"
    ) as end:
        take(env, 9)
    assert end.value.crash.row == 0 and 'raise RuntimeError("the simulator' in end.value.crash.trace


def test_gym_vector_counts_restarts_on_from_its_state(vector_env):
    env = vector_env(restarts=Restarts(allowed=1))
    env.reset()
    take(env, 9)
    restored = vector_env(restarts=Restarts(allowed=1))
    restored.load_state_dict(env.state_dict())
    take(restored, 0)
    with pytest.raises(EnvironmentCrashed):
        take(restored, 9)


class Unprintable(Exception):
    def __str__(self):
        raise AttributeError("no message")


class Leaving(Scripted):
    """Action 7 leaves in the way that it was made for."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def step(self, action):
        if action == 7:
            raise self.way
        return super().step(action)


@MODES
@pytest.mark.parametrize(
    ("way", "line"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (SystemExit(), "SystemExit"),
        (GeneratorExit("gone"), "GeneratorExit: gone"),
        (Unprintable(), "Unprintable: .*__str__ raises AttributeError.*"),
    ],
)
def test_gym_vector_takes_any_way_out_for_a_crash(vector_env, processes, way, line):
    env = vector_env(lambda: Leaving(way), processes=processes, restarts=None)
    env.reset()
    with pytest.raises(EnvironmentCrashed, match=f"^environment 0 of Leaving, step 1 of its episode: {line}$") as end:
        take(env, 7)
    assert "raise self.way" in end.value.crash.trace


def test_gym_vector_takes_an_interrupt_of_the_environments_own_for_a_crash(vector_env, monkeypatch):
    # Where a handler is installed, as in training, Ctrl-C raises no KeyboardInterrupt that is not the handler's.
    def handler(_number, _frame):
        raise KeyboardInterrupt

    env = vector_env(lambda: Leaving(KeyboardInterrupt()), restarts=None)
    env.reset()
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(EnvironmentCrashed, match="KeyboardInterrupt$"):
            take(env, 7)
        monkeypatch.setattr(Scripted, "step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        env = vector_env(restarts=None)
        env.reset()
        with pytest.raises(KeyboardInterrupt):
            take(env, 0)
    finally:
        signal.signal(signal.SIGINT, before)


class Answering(Scripted):
    """Gives what it was made with in place of what gymnasium asks for; action 0 gives what is right."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def step(self, action):
        right = super().step(action)
        return self.answer(*right) if action else right


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda obs, reward, ended, _, info: (obs, reward, ended, info), "step.. gave 4 values"),
        (lambda obs, *_: obs, "step.. gave a ndarray"),
        (lambda obs, _, *others: (obs, None, *others), "gave a reward of type NoneType"),
        (lambda obs, _, *others: (obs, np.ones(2), *others), r"gave a reward of type ndarray of shape \(2,\)"),
        (lambda obs, reward, _, *others: (obs, reward, "no", *others), "gave a terminated of type str"),
        (lambda *parts: (*parts[:4], None), "gave an info of type NoneType"),
        (lambda _, *others: (None, *others), "'observation' is missing"),
        (lambda _, *others: (np.ones(3), *others), r"'observation' has shape \(3,\)"),
    ],
)
@MODES
def test_gym_vector_names_environment_and_step_of_an_answer_that_does_not_fit(vector_env, processes, answer, message):
    env = vector_env(lambda: Answering(answer), num_envs=2, processes=processes, restarts=None)
    env.reset()
    take(env, 0, 0)
    where = "environment 1 of Answering, step 2 of its episode"
    with pytest.raises((EnvironmentCrashed, UserError), match=f"^{where}: .*{message}"):
        take(env, 0, 1)


def test_gym_vector_tells_once_of_a_mask_without_a_legal_action(vector_env):
    class Stuck(Scripted):
        observation_space = spaces.Dict(x=spaces.Discrete(2), action_mask=spaces.MultiBinary(10))

        def observe(self):
            return {"x": 0, "action_mask": np.full(10, self.time == 0, np.int8)}

    env = vector_env(Stuck)
    env.reset()
    for _ in range(3):
        env.step(torch.tensor([0]))
    assert env.notices == [
        "environment 0 of Stuck, step 1 of its episode: its mask leaves no action; the first one is taken"
    ]


@pytest.mark.run
def test_gym_vector_replaces_a_process_that_dies(vector_env):
    class Fatal(Scripted):
        def step(self, action):
            if action == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(action)

    env = vector_env(Fatal, num_envs=2, processes=True)
    env.reset()
    assert take(env, 7, 1)[:4] == ([0, 1], [0, 1], [False, False], [True, False])
    assert "crashed and is restarted: its process died (exit code -9)" in env.notices[0]
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
    assert env.restarts.used == 2
    assert "crashed and is restarted: its process did not answer within 0.5 s" in env.notices[0]
    assert take(env, 1, 1, 1)[:2] == ([0, 2, 0], [0, 11, 0])


def test_gym_vector_gives_the_first_answer_more_time(vector_env):
    def slow(seconds):
        time.sleep(seconds)
        return Scripted()

    env = vector_env(lambda: slow(1.0), processes=True, timeout=0.6)
    env.reset()
    with pytest.raises(EnvironmentCrashed, match="cannot be made: its process did not answer within 1.5 s$"):
        vector_env(lambda: slow(600), processes=True, timeout=0.3)


@pytest.mark.run
def test_gym_vector_waits_for_ever_without_a_timeout(vector_env, monkeypatch):
    class Slow(Scripted):
        def step(self, action):
            time.sleep(0.3)
            return super().step(action)

    env = vector_env(Slow, processes=True, timeout=0.0)
    env.reset()
    assert take(env, 1)[1] == [1] and env.restarts.used == 0


@pytest.mark.run
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


@pytest.mark.run
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gym_vector_process_survives_signals_to_the_group(vector_env, number):
    class Known(Scripted):
        def step(self, action):
            os.kill(os.getpid(), number)
            return super().step(action)

    env = vector_env(Known, processes=True)
    env.reset()
    assert take(env, 1)[1] == [1]
    assert env.restarts.used == 0


@pytest.mark.run
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
    """The ids of the environments' processes of a program that ended so, given time to end; what else it printed."""
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
    deadline = time.monotonic() + 10
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return processes, lines


@pytest.mark.run
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "ending",
    ["env.close()", "pass", "raise SystemExit(3)", "os.kill(os.getpid(), 9)", TO_GROUP, f"{NOTE}; {TO_GROUP}"]
    + [f"{HANG}; {ending}" for ending in ("pass", "os.kill(os.getpid(), 9)", f"{NOTE}; {TO_GROUP}")],
)
def test_gym_vector_processes_end_with_the_program(tmp_path, ending):
    processes, _ = run_program(tmp_path, ending)
    assert len(processes) == 2 and not any(map(is_running, processes))


@pytest.mark.run
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_gym_vector_goes_on_after_sigterm_to_the_whole_group(tmp_path):
    step = "env.step(torch.tensor([0, 0]))"
    processes, lines = run_program(
        tmp_path, f"{NOTE}; {step}; {TO_GROUP}; {step}; print(env.restarts.used, env.state_dict()['lengths'])"
    )
    assert lines == ["noted", "0 [2, 2]"]
    assert len(processes) == 2 and not any(map(is_running, processes))
