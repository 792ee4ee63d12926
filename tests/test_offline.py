"""Recorded episodes: what of them is learnt from, how they lie in replay, and runs that begin with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import checkpoint
import dreamer
import record
import sac
from checkpoint import CheckpointError
from config import UserError
from envs.routing import CVRPRules
from envs.tasks import ActionSpec, ObservationKey, ObservationTask, RoutingTask, Task
from tests.scenes import CPU, NODES, ROUTING, SWITCHES, SWITCHING, generator, refusal, vector, without_times
from training import episode_files
from training.episode_files import EpisodeFolder
from training.recorded import Record
from training.replay import Replay

CLASSES = ObservationKey("classes", (1,), torch.int64, classes=(4,))
TASK = ObservationTask(ActionSpec("discrete", (3,)), {"seen": vector(1), "kind": CLASSES})
PENDULUM = ObservationTask(ActionSpec("continuous", (1,)), {"observation": vector(3)})
TOURS = {
    "coords": ((NODES, 2), torch.float32),
    "action_mask": ((NODES,), torch.bool),
    "action": ((), torch.int64),
}
DEBUG = ("--configs", "debug", "--eval_every", "0", "--log_every", "5")


def episode(decisions: int, *, number: int = 0, terminal: bool = True) -> dict[str, np.ndarray]:
    """Decisions whose observation is 100 times the episode's number and the row, and whose reward is the row."""
    row = np.arange(decisions + 1)
    return {
        "seen": (100.0 * number + row)[:, None].astype(np.float32),
        "kind": np.full((decisions + 1, 1), number % 4),
        "action": row % 3,
        "reward": row.astype(np.float32),
        "is_first": row == 0,
        "is_last": row == decisions,
        "is_terminal": (row == decisions) & terminal,
    }


def record_of(folder: Path, *episodes: dict[str, np.ndarray], task: Task = TASK, spaces: Any = None) -> Record:
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(episodes):
        episode_files.write(folder / f"{number:02d}.npz", each)
    spaces = TASK.spaces if spaces is None else spaces
    return Record(EpisodeFolder(folder), task=task, spaces=spaces)


def filled(record: Record, num_envs: int, **choices: Any) -> Replay:
    replay = Replay(TASK.spaces, num_envs=num_envs, capacity=100_000, device=CPU, **choices)
    record.fill(replay, reward_scale=1.0)
    return replay


# In replay


def test_numbers_of_any_shape_are_read_in_a_row(tmp_path: Path):
    task = ObservationTask(ActionSpec("discrete", (3,)), {"seen": vector(6)})
    wide = {**episode(2), "seen": np.arange(18, dtype=np.float32).reshape(3, 2, 3)}
    record = record_of(tmp_path, wide, task=task, spaces=task.spaces)
    assert record._read(0)["seen"].tolist() == np.arange(18.0).reshape(3, 6).tolist()
    other = {**episode(2), "seen": np.zeros((3, 2, 4), np.float32)}
    with pytest.raises(UserError, match=r"has seen of shape \[3, 2, 4\], where \[3, 6\] is needed"):
        record_of(tmp_path, other, task=task, spaces=task.spaces)


def test_episodes_lie_in_replay_one_after_the_other_for_each_environment(tmp_path: Path):
    lengths = [5, 1, 1, 2]
    replay = filled(record_of(tmp_path, *(episode(count, number=k) for k, count in enumerate(lengths))), 2)
    # The first has 6 rows, so that the others of 2, 2 and 3 go to the second; then it lacks one.
    seen = replay.rows["seen"][:, : replay.total, 0].tolist()
    assert seen == [[0, 1, 2, 3, 4, 5, 0], [100, 101, 200, 201, 300, 301, 302]]
    assert replay.rows["is_first"][:, : replay.total].sum(-1).tolist() == [2, 3]
    assert replay.episode_start[1, :7].tolist() == [0] * 2 + [2] * 2 + [4] * 3


