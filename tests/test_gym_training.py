"""Whole runs on gymnasium tasks, as a user starts them, with networks too small to learn anything."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import checkpoint
import dreamer
import sac
from comparing.runs import METRICS
from config import UserError
from envs.bad_inputs import BadInput
from envs.crashes import Crash, EnvironmentCrashed
from envs.gym_vector import GymVectorEnv
from tests.conftest import shapes_executed
from tests.gym_runs import COMMAND, ENVS, STEPS, train
from tests.scenes import decisions_in, refusal, saved_memory, stored_rows, without_times
from training import episodes, replay_room
from training.episodes import GymEvaluator
from training.host_replay import HostReplay
from training.replay import Replay

CPU = torch.device("cpu")
TASKS = ("CartPole-v1", "Pendulum-v1", "Switches-v0", "SwitchesNoRules-v0", "TMaze-v0", "PixelGrid-v0")


def loaded(logdir: Path) -> dict[str, Any]:
    return checkpoint.load(logdir / checkpoint.LATEST, CPU)


class TrainedRun:
    """An undisturbed run."""

    def __init__(self, logdir: Path, env_id: str) -> None:
        self.logdir = logdir
        self.rows = train(logdir, env_id)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedRun]:
    """One run of every task that was asked for so far; `run_of` adds to it."""
    return {}


@pytest.fixture
def run_of(runs: dict[str, TrainedRun], tmp_path_factory: pytest.TempPathFactory):
    def run_of(env_id: str) -> TrainedRun:
        if env_id not in runs:
            with shapes_executed(True):
                runs[env_id] = TrainedRun(tmp_path_factory.mktemp(env_id) / "run", env_id)
        return runs[env_id]

    return run_of


# To the end


@pytest.mark.parametrize("env_id", TASKS)
def test_task_trains_to_its_end(run_of, env_id: str):
    rows = run_of(env_id).rows
    assert all(value is not None for row in rows for value in row.values()), "a value that is not finite"
    steps = {name: [row["step"] for row in rows if name in row] for name in ("valid_return", "eval_return")}
    assert steps["valid_return"][0] == 0 and len(steps["valid_return"]) == 2
    assert steps["eval_return"] == [rows[-1]["step"]]
    # An episode may begin in the step in which the last decisions are made.
    assert STEPS <= rows[-1]["step"] < STEPS + ENVS
    logged = set().union(*rows)
    assert {"eval_length", "model_loss", "actor_loss", "critic_loss", "cont_loss", "decoder_loss"} < logged
    # 4 replayed rows for each env step after the prefill, in batches of 4 windows of 12 rows.
    updates = [row["updates"] for row in rows if "updates" in row][-1]
    assert updates == pytest.approx((STEPS - 48) * 4 / 48, abs=1)


def test_masked_actions_are_legal_in_training_and_with_rules_in_imagination(run_of):
    for env_id in ("Switches-v0", "SwitchesNoRules-v0"):
        rows = run_of(env_id).rows
        assert {row["env_miss_rate"] for row in rows if "env_miss_rate" in row} == {0.0}
        assert "mask_loss" in set().union(*rows)
        # Every episode presses all 6 switches once.
        assert {row["train_length"] for row in rows if "train_length" in row} == {6.0}
        assert rows[-1]["eval_length"] == 6
    assert {row["miss_rate"] for row in run_of("Switches-v0").rows if "miss_rate" in row} == {0.0}
    assert "miss_rate" not in set().union(*run_of("SwitchesNoRules-v0").rows)


def test_replay_holds_the_goals_that_were_reached(run_of):
    spaces = {"observation": ((64, 64, 3), torch.uint8), "action": ((), torch.int64)}
    _, rows = stored_rows(run_of("PixelGrid-v0").logdir, spaces)
    found = rows["is_terminal"]
    # Episodes also end by the time limit.
    assert found.any() and rows["is_last"][found].all()
    # The goal gives 1, and each move costs 0.01.
    torch.testing.assert_close(rows["reward"][found], torch.full((int(found.sum()),), 0.99))
    assert (rows["reward"][~found] <= 0).all()


def test_replay_keeps_a_latent_of_every_row(run_of):
    spaces = {"observation": ((3,), torch.float32), "action": ((), torch.int64)}
    _, rows = stored_rows(run_of("TMaze-v0").logdir, spaces)
    # Also of the rows that the random prefill collected; only an episode's first may still be all zeros.
    assert ((rows["context_deter"] != 0).any(-1) | rows["is_first"]).all()
    assert (rows["context_stoch"] >= 0).all() and (rows["context_stoch"] < 4).all()


def test_tensorboard_gets_a_picture_of_the_open_loop(run_of):
    for env_id, key in (("PixelGrid-v0", "observation"), ("Switches-v0", "values")):
        events = EventAccumulator(str(run_of(env_id).logdir), size_guidance={"images": 0}).Reload()
        images = events.Images(f"view/validation_open_loop_{key}")
        assert len(images) == 2 and min(images[0].width, images[0].height) > 100


# Stopped and resumed


class Killed(Exception):
    """What a killed process does not live to see."""


def interrupt(monkeypatch: pytest.MonkeyPatch, *, column: int, how: str) -> None:
    """End the run at the moment in which its replay gets a certain column."""
    add = Replay.add

    def add_and_stop(self: Replay, row: dict[str, torch.Tensor]) -> None:
        add(self, row)
        if self.total == column:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Replay, "add", add_and_stop)


def train_interrupted(logdir: Path, env_id: str, *arguments: str, column: int, how: str) -> int:
    """A run that ends before its time; the step that it is to go on from."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, column=column, how=how)
        if how == "killed":
            with pytest.raises(Killed):
                train(logdir, env_id, *arguments)
        else:
            train(logdir, env_id, *arguments)
    return loaded(logdir)["step"]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_environment_with_a_state_resumes_exactly(run_of, tmp_path: Path, how: str):
    whole, logdir = run_of("TMaze-v0"), tmp_path / "run"
    step = train_interrupted(logdir, "TMaze-v0", column=40, how=how)
    # By then some updates have been made; the killed run goes back to its last checkpoint.
    assert 100 <= step < 160 and bool(step < 110) == (how == "killed")
    assert not loaded(logdir)["row"]["is_last"].all(), "no episode runs, so nothing has to be resumed"
    assert without_times(train(logdir, "TMaze-v0")) == without_times(whole.rows)
    mine, theirs = loaded(logdir), loaded(whole.logdir)
    for part in ("model", "behavior"):
        assert all(torch.equal(value, theirs["agent"][part][name]) for name, value in mine["agent"][part].items())
    remembered, expected = saved_memory(logdir), saved_memory(whole.logdir)
    assert remembered and all(torch.equal(value, expected[name]) for name, value in remembered.items())


