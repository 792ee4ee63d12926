"""Runs that learn from a log of trips alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import dreamer
import export
from benchmarks import trips
from dreamer import Dreamer
from parts.moves import MoveHead, Moves
from routing.frame import Frame
from routing.logged_costs import logged_costs
from routing.trips import Log, PlaceTable
from tests.run_scenes import CPU, NODES, Rows, loaded, same_weights
from tests.scenes import (
    CONFIG_PATH,
    Scene,
    episodes,
    generator,
    make_world_model,
    place_costs,
    refusal,
    routing,
    without_times,
    without_zero_outputs,
)
from tests.trip_scenes import COMMAND, UPDATES, study, write_log, write_places
from training import devices, loading
from training.trips import HELD_OUT, TripLog, _held_out

PRACTISE = ("--imag_policy", "1", "--actor.pointer.latent", "0", "--critic.latent", "false", "--imag_tours", "2")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """An undisturbed run."""
    logdir = tmp_path_factory.mktemp("study") / "run"
    return logdir, study(logdir, log, "--model.move_heads", "2")


# Moves


def test_moves_of_episodes_and_the_same_moves_logged_give_one_loss():
    model = make_world_model(routing("lanes"), move_error="absolute")
    without_zero_outputs(model.heads["reward"])
    batch = episodes(4, rules=model.rules)
    instance = model.first_instance(batch)
    moves = model.moves_of(batch, instance, None)
    chosen = moves.weight > 0
    logged = Moves(moves.origin[chosen], moves.target[chosen], moves.reward[chosen], moves.weight[chosen])
    assert int(chosen.sum()) == 4 * NODES
    torch.testing.assert_close(model.loss_on_moves(logged), model.move_loss(batch, instance, None))


def test_move_head_leaves_places_that_are_never_gone_to_at_zero():
    head = MoveHead(latent_size=0, units=8, layers=2, members=2, places=4, place_size=3, unseen=(1, 3))
    assert head.places is not None
    assert [bool(row.any()) for row in head.places.weight] == [False, True, False, True, False]


def test_dreamt_cases_are_first_observations_as_replay_gives_them():
    scene, batch = Scene(routing("lanes")), episodes(3)
    dreamt = scene.imagination.dreamt(3, generator())
    assert dreamt.keys() <= batch.keys()
    assert all(value.shape == batch[key][:, :1].shape for key, value in dreamt.items())
    for key in ("visited", "current_node", "action_mask"):
        assert torch.equal(dreamt[key], batch[key][:, :1])


# The log


def make_log(*, moves: int = 200, cost: float = 30.0) -> Log:
    draws = np.random.RandomState(0)
    origin, target = draws.uniform(0, 10, size=(2, moves, 2))
    return Log(origin, target, np.full(moves, cost), np.arange(moves) // 10, False, None, None, ())


def test_trip_log_holds_whole_trips_out():
    log = make_log()
    # Costs tell the trips apart.
    trips = TripLog(log._replace(cost=1.0 + log.trip), world=None, frame=None, device=CPU)
    learnt, held_out = (set(moves.reward.tolist()) for moves in (trips.learnt, trips.held_out))
    assert learnt.isdisjoint(held_out) and len(held_out) == 20 * HELD_OUT
    assert len(trips.held_out.reward) == 200 * HELD_OUT and len(trips) == 200 - 200 * HELD_OUT


def test_trip_log_earns_minus_one_half_on_average():
    trips = TripLog(make_log(), world=None, frame=None, device=CPU)
    assert torch.equal(trips.learnt.reward, torch.full_like(trips.learnt.reward, -0.5))
    assert trips.rewards.low == trips.rewards.high == -0.5


def test_trip_log_of_a_known_world_stays_in_its_units():
    log = make_log()._replace(origin=make_log().origin / 10, target=make_log().target / 10)
    trips = TripLog(log, world=routing("lanes").rules.costs, frame=None, device=CPU)
    assert trips.frame is None and trips.rewards.low == -30.0


def test_places_that_only_held_out_trips_go_to_are_unseen():
    log = make_log()
    ends = np.stack((np.arange(200) // 10, np.arange(200) // 10), 1)
    table = PlaceTable(tuple(map(str, range(20))), log.origin[::10], on_earth=False)
    trips = TripLog(log._replace(table=table, ends=ends), world=None, frame=None, device=CPU)
    assert trips.frame is not None and trips.held_out.places is not None
    unseen = set(logged_costs(trips.frame).unseen_places)
    assert unseen == set(trips.held_out.places[:, 0].tolist()) and len(unseen) == 2


# Runs


@pytest.mark.run
def test_study_learns_what_moves_cost(run: tuple[Path, Rows]):
    rows = run[1]
    errors = [row["valid_move_error"] for row in rows if "valid_move_error" in row]
    assert [row["step"] for row in rows if "valid_move_error" in row] == [0, 20, 40]
    assert errors[0] == pytest.approx(100, rel=1e-3) and errors[-1] < 50


@pytest.mark.run
def test_study_logs_errors_spread_and_updates(run: tuple[Path, Rows]):
    last = {key: value for row in run[1] for key, value in row.items()}
    assert {"move_error", "model_grad_norm", "fps", "eval_move_error", "eval_move_spread"} <= last.keys()
    assert -1 <= last["valid_move_spread_rank"] <= 1 and last["updates"] == UPDATES == last["step"]


@pytest.mark.run
def test_study_that_was_interrupted_ends_with_the_same_numbers(run: tuple[Path, Rows], log: Path, tmp_path: Path):
    study(tmp_path / "run", log, "--model.move_heads", "2", "--schedule.decay_from", "1", updates=20)
    study(tmp_path / "run", log, "--model.move_heads", "2", "--schedule.decay_from", "1")
    study(tmp_path / "whole", log, "--model.move_heads", "2", "--schedule.decay_from", "1")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.run
def test_study_repeats_itself(run: tuple[Path, Rows], log: Path, tmp_path: Path):
    assert without_times(study(tmp_path / "run", log, "--model.move_heads", "2")) == without_times(run[1])


@pytest.mark.run
def test_study_keeps_the_frame_of_its_log(run: tuple[Path, Rows]):
    state = loaded(run[0] / checkpoint.LATEST)
    frame = Frame.of(state["log"]["frame"])
    assert state["log"]["moves"] == 60 * NODES and frame.size.max() == pytest.approx(1.0)
    assert frame.unit != 1.0


@pytest.mark.run
def test_study_is_loaded_without_its_log(run: tuple[Path, Rows]):
    defaults = config.load_defaults(CONFIG_PATH)
    again = loading.load_run(run[0], make_agent=Dreamer, device=devices.prepare_torch(defaults), defaults=defaults)
    assert again.config.trips and "plan" in again.agent.players
    assert again.log is not None and again.log["checksum"] == loaded(run[0] / checkpoint.LATEST)["log"]["checksum"]


@pytest.mark.run
def test_study_is_evaluated_on_its_held_out_trips(run: tuple[Path, Rows], capsys: pytest.CaptureFixture[str]):
    dreamer.main(["--evaluate", str(run[0])])
    assert f"are wrong by {run[1][-1]['eval_move_error']:.2f} % of their mean" in capsys.readouterr().out


@pytest.mark.run
def test_exported_weights_know_the_frame(run: tuple[Path, Rows], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export.main([str(run[0]), str(tmp_path / "weights.pt")])
    assert "gap unknown" in capsys.readouterr().out
    assert Frame.of(loaded(tmp_path / "weights.pt")["log"]["frame"]).unit > 0


@pytest.mark.run
def test_study_in_a_known_world_is_judged_by_plans(log: Path, tmp_path: Path):
    rows = study(tmp_path / "run", log, "--cost", "lanes", "--plan_instances", "8")
    assert "eval_plan_gap" in rows[-1] and "eval_move_error" in rows[-1]
    assert "frame" not in loaded(tmp_path / "run" / checkpoint.LATEST)["log"]


@pytest.mark.run
def test_study_between_places_that_have_names(tmp_path: Path):
    world = place_costs()
    log, places = write_log(tmp_path, world), write_places(tmp_path, world.coords)
    rows = study(tmp_path / "run", log, "--places", str(places))
    assert rows[-1]["eval_move_error"] < 100
    assert Frame.of(loaded(tmp_path / "run" / checkpoint.LATEST)["log"]["frame"]).names[14] == "14"


@pytest.mark.run
@pytest.mark.parametrize("teacher", ["0", "1"])
def test_policy_practises_on_dreamt_maps(teacher: str, log: Path, tmp_path: Path):
    more = ("--imag_teacher", teacher, "--teacher.plans", "2", "--teacher.batch", "4")
    rows = study(tmp_path / "run", log, *PRACTISE, *more, "--cost", "lanes", "--eval_by", "policy")
    gaps = [row["valid_gap"] for row in rows if "valid_gap" in row]
    assert gaps[-1] < gaps[0]
    assert ("teacher_loss" in rows[1]) == (teacher == "1")


@pytest.mark.run
def test_study_says_which_rows_are_bad(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = log.read_text(encoding="utf-8") + "1,2,3,4,nan,0\n" * 12
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    study(tmp_path / "run", tmp_path / "bad.csv", updates=2)
    told = capsys.readouterr().err
    assert told.count("cost 'nan'") == 10 and "and 2 bad rows more" in told


# What is refused


@pytest.mark.run
def test_study_refuses_to_go_on_with_another_log(
    run: tuple[Path, Rows], log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study(tmp_path / "run", log, updates=2)
    other = write_log(tmp_path, tours=50)
    log_then = log.read_bytes()
    try:
        log.write_bytes(other.read_bytes())
        line = refusal(capsys, *COMMAND, "--trips", str(log), "--updates", "4", "--logdir", str(tmp_path / "run"))
    finally:
        log.write_bytes(log_then)
    assert "has learnt from another log, of 360 moves" in line


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--places", "places.csv"), "add --trips FILE"),
        (("--trips", "LOG", "--curriculum", "[[6, null]]"), "a log of trips needs none"),
        (("--trips", "missing.csv"), "missing.csv: cannot be read"),
        (("--trips", "LOG", "--cost", "stretch"), "depend on what no log shows"),
        (("--trips", "LOG", "--cost", "lanes", "--places", "LOG"), "says itself where nodes lie"),
        (("--trips", "LOG", "--imag_policy", "1"), "nothing that reads latents"),
        (("--trips", "LOG", "--imag_reward", "simulated"), "imag_reward: head"),
        (("--trips", "LOG", "--model.reward_latent", "true"), "model.reward_latent: false"),
        (("--trips", "LOG", *PRACTISE, "--imag_start", "rows", "--imag_first", "stored"), "imag_start: episodes"),
    ],
)
def test_study_refuses(
    arguments: tuple[str, ...], cause: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = [str(log) if argument == "LOG" else argument for argument in arguments]
    line = refusal(capsys, *COMMAND, *named, "--eval_by", "policy", "--logdir", str(tmp_path / "run"))
    assert cause in line
    assert not (tmp_path / "run").exists()


def test_study_refuses_gymnasium_tasks(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refusal(capsys, "--task", "gym_CartPole-v1", "--trips", str(log), "--logdir", str(tmp_path / "run"))
    assert "trips is for routing" in line


def test_study_refuses_a_log_outside_of_a_known_world(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = log.read_text(encoding="utf-8").replace("\n0.", "\n7.")
    (tmp_path / "far.csv").write_text(lines, encoding="utf-8")
    line = refusal(capsys, *COMMAND, "--trips", str(tmp_path / "far.csv"), "--cost", "lanes")
    assert "outside the unit square" in line


def test_log_needs_moves_that_are_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [[k % 7, k % 5, k % 3, 2, 1 + k % 4, 0 if k else 1] for k in range(300)]
    trips.write(tmp_path / "trips.csv", ["from_x", "from_y", "to_x", "to_y", "cost", "trip"], rows)
    with pytest.raises(SystemExit):
        study(tmp_path / "run", tmp_path / "trips.csv")
    assert "only 1 moves are left to learn from" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.run
def test_held_out_moves_may_all_be_free(tmp_path: Path):
    rows = [[k % 7, k % 5, k % 3, 2, 1 + k % 4, k // 10] for k in range(300)]
    held = _held_out(np.array([row[-1] for row in rows]))
    for row in np.flatnonzero(held):
        rows[row][4] = 0
    trips.write(tmp_path / "trips.csv", ["from_x", "from_y", "to_x", "to_y", "cost", "trip"], rows)
    metrics = study(tmp_path / "run", tmp_path / "trips.csv", updates=20)
    assert np.isfinite(metrics[-1]["eval_move_error"])