def test_an_episode_that_fills_up_is_cut_as_by_a_time_limit(tmp_path: Path):
    replay = filled(record_of(tmp_path, episode(6, number=0), episode(3, number=1)), 2)
    assert replay.rows["seen"][1, :7, 0].tolist() == [100, 101, 102, 103, 0, 1, 2]
    assert replay.rows["is_last"][1, :7].tolist() == [False, False, False, True, False, False, True]
    assert replay.rows["is_terminal"][1, :7].tolist() == [False, False, False, True, False, False, False]


def test_recorded_rows_do_not_come_first_as_fresh_ones_do(tmp_path: Path):
    replay = filled(record_of(tmp_path, episode(6, number=0)), 1)
    assert replay.total == 7 and replay.fresh.take(9, 2, oldest=0, total=replay.total + 2) == (1, 7, 0)


def test_rewards_are_scaled_and_their_range_is_known(tmp_path: Path):
    replay = Replay(TASK.spaces, num_envs=1, capacity=100, device=CPU)
    record_of(tmp_path, episode(4)).fill(replay, reward_scale=0.5)
    assert replay.rows["reward"][0, :5].tolist() == [0, 0.5, 1, 1.5, 2]
    assert (float(replay.rewards.low), float(replay.rewards.high)) == (0.5, 2)


def test_what_is_done_after_the_end_is_forgotten_and_latents_are_empty(tmp_path: Path):
    last = {**episode(3), "action": np.array([1, 2, 0, 77])}
    replay = filled(record_of(tmp_path, last), 1, memory={"latent": ((2,), torch.float16)})
    assert replay.rows["action"][0, :4].tolist() == [1, 2, 0, 0]
    assert not replay.memory["latent"].any()


def test_long_streams_are_handed_over_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    each = [episode(count, number=k) for k, count in enumerate([9, 4, 7, 3, 8])]
    whole = filled(record_of(tmp_path, *each), 2)
    monkeypatch.setattr("training.recorded.COLUMNS_AT_ONCE", 3)
    parts = filled(record_of(tmp_path, *each), 2)
    assert whole.total == parts.total
    assert all(torch.equal(whole.rows[name], parts.rows[name]) for name in whole.rows)


def test_whole_tours_are_sampled_from_recorded_ones(tmp_path: Path):
    record.main(["--configs", "debug", "--task", "tsp", "--episodes", "5", "--envs", "3", "--out", str(tmp_path)])
    log = Record(EpisodeFolder(tmp_path), task=ROUTING, spaces=TOURS)
    assert log.rows == 5 * (NODES + 1)
    replay = Replay(TOURS, num_envs=2, capacity=1000, device=CPU)
    log.fill(replay, reward_scale=1.0)
    batch = replay.sample_episodes(6, NODES + 1, generator=generator())
    assert batch["is_first"][:, 0].all() and batch["is_last"][:, -1].all()
    assert (batch["coords"] == batch["coords"][:, :1]).all()
    assert batch["action"][:, :-1].sort(-1).values.tolist() == [list(range(NODES))] * 6


# Faults


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seen": None}, "lacks seen"),
        ({"seen": np.zeros((5, 2), np.float32)}, r"has seen of shape \[5, 2\], where \[5, 1\] is needed"),
        ({"seen": np.array([["x"]] * 5)}, "has seen as <U1, where float32 is needed"),
        ({"action": np.zeros(5, np.float32)}, "has action as float32, where int64 is needed"),
        ({"seen": np.array([[0], [1], [np.nan], [0], [0]])}, "has a number that is not finite in seen, row 2"),
        ({"seen": np.full((5, 1), 1e300)}, "has a number that is not finite in seen, row 0"),
        ({"reward": np.array([1, 0, 0, 0, 0.0])}, "has a reward in its first row"),
        ({"reward": np.zeros(())}, "has 0 rows"),
        ({"is_first": np.zeros(5, bool)}, "is_first has to be true in the first row alone"),
        ({"is_last": np.ones(5, bool)}, "is_last has to be true in the last row alone"),
        ({"is_terminal": np.ones(5, bool)}, "has is_terminal before its last row"),
        ({"is_last": np.array([0, 0, 0, 0, 1])}, "has is_last as int64, where bool is needed"),
        ({"action": np.array([0, 3, 0, 0, 0])}, "has an action outside 0 to 2"),
        ({"action": np.array([0, -1, 0, 0, 0])}, "has an action outside 0 to 2"),
        ({"kind": np.array([[4]] * 5)}, "has a class in kind that its space does not have"),
    ],
)
def test_what_is_none_of_the_task_is_told(changes: dict[str, Any], fault: str, tmp_path: Path):
    bad = {name: value for name, value in {**episode(4), **changes}.items() if value is not None}
    log = record_of(tmp_path, episode(4), bad, episode(4))
    assert len(log) == 2
    (line,) = log.faults
    assert re.search(f"01.npz .*{fault}", line), line


