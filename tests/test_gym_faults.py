"""What an environment can do to a run: every fault, in training and in evaluation, with restarts and without."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from envs import workers
from envs.crashes import EnvironmentCrashed, Restarts
from tests.gym_scenes import MODES, Scripted, take
from tests.test_gym_crashes import is_running

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
# So much more than it has at first may a leaking environment take.
ROOM = 2**28


class Faulty(Scripted):
    """Episodes of 3 steps; in one way of these, each goes wrong in its second one."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.episodes, self.leaked = fault, 0, list[bytearray]()
        if fault == "leak":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """The first episode begins, whatever happens later."""
        self.episodes += 1
        if self.fault == "reset" and self.episodes == 2:
            raise ConnectionError("port in use")
        return super().reset(seed=seed)

    def step(self, action: int) -> Any:
        """The fault, where it is one of steps."""
        obs, reward, terminated, truncated, info = super().step(action)
        if self.time == 2:
            self._go_wrong()
        if terminated and self.fault == "end":
            raise ValueError("nothing left")
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        """Many a simulator falls at this hurdle alone."""
        if self.fault == "close":
            raise OSError("already closed")

    def _go_wrong(self) -> None:
        if self.fault == "step":
            raise RuntimeError("the simulator is gone")
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "exit":
            os._exit(3)
        while self.fault == "leak":
            self.leaked.append(bytearray(ROOM // 8))


LINES = {
    "step": "step 2 of its episode.*: RuntimeError: the simulator is gone",
    "end": "step 3 of its episode.*: ValueError: nothing left",
    "reset": "step 0 of its episode.*: ConnectionError: port in use",
    "hang": "step 2 of its episode.*: its process did not answer within 0.5 s",
    "exit": r"step 2 of its episode.*: its process died \(exit code 3\)",
    "leak": "step 2 of its episode.*: MemoryError",
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
NEEDS_PROCESS = ("hang", "exit", "leak")


def until_the_fault(env: Any, steps: int = 12) -> None:
    """Some episodes, if nothing goes wrong."""
    env.reset()
    for _ in range(steps):
        take(env, 0)


def made(vector_env: Any, fault: str, monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> Any:
    monkeypatch.setattr(workers, "FIRST_ANSWER", 60)
    processes = fault in NEEDS_PROCESS
    return vector_env(lambda: Faulty(fault), processes=processes, timeout=0.5 if fault == "hang" else 60.0, **keywords)


@EVALUATION
@pytest.mark.parametrize("fault", LINES)
def test_fault_ends_what_may_replace_no_environment(vector_env, fault, evaluation, monkeypatch):
    env = made(vector_env, fault, monkeypatch, evaluation=evaluation, restarts=Restarts())
    with pytest.raises(EnvironmentCrashed, match=f"^environment 0 of Faulty, {LINES[fault]}$") as end:
        until_the_fault(env)
    assert end.value.crash.row == 0 and "\n" not in str(end.value)


@EVALUATION
@pytest.mark.parametrize("fault", LINES)
def test_fault_truncates_the_episode_where_the_environment_is_replaced(vector_env, fault, evaluation, monkeypatch):
    env = made(vector_env, fault, monkeypatch, evaluation=evaluation, restarts=Restarts(allowed=2))
    env.reset()
    before = [worker._process.pid for worker in env._workers] if fault in NEEDS_PROCESS else []
    ends = []
    # Two steps and the end of an episode that went wrong, or whole episodes of which the second cannot begin.
    while env.restarts.used < 1:
        *_, terminated, truncated, _ = take(env, 0)
        ends.append((terminated, truncated))
    expected = {"reset": ([True], [False])}.get(fault, ([False], [True]))
    assert [end for end in ends if any(map(any, end))] == [expected]
    assert len(env.crashes) == 1 and "Faulty" in env.notices[0]
    if before:
        deadline = time.monotonic() + 10
        while is_running(before[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_running(before[0]), "what it has taken of the machine is free again"
    # It goes on with another one, up to the next fault.
    assert take(env, 0)[0] is not None


@MODES
@EVALUATION
def test_fault_of_closing_is_nobodys_concern(vector_env, evaluation, processes):
    env = vector_env(lambda: Faulty("close"), processes=processes, evaluation=evaluation, restarts=Restarts())
    until_the_fault(env)
    env.close()
    assert env.restarts.used == 0 and env.notices == []


def test_process_that_the_system_kills_is_told_as_such(vector_env):
    env = vector_env(lambda: Faulty("none"), processes=True)
    env.reset()
    os.kill(env._workers[0]._process.pid, 9)
    take(env, 0)
    assert "its process died (exit code -9), as where memory runs out" in env.notices[0]


@pytest.mark.slow
def test_run_that_its_environment_ends_goes_on_from_its_last_checkpoint(tmp_path):
    (tmp_path / "exiting.py").write_text(
        textwrap.dedent(
            """
            import os
            import gymnasium
            from gymnasium.envs.classic_control import CartPoleEnv

            class Exiting(CartPoleEnv):
                steps = 0

                def step(self, action):
                    Exiting.steps += 1
                    if os.environ.get("EXITS") and Exiting.steps == 100:
                        os._exit(7)
                    return super().step(action)

            gymnasium.register("Exiting-v0", Exiting, max_episode_steps=20)
            """
        )
    )
    command = [sys.executable, "dreamer.py", "--configs", "debug", "--task", "gym_Exiting-v0", "--import", "exiting"]
    command += ["--steps", "120", "--checkpoint_every", "60", "--eval_every", "0", "--eval_episodes", "0"]
    command += ["--train_ratio", "0", "--device", "cpu", "--logdir", str(tmp_path / "run")]
    ends = []
    for exits in ("1", ""):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "EXITS": exits}
        ends.append(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120))
    assert [end.returncode for end in ends] == [7, 0]
    assert "goes on from its checkpoint at step 6" in ends[1].stderr
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST, torch.device("cpu"))["step"] >= 120