def test_run_whose_replay_the_host_keeps_is_the_same(run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = run_of("TMaze-v0")
    monkeypatch.setattr(replay_room, "on_host", lambda *_choices, **_needed: True)
    made: list[type] = []
    rewrite = HostReplay.rewrite

    def noted(self: HostReplay, *arguments: Any) -> None:
        made.append(type(self))
        rewrite(self, *arguments)

    monkeypatch.setattr(HostReplay, "rewrite", noted)
    assert without_times(train(tmp_path, "TMaze-v0")) == without_times(whole.rows)
    remembered, expected = saved_memory(tmp_path), saved_memory(whole.logdir)
    assert made and all(torch.equal(value, expected[name]) for name, value in remembered.items())


@pytest.mark.run
def test_environment_without_a_state_begins_new_episodes_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    logdir = tmp_path / "run"
    train_interrupted(logdir, "CartPole-v1", column=40, how="stopped")
    before = loaded(logdir)
    running = ~before["row"]["is_last"]
    assert running.any()
    capsys.readouterr()
    rows = train(logdir, "CartPole-v1")
    assert capsys.readouterr().err.count("could not be resumed and end as truncated") == 1
    assert "eval_return" in rows[-1]
    state, stored = stored_rows(logdir, {"observation": ((4,), torch.float32), "action": ((), torch.int64)})
    # The row that was pending is closed as a time limit would close it, and the next begins an episode.
    assert stored["is_last"][:, 40].all()
    assert not stored["is_terminal"][running, 40].any()
    assert stored["is_first"][:, 41].all() and (stored["reward"][:, 41] == 0).all()
    assert torch.equal(stored["observation"][:, 40], before["row"]["observation"])
    assert state["step"] == decisions_in(state, stored)


@pytest.mark.run
def test_step_that_bad_input_stopped_is_stored_once_when_the_run_goes_on(tmp_path: Path):
    mend, calls = GymVectorEnv._mend, []

    def refuse_once(self: GymVectorEnv, reward: np.ndarray) -> list[int]:
        calls.append(self.num_envs)
        # Evaluation has fewer environments.
        if calls.count(ENVS) == 20:
            raise BadInput("environment 0 gave no number")
        return mend(self, reward)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(GymVectorEnv, "_mend", refuse_once)
        with pytest.raises(SystemExit):
            train(tmp_path, "CartPole-v1")
    stopped = loaded(tmp_path)
    assert 0 < stopped["step"] < STEPS
    train(tmp_path, "CartPole-v1")
    state, stored = stored_rows(tmp_path, {"observation": ((4,), torch.float32), "action": ((), torch.int64)})
    assert state["step"] == decisions_in(state, stored)
    pending = stopped["row"]["observation"][:, None]
    assert (stored["observation"] == pending).flatten(2).all(-1).sum(1).tolist() == [1] * ENVS


def refuse(*_arguments: Any) -> Any:
    raise UserError("observation 'speed' has shape (3,), but its space is Box(2)")


@pytest.mark.run
def test_step_whose_observation_does_not_fit_saves_the_run(tmp_path: Path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        add = Replay.add

        def add_and_break(self: Replay, row: dict[str, torch.Tensor]) -> None:
            add(self, row)
            if self.total == 10:
                monkeypatch.setattr(GymVectorEnv, "_finish_step", refuse)

        monkeypatch.setattr(Replay, "add", add_and_break)
        with pytest.raises(SystemExit):
            train(tmp_path, "CartPole-v1", "--train_ratio", "0")
    state, stored = stored_rows(tmp_path, {"observation": ((4,), torch.float32), "action": ((), torch.int64)})
    assert stored["action"].shape[1] == 10 and 0 < state["step"] == decisions_in(state, stored) < 48


@pytest.mark.run
@pytest.mark.parametrize(
    ("error", "begun"),
    [
        (BadInput("no number"), "step 56"),
        (EnvironmentCrashed("crashed 5 times", Crash(0, "its traceback")), "test"),
        (UserError("shape"), "test"),
    ],
)
def test_evaluation_that_an_environment_ends_saves_the_run(tmp_path: Path, error: Exception, begun: str):
    validate, calls = GymEvaluator.validate, []

    def stop(*_arguments: Any) -> Any:
        raise error

    def stop_the_second(self: GymEvaluator, agent: Any) -> Any:
        calls.append(self)
        return validate(self, agent) if len(calls) == 1 else stop()

    command = ("--train_ratio", "0", "--eval_every", "56", "--checkpoint_every", "200", "--steps", "64")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if begun == "test":
            monkeypatch.setattr(GymEvaluator, "test", stop)
        else:
            monkeypatch.setattr(GymEvaluator, "validate", stop_the_second)
        with pytest.raises(SystemExit):
            train(tmp_path, "CartPole-v1", *command)
    stopped = loaded(tmp_path)
    assert stopped["step"] >= (64 if begun == "test" else 56) and not stopped["finished"]
    assert "eval_return" in train(tmp_path, "CartPole-v1", *command)[-1]


@pytest.mark.slow
def test_environments_in_processes_train_and_resume_like_those_in_one(run_of, tmp_path: Path):
    logdir = tmp_path / "run"
    train_interrupted(logdir, "TMaze-v0", "--env_processes", "true", column=40, how="stopped")
    rows = train(logdir, "TMaze-v0", "--env_processes", "true")
    assert without_times(rows) == without_times(run_of("TMaze-v0").rows)


@pytest.mark.run
def test_evaluations_are_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    off = ("--eval_every", "0", "--eval_episodes", "0", "--train_ratio", "0")
    rows = train(tmp_path, "TMaze-v0", *off)
    assert not {name for row in rows for name in row if name.startswith(("valid_", "eval_"))}
    assert loaded(tmp_path)["finished"]
    assert "eval_episodes is 0" in refusal(capsys, "--evaluate", str(tmp_path), "--device", "cpu")
    dreamer.main(["--evaluate", str(tmp_path), "--device", "cpu", "--eval_episodes", "2"])
    assert ": 2 episodes, mean return" in capsys.readouterr().out


def test_evaluation_in_the_environments_of_training_disturbs_none_that_have_a_state(run_of, tmp_path: Path):
    rows = train(tmp_path, "TMaze-v0", "--eval_env", "training")
    assert without_times(rows) == without_times(run_of("TMaze-v0").rows)


# Evaluated again


def test_evaluate_prints_mean_and_interval_and_films(run_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, folder = run_of("PixelGrid-v0"), tmp_path / "film"
    before = {path: path.stat().st_mtime_ns for path in run.logdir.rglob("*")}
    capsys.readouterr()
    dreamer.main(["--evaluate", str(run.logdir), "--video", str(folder), "--device", "cpu"])
    report, film = capsys.readouterr().out.splitlines()
    begin = f"{run.logdir} at step {run.rows[-1]['step']}: 3 episodes, mean return {run.rows[-1]['eval_return']:.4g}"
    assert report.startswith(f"{begin} +- ") and "(95 %), from " in report
    assert film == f"film: {folder / 'episodes.gif'}"
    with Image.open(folder / "episodes.gif") as gif:
        assert gif.size == (64, 64)
    assert {path: path.stat().st_mtime_ns for path in run.logdir.rglob("*")} == before


@pytest.mark.run
def test_lines_of_an_evaluation_are_printed_wherever_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(episodes, "_shortened", lambda _notices: ("environment 0 crashed",))
    train(tmp_path, "TMaze-v0", "--steps", "48")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "crashed" in line] == [
        "validation: environment 0 crashed",
        "test: environment 0 crashed",
    ]
    dreamer.main(["--evaluate", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().err.splitlines() == ["environment 0 crashed"]


def test_evaluate_takes_the_number_of_episodes_and_says_what_it_does_not_take(run_of, capsys):
    run = run_of("CartPole-v1")
    others = ["--init", "one.pt", "--discount", "0.5"]
    dreamer.main(["--evaluate", str(run.logdir), "--device", "cpu", "--eval_episodes", "3", *others])
    printed = capsys.readouterr()
    assert ": 3 episodes, mean return" in printed.out
    assert "--init --discount changes nothing" in printed.err


def test_run_of_another_program_is_refused(run_of, tmp_path: Path, capsys):
    run = run_of("CartPole-v1")
    before = sorted(run.logdir.rglob("*"))
    for arguments in (["--evaluate", str(run.logdir)], ["--task", "gym_CartPole-v1", "--logdir", str(run.logdir)]):
        with pytest.raises(SystemExit):
            sac.main([*arguments, "--device", "cpu"])
        assert "holds a Dreamer, where a SAC is needed" in capsys.readouterr().err
    # Not even an event file was added.
    assert sorted(run.logdir.rglob("*")) == before


def test_evaluate_takes_a_checkpoint_file_and_a_config_of_an_older_version(run_of, tmp_path: Path, capsys):
    run, logdir = run_of("TMaze-v0"), tmp_path / "run"
    shutil.copytree(run.logdir, logdir)
    text = (logdir / "config.yaml").read_text()
    assert "  replay_scale: 0.3\n" in text
    (logdir / "config.yaml").write_text(text.replace("  replay_scale: 0.3\n", ""))
    capsys.readouterr()
    dreamer.main(["--evaluate", str(logdir / "previous.pt"), "--device", "cpu"])
    assert f"{logdir / 'previous.pt'} at step 2" in capsys.readouterr().out


# An environment of one's own


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gym_CartPol-v1"], "no environment is registered as 'CartPol-v1'; did you mean CartPole-v1"),
        (["--task", "gym_TMaze-v7"], "did you mean TMaze-v0"),
        (["--task", "gymCartPole-v1"], "gym_ID for a gymnasium environment such as gym_CartPole-v1"),
        (["--import", "no_such_module"], "module 'no_such_module' cannot be imported"),
        (["--prefill", "47"], "prefill is 47; 4 environments need more for a window of 12 rows each: add --prefill 48"),
        (["--replay_capacity", "40"], "window of 12 rows each: add --replay_capacity 48"),
        (["--prefill_policy", "nearest"], "prefill_policy is for routing, and gym_TMaze-v0 does not read it"),
        (["--imag_horizon", "episode"], "imag_horizon as a number of steps"),
        (["--target_clip", "auto"], "a task without rules needs none, or two numbers"),
        (["--actor.type", "tsp_pointer"], "actor.type tsp_pointer points at nodes"),
        (["--model.encode_keys", "image"], "no key of the observation matches 'image'; there are observation"),
        (["--valid_episodes", "0"], "valid_episodes is 0; it must be at least 1"),
        (["--model.norm", "batch"], "model.norm is 'batch'; choose one of rms, layer"),
        (["--video", "film"], "--video goes with --evaluate"),
        (["--evaluate", "no/such/run"], "no/such/run does not exist"),
        (["--evaluate", "no/such/run", "--eval_episodes", "0"], "eval_episodes is 0; it must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_answered_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    task = [] if "--task" in arguments else ["--task", "gym_TMaze-v0"]
    assert message in refusal(capsys, *COMMAND, *task, *arguments, "--logdir", str(tmp_path))
    assert not (tmp_path / METRICS).exists()


def test_run_of_another_number_of_environments_is_refused(run_of, capsys, tmp_path: Path):
    logdir = tmp_path / "run"
    shutil.copytree(run_of("TMaze-v0").logdir, logdir)
    line = refusal(capsys, *COMMAND, "--task", "gym_TMaze-v0", "--envs", "2", "--logdir", str(logdir))
    assert "has envs 4" in line


@pytest.mark.run
def test_film_of_a_routing_run_is_refused(capsys, tmp_path: Path):
    logdir = tmp_path / "run"
    dreamer.main(["--configs", "debug", "--steps", "48", "--device", "cpu", "--logdir", str(logdir)])
    line = refusal(capsys, *COMMAND, "--evaluate", str(logdir), "--video", str(tmp_path))
    assert "--video films gymnasium tasks; python solve.py draws tours" in line