def test_forbidden_actions_and_tours_that_are_none_are_told(tmp_path: Path):
    steps = SWITCHES + 1
    pressing = {
        "values": np.zeros((steps, SWITCHES), np.float32),
        "pressed": np.zeros((steps, SWITCHES), np.float32),
        "action_mask": np.eye(SWITCHES, dtype=bool)[[0, 1, 2, 3, 0]],
        "action": np.array([0, 1, 2, 3, 3]),
        **{name: value for name, value in episode(SWITCHES).items() if name not in ("seen", "kind", "action")},
    }
    wrong = {**pressing, "action": np.array([0, 1, 3, 3, 3])}
    log = record_of(tmp_path, pressing, wrong, task=SWITCHING, spaces=SWITCHING.spaces)
    assert log.faults == ["01.npz has an action in row 2 that its action_mask forbids"]
    assert RoutingTask.of(CVRPRules, 5).fault({"reward": np.zeros(7)}) is None
    assert ROUTING.fault({"reward": np.zeros(NODES)}) == f"has {NODES} rows; an episode of this task has {NODES + 1}"


def test_nothing_is_learnt_where_most_episodes_are_bad(tmp_path: Path):
    with pytest.raises(UserError, match=r"2 of 3 episodes cannot be used, so that nothing is learnt; the first: 01"):
        record_of(tmp_path, episode(3), {}, {})


def test_further_arrays_are_passed_over(tmp_path: Path):
    assert len(record_of(tmp_path, {**episode(3), "note": np.array(["fine"])})) == 1


def test_episodes_that_have_changed_are_not_gone_on_with(tmp_path: Path):
    facts = record_of(tmp_path, episode(3)).facts()
    assert facts == {"episodes": 1, "rows": 4, "checksum": facts["checksum"]}
    other = record_of(tmp_path, {**episode(3), "reward": np.array([0, 1, 2, 4], np.float32)})
    with pytest.raises(CheckpointError, match="has learnt from other episodes, 1 of 4 rows"):
        other.require_same(facts, Path("latest.pt"))


# Runs


@pytest.fixture(scope="module")
def poles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poles") / "episodes"
    record.main(["--task", "gym_CartPole-v1", "--episodes", "12", "--envs", "5", "--out", str(folder)])
    return folder


