"""Several ranks learn what one process learns that is fed all of it, stop together, and go on in any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import checkpoint
import dreamer
from config import ConfigError
from envs.tasks import ActionSpec
from settings.run import LoopSettings
from system import terminal
from system.ranks import Alone, here
from tests.rank_scenes import CASES, RANKS, ROOT, UPDATES, learn, on_ranks
from tests.run_scenes import is_group, loaded, read_metrics
from tests.scenes import debug_config, without_times
from tests.sweep_scenes import until
from training import collecting
from training.averages import MetricAverages
from training.collecting import Collecting, replay_folder
from training.replay import Replay
from training.resharing import of_rank
from training.run_lock import RunLock
from training.shares import share_of

CPU = torch.device("cpu")
FEW = 12
# What an agent learns, by the parts of its state that hold parameters.
LEARNT = ("model", "behavior", "soft")


def wait(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    """Wait for ranks to end well."""
    statuses = [process.wait(timeout=600) for process in processes]
    assert statuses == [0] * len(processes), (folder / "rank0.txt").read_text()[-2000:]


def learnt(state: dict[str, Any]) -> dict[str, Tensor]:
    agent = state["agent"]
    return {f"{part}.{name}": value for part in LEARNT if part in agent for name, value in agent[part].items()}


def learnt_on_ranks(cases: list[str], folder: Path, *, updates: int) -> list[dict[str, Any]]:
    """What each of two ranks has in the end, by the names of cases."""
    wait(on_ranks(["-m", "tests.rank_scenes", str(folder), str(updates), *cases], folder), folder)
    return [checkpoint.load(folder / f"rank{rank}.pt", CPU) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have learnt in a few updates."""
    cases = ["routing", "continuous_sac", "broken_continuous_sac"]
    return learnt_on_ranks(cases, tmp_path_factory.mktemp("ranks"), updates=FEW)


@pytest.fixture(scope="module")
def all_of_it(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have learnt of everything."""
    return learnt_on_ranks(list(CASES), tmp_path_factory.mktemp("ranks"), updates=UPDATES)


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """By how much any parameter of two agents differs."""
    others = learnt(other)
    return max(float((value - others[name]).abs().max()) for name, value in learnt(one).items())


@pytest.mark.run
@pytest.mark.parametrize("case", ["routing", "continuous_sac"])
def test_two_ranks_learn_what_one_process_learns_from_all_their_rows(case: str, some: list[dict[str, Any]]):
    first, second = (state[case] for state in some)
    assert farthest(first, second) == 0
    assert farthest(learn(case, FEW), first) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_learns_in_a_hundred_updates(case: str, all_of_it: list[dict[str, Any]]):
    first, second = (state[case] for state in all_of_it)
    assert farthest(first, second) == 0
    assert farthest(learn(case, UPDATES), first) < 1e-10


@pytest.mark.run
def test_update_that_is_not_finite_on_one_rank_is_skipped_on_both(some: list[dict[str, Any]]):
    first, second = (state["broken_continuous_sac"] for state in some)
    assert float(first["skips"]["q"]) == float(second["skips"]["q"]) == 1
    assert all(torch.equal(value, learnt(second)[name]) for name, value in learnt(first).items())
    assert "replayed reward" in second["notices"][0], "the rank that met it names it"


class Twins(Alone):
    """Two ranks that do the same."""

    count = 2

    def add(self, number: int) -> int:
        return 2 * number


class Scripted(Collecting):
    """A loop of `ENVS` environments, whose steps are acted on by as many of them as a script says."""

    def __init__(self, settings: LoopSettings, script: Iterable[int]) -> None:
        self.settings, self.total, self.script, self.ranks = settings, settings.steps, iter(script), Twins()
        self.agent, self.task, self.replay = Mock(rows_per_update=5), Mock(actions=ActionSpec("discrete", (2,))), Mock()
        self.step = self.step_before = self._uncounted = 0
        self.updates_owed = 0.0

    def _advance(self) -> None:
        for left in reversed(range(self._steps_apart(ENVS))):
            self._add({}, decisions=next(self.script), counted=not left)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {}


ENVS = 4
KEYS = ("log_every", "eval_every", "checkpoint_every")


def happenings(script: list[int], **changes: Any) -> tuple[list[tuple[int, list[str]]], int]:
    """At which steps updates were due or anything else, until a run's end, and how often ranks exchanged a number."""
    loop = Scripted(LoopSettings.of(debug_config(steps=2000, **changes)), script)
    found, exchanges = [], 0
    while loop.step < loop.total:
        loop.step_before = loop.step
        loop._advance()
        exchanges += 1
        due = [key for key in KEYS if loop._crossed(key)] + ["update"] * int(loop.updates_owed)
        loop.updates_owed -= int(loop.updates_owed)
        if due:
            found.append((loop.step, due))
    return found, exchanges


# Ratios by which no update is due exactly at the end of a step, where rounding would decide.
@pytest.mark.parametrize("train_ratio", [0.0, 0.0213, 0.3137, 7.0137])
@pytest.mark.parametrize("all_act", [True, False])
def test_ranks_that_count_seldom_do_all_at_the_same_steps(
    train_ratio: float, all_act: bool, monkeypatch: pytest.MonkeyPatch
):
    draws = torch.randint(0, ENVS + 1, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    script = [ENVS] * 2000 if all_act else draws
    changes = {"train_ratio": train_ratio, "prefill": 60, "log_every": 130, "eval_every": 0, "checkpoint_every": 700}
    seldom, few = happenings(script, **changes)
    monkeypatch.setattr(collecting, "MOST_APART", 1)
    each_step, many = happenings(script, **changes)
    assert seldom == each_step and len(seldom) > 10
    assert few < many / 2 if train_ratio < 0.1 else few <= many


SHORT = ["--configs", "debug", "--steps", "160", "--eval_every", "0", "--eval_instances", "2", "--log_every", "40"]


def has_logged(logdir: Path, step: int) -> bool:
    """Whether a run has come as far as that, by what it has logged."""
    log = logdir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))