def metrics(logdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def offline(folder: Path, logdir: Path, *more: str) -> list[dict[str, Any]]:
    dreamer.main([*DEBUG, "--task", "gym_CartPole-v1", "--replay", str(folder), "--logdir", str(logdir), *more])
    return metrics(logdir)


@pytest.mark.run
def test_a_run_learns_from_episodes_without_an_env_step(
    poles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with monkeypatch.context() as patch:
        patch.setattr(gymnasium.Env, "step", None)
        patch.setattr("envs.gym_vector.GymVectorEnv.step", None)
        (tmp_path / "bad").mkdir()
        for path in poles.iterdir():
            (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "bad" / "cut.npz").write_bytes(b"PK")
        rows = offline(tmp_path / "bad", tmp_path / "run", "--steps", "0", "--updates", "10", "--eval_episodes", "0")
    err = capsys.readouterr().err
    assert "12 episodes of" in err and "no env step is made" in err and "a new run, to update 10" in err
    assert "bad     cut.npz is damaged, or no .npz file" in err
    assert [row["step"] for row in rows if "model_loss" in row] == [5, 10]
    assert rows[-1]["updates"] == 10


@pytest.mark.run
def test_a_run_goes_on_in_the_environment_from_what_was_recorded(poles: Path, tmp_path: Path):
    logdir = tmp_path / "run"
    evaluated = offline(poles, logdir, "--steps", "0", "--updates", "8", "--eval_episodes", "1")[-1]
    assert evaluated["step"] == 8 and "eval_return" in evaluated
    before = checkpoint.load(logdir / "latest.pt", CPU)
    offline(poles, logdir, "--steps", "40", "--updates", "8", "--eval_episodes", "1")
    after = checkpoint.load(logdir / "latest.pt", CPU)
    assert before["row"] == {} and after["row"]
    # No random prefill comes first: updates go with every step.
    assert after["step"] >= 48 and after["updates"] == 8 + (after["step"] - 8) * 8 // 48
    columns = [each["replay"]["saved_totals"][1] for each in (before, after)]
    assert columns[1] > columns[0] > 0


@pytest.mark.run
def test_a_run_that_was_stopped_among_the_episodes_ends_with_the_same_numbers(poles: Path, tmp_path: Path):
    options = ("--eval_episodes", "1", "--replay_context", "true")
    whole = offline(poles, tmp_path / "whole", "--steps", "24", "--updates", "10", *options)
    offline(poles, tmp_path / "parts", "--steps", "0", "--updates", "5", *options)
    offline(poles, tmp_path / "parts", "--steps", "24", "--updates", "10", *options)
    theirs = [row for row in without_times(metrics(tmp_path / "parts")) if row["step"] > 5]
    ours = [row for row in without_times(whole) if row["step"] > 5]
    assert len(ours) > 2 and [row.get("model_loss") for row in theirs] == [row.get("model_loss") for row in ours]


@pytest.mark.run
def test_a_run_does_not_go_on_with_other_episodes(poles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(poles, tmp_path / "poles")
    offline(tmp_path / "poles", tmp_path / "run", "--steps", "0", "--updates", "2", "--eval_episodes", "0")
    (tmp_path / "poles" / "episode_000000.npz").unlink()
    command = [*DEBUG, "--task", "gym_CartPole-v1", "--replay", str(tmp_path / "poles"), "--steps", "0"]
    line = refusal(capsys, *command, "--updates", "4", "--logdir", str(tmp_path / "run"))
    assert "has learnt from other episodes, 12 of" in line


@pytest.mark.run
def test_sac_learns_from_episodes_too(poles: Path, tmp_path: Path):
    command = [
        "--task",
        "gym_CartPole-v1",
        "--replay",
        str(poles),
        "--steps",
        "0",
        "--updates",
        "6",
        "--log_every",
        "3",
    ]
    sac.main([*command, "--logdir", str(tmp_path / "run"), "--eval_every", "0", "--eval_episodes", "1"])
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "q_loss" in row] == [3, 6] and "eval_return" in rows[-1]


@pytest.mark.run
def test_tours_are_learnt_from_and_gone_on_with(tmp_path: Path):
    tours, logdir = tmp_path / "tours", tmp_path / "run"
    record.main(["--configs", "debug", "--task", "cvrp", "--episodes", "10", "--out", str(tours)])
    command = [
        *DEBUG,
        "--task",
        "cvrp",
        "--imag_first",
        "stored",
        "--replay",
        str(tours),
        "--logdir",
        str(logdir),
        "--updates",
        "6",
    ]
    dreamer.main([*command, "--steps", "0"])
    dreamer.main([*command, "--steps", "20"])
    rows = metrics(logdir)
    assert "eval_gap" in rows[-1] and rows[-1]["step"] >= 26
    assert {row["env_miss_rate"] for row in rows if "env_miss_rate" in row} == {0.0}


@pytest.mark.run
def test_a_trained_agent_is_recorded(poles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    offline(poles, tmp_path / "run", "--steps", "0", "--updates", "2", "--eval_episodes", "0")
    record.main(["--policy", str(tmp_path / "run"), "--episodes", "3", "--envs", "2", "--out", str(tmp_path / "its")])
    assert "3 episodes, mean return" in capsys.readouterr().out
    assert len(EpisodeFolder(tmp_path / "its").names) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "0"], "steps is 0; it must be at least 1, or add --replay FOLDER"),
        (["--replay", "nowhere"], "nowhere is no folder"),
        (["--replay", "EPISODES", "--steps", "0", "--updates", "0"], "steps and updates are both 0"),
        (["--replay", "EPISODES", "--trips", "t.csv", "--task", "tsp"], "trips and replay are two things"),
        (["--replay", "EPISODES", "--replay_capacity", "100"], "give --replay_capacity"),
        (["--replay", "EPISODES", "--batch_length", "400"], "updates take 400 in a row: give more episodes"),
        (["--replay", "EPISODES", "--task", "gym_Pendulum-v1"], "12 of 12 episodes cannot be used"),
    ],
)
def test_mistakes_are_told_before_anything_is_learnt(
    arguments: list[str], line: str, poles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [str(poles) if each == "EPISODES" else each for each in arguments]
    task = [] if "--task" in given else ["--task", "gym_CartPole-v1"]
    assert line in refusal(capsys, *DEBUG, *task, *given, "--logdir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Recording


def test_every_environment_records_as_many_episodes_up_to_one(poles: Path):
    names = EpisodeFolder(poles).names
    assert names == [f"episode_{number:06d}.npz" for number in range(12)]
    for name in names:
        arrays = episode_files.read(poles / name)
        assert arrays.keys() == {"observation", "action", "reward", "is_first", "is_last", "is_terminal"}
        assert arrays["reward"].tolist() == [0.0] + [1.0] * (len(arrays["reward"]) - 1)
        assert arrays["is_terminal"][-1] and set(arrays["action"].tolist()) <= {0, 1}


def test_what_was_recorded_is_what_the_environment_does(poles: Path):
    env = gymnasium.make("CartPole-v1").unwrapped
    arrays = episode_files.read(poles / "episode_000003.npz")
    env.reset()
    for row in range(len(arrays["reward"]) - 1):
        env.state = arrays["observation"][row].astype(np.float64)  # type: ignore[attr-defined]
        env.steps_beyond_terminated = None  # type: ignore[attr-defined]
        obs, _, terminated, _, _ = env.step(int(arrays["action"][row]))
        np.testing.assert_allclose(obs, arrays["observation"][row + 1], rtol=1e-4, atol=1e-5)
        assert terminated == arrays["is_terminal"][row + 1]


def test_an_endless_episode_is_recorded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "LONGEST_EPISODE", 7)
    record.main(["--task", "gym_Pendulum-v1", "--episodes", "3", "--envs", "1", "--out", str(tmp_path)])
    parts = [episode_files.read(tmp_path / name) for name in EpisodeFolder(tmp_path).names]
    assert [len(part["reward"]) for part in parts] == [8, 8, 8]
    # The next part begins where the last one was cut.
    assert (parts[0]["observation"][-1] == parts[1]["observation"][0]).all()
    assert len(Record(EpisodeFolder(tmp_path), task=PENDULUM, spaces=PENDULUM.spaces)) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give the folder for the episodes: --out FOLDER"),
        (["--out", "EPISODES"], "has episodes already; give another --out"),
        (["--out", "new", "--episodes", "0"], "--episodes is '0'; it takes a whole number from 1"),
        (["--out", "new", "--policy", "nowhere"], "nowhere does not exist; give a run's folder"),
        (["--out", "new", "--task", "text"], "prompts have no episodes to record"),
    ],
)
def test_mistakes_of_recording_are_told_in_a_line(
    arguments: list[str], line: str, poles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        record.main(["--task", "gym_CartPole-v1", *(str(poles) if each == "EPISODES" else each for each in arguments)])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("record.py: ") and line in told and not (tmp_path / "new").exists()