def rank_said(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.txt").read_text()


@pytest.mark.run
def test_signal_at_one_rank_stops_all_and_one_process_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logdir = tmp_path / "run"
    processes = on_ranks(["dreamer.py", *SHORT, "--train_ratio", "32", "--logdir", str(logdir)], tmp_path)
    until(lambda: has_logged(logdir, 80))
    processes[1].send_signal(signal.SIGTERM)
    wait(processes, tmp_path)
    assert "stopped by SIGTERM at step" in rank_said(tmp_path, 0) and rank_said(tmp_path, 1) == ""
    state = loaded(logdir / checkpoint.LATEST)
    assert 80 <= state["step"] < 160 and len(state["ranks"]) == 1
    assert not [*logdir.rglob("*.tmp")] and (logdir / "lock").read_text() == ""
    dreamer.main([*SHORT, "--logdir", str(logdir)])
    assert f"goes on from its checkpoint at step {state['step']}" in capsys.readouterr().err
    after = loaded(logdir / checkpoint.LATEST)
    assert after["finished"] and "ranks" not in after
    saved = [state["replay"], state["ranks"][0]["replay"]]
    assert after["replay"]["num_envs"] == sum(each["num_envs"] for each in saved) == 4
    steps = [row["step"] for row in read_metrics(logdir)]
    assert steps == sorted(steps) and steps[-1] == 160


def kill_rank(arguments: list[str], folder: Path, logdir: Path, *, at: int) -> list[int]:
    processes = on_ranks([*arguments, "--logdir", str(logdir)], folder)
    until(lambda: has_logged(logdir, at))
    processes[1].kill()
    return [process.wait(timeout=60) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["dreamer.py", *SHORT, "--checkpoint_every", "40"],
        ["sac.py", "--configs", "tsp_sac", *SHORT, "--checkpoint_every", "40", "--batch_size", "8"],
    ],
    ids=["dreamer", "sac"],
)
def test_run_of_which_a_rank_is_killed_ends_like_an_undisturbed_one(arguments: list[str], tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wait(on_ranks([*arguments, "--logdir", str(whole)], tmp_path), tmp_path)
    assert kill_rank(arguments, tmp_path, killed, at=120) == [2, -signal.SIGKILL]
    assert "another rank has ended" in rank_said(tmp_path, 0).splitlines()[-1]
    wait(on_ranks([*arguments, "--logdir", str(killed)], tmp_path), tmp_path)
    assert without_times(read_metrics(killed)) == without_times(read_metrics(whole))
    one, other = (learnt(loaded(logdir / checkpoint.LATEST)) for logdir in (whole, killed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_torchrun_leaves_nothing(times: int, tmp_path: Path):
    logdir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dreamer.py"]
    command += [*SHORT, "--steps", "100000", "--logdir", str(logdir)]
    with (tmp_path / "told.txt").open("w") as told:
        run = subprocess.Popen(command, cwd=ROOT, stderr=told, stdout=told, start_new_session=True)
    until(lambda: has_logged(logdir, 80))
    for _ in range(times):
        # As a terminal does.
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.05)
    run.wait(60)
    until(lambda: not is_group(run.pid))
    lines = (tmp_path / "told.txt").read_text()
    assert ("stopped by SIGINT at step" in lines) == (times == 1), lines
    assert not [*logdir.rglob("*.tmp")]
    # The next process has it at once.
    RunLock(logdir).release()


def test_alone_leaves_everything_as_it_is():
    value = torch.tensor([1.0, 2.0])
    alone = here()
    assert isinstance(alone, Alone) and alone.is_first and alone.count == 1
    assert alone.average([value, None], [value]) == ([value, None], [value])
    assert alone.balance(value)(value) is value and alone.gather(value) is value
    assert alone.add(3) == 3 and alone.agree("SIGINT") == "SIGINT" and alone.collect(value) == [value]


class Pair(Alone):
    """The second of two."""

    index, count = 1, 2


def test_share_of_a_config_is_an_even_part():
    shared = share_of(debug_config(envs=4, batch_size=8, replay_capacity=100), Pair())
    assert (shared.envs, shared.batch_size, shared.replay_capacity) == (2, 4, 50)
    assert shared.replace(envs=4, batch_size=8, replay_capacity=100) == debug_config(
        envs=4, batch_size=8, replay_capacity=100
    )
    with pytest.raises(ConfigError, match="envs is 5, which 2 ranks share: give a multiple of 2"):
        share_of(debug_config(envs=5), Pair())


def test_averages_of_two_ranks_are_those_of_all_their_values():
    one, other, both = MetricAverages(), MetricAverages(), MetricAverages()
    for averages, values in ((one, [1.0, 5.0]), (other, [3.0]), (both, [1.0, 5.0, 3.0])):
        for value in values:
            number = torch.tensor(value)
            averages.add({"loss": number, "low_min": number, "high_max": number})
    other.add({"only_here": torch.tensor(2.0)})
    one.merge(other.state_dict())
    assert one.fetch() == {**both.fetch(), "only_here": 2.0}


SPACES = {"seen": ((1,), torch.float32), "action": ((), torch.int64)}


def lived_through(*, first: int, num_envs: int, columns: int) -> Replay:
    """Rows that tell their environment and column."""
    replay = Replay(SPACES, num_envs=num_envs, capacity=num_envs * 12, device=CPU)
    env = torch.arange(first, first + num_envs)
    for column in range(columns):
        flag = torch.full((num_envs,), column % 4 == 0)
        row = {"seen": (100.0 * env + column)[:, None], "action": env, "reward": env.float()}
        replay.add({**row, "is_first": flag, "is_last": flag, "is_terminal": flag})
    return replay


@pytest.mark.parametrize(("was", "now"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_replay_of_other_ranks_is_shared_out_anew(was: int, now: int, tmp_path: Path):
    envs, columns = 4, 17
    (tmp_path / "replay").mkdir()
    shares = []
    for rank in range(was):
        folder = replay_folder(tmp_path, rank)
        stored = lived_through(first=rank * envs // was, num_envs=envs // was, columns=columns)
        shares.append((folder, stored.save_chunks(folder)))
    whole = lived_through(first=0, num_envs=envs, columns=columns)
    for rank in range(now):
        share = envs // now
        found = Replay(SPACES, num_envs=share, capacity=share * 12, device=CPU)
        found.load_shares(shares, first=rank * share)
        assert (found.total, found.oldest) == (whole.total, whole.oldest)
        rows = slice(rank * share, (rank + 1) * share)
        for name, value in whole.rows.items():
            assert torch.equal(found.rows[name], value[rows])
        assert torch.equal(found.episode_start, whole.episode_start[rows])
        assert float(found.reward_max) >= float(whole.rows["reward"][rows].max())


def test_state_of_other_ranks_is_shared_out_by_environments():
    def part(first: int) -> dict[str, Any]:
        numbers = torch.arange(first, first + 2)
        return {
            "replay": {"num_envs": 2},
            "row": {"seen": numbers},
            "acting": {"latent": {"deter": numbers[:, None]}},
            "env": {"num_envs": 2, "ended": [first, first + 1], "obs": {"x": numbers}, "decisions": 10},
            "episode_return": numbers,
            "any_first": first > 0,
            "generators": {"acting": torch.tensor(first)},
            "averages": {"values": {"loss": torch.tensor(first)}, "counts": {}},
        }

    state = {"step": 7, **part(0), "ranks": [part(2)]}
    whole = of_rank(state, Alone(), {})
    assert whole["row"]["seen"].tolist() == whole["env"]["ended"] == [0, 1, 2, 3]
    assert whole["acting"]["latent"]["deter"].tolist() == [[0], [1], [2], [3]]
    assert (whole["env"]["num_envs"], whole["env"]["decisions"], whole["any_first"]) == (4, 20, True)
    same = of_rank(state, Pair(), {})
    assert same["row"]["seen"].tolist() == [2, 3] and int(same["generators"]["acting"]) == 2 and same["step"] == 7


def test_rank_name_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch):
    assert terminal.rank_name() == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert terminal.rank_name() == "rank 1"
    monkeypatch.setenv("RANK", "0")
    assert terminal.rank_name() == ""
