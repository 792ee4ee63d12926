from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

import config
from comparing import runs
from comparing.runs import CONFIG_FILE, METRICS, UnreadableRunError
from config import Config
from training.logger import Logger
from training.run_lock import RunLock


def write_run(logdir: Path, *, seed: int = 0, finished: bool = False, **settings: object) -> Path:
    logdir.mkdir(parents=True)
    config.save(Config({"seed": seed, "logdir": str(logdir), **settings}), logdir / CONFIG_FILE)
    logger = Logger(logdir)
    logger.scalars(0, 0.0, {"valid_gap": 100.0})
    logger.scalars(100, 60.0, {"valid_gap": 5.0, "loss": float("nan")})
    if finished:
        logger.scalars(100, 61.0, {"eval_gap": 6.0, "eval_return": -4.0})
    logger.close()
    return logdir


def write_events(logdir: Path, events: list[Event]) -> Path:
    """One file; its own first event, the version, is written at the time of the first of `events`."""
    logdir.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(logdir))
    for event in events:
        writer.add_event(event)
    writer.close()
    (path,) = sorted(logdir.glob("*tfevents*"), key=os.path.getmtime)[-1:]
    return path


def scalar(step: int, value: float, *, seconds: float = 0.0, tag: str = "loss") -> Event:
    wall_time = time.time() + seconds
    return Event(step=step, wall_time=wall_time, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def test_read_gives_every_metric_over_steps_and_minutes(tmp_path):
    run = runs.read(write_run(tmp_path / "a", seed=3, finished=True))
    assert (run.steps, run.minutes, run.seed, run.status) == (100, 61 / 60, 3, "finished")
    gaps = run.series["valid_gap"]
    assert (gaps.steps.tolist(), gaps.minutes.tolist(), gaps.values.tolist()) == ([0, 100], [0, 1], [100, 5])
    assert np.isnan(run.series["loss"].values).all()


def test_read_tells_a_running_run_from_a_stopped_one(tmp_path):
    logdir = write_run(tmp_path / "a")
    lock = RunLock(logdir)
    assert runs.read(logdir).status == "running"
    lock.release()
    assert runs.read(logdir).status == "stopped"
    (logdir / "lock").write_text("999999999\n")
    assert runs.read(logdir).status == "stopped"


def test_read_is_not_misled_by_a_process_that_has_got_the_id_of_a_dead_one(tmp_path):
    logdir = write_run(tmp_path / "a")
    (logdir / "lock").write_text(f"{os.getpid()}\n")
    assert runs.read(logdir).status == "stopped"


def test_read_knows_a_running_run_whose_process_cannot_be_seen(tmp_path):
    logdir = write_run(tmp_path / "a")
    lock = RunLock(logdir)
    (logdir / "lock").write_text("999999999\n")
    assert runs.read(logdir).status == "running"
    lock.release()
    assert (logdir / "lock").read_text() == ""


def test_read_passes_over_a_row_that_is_being_written(tmp_path):
    logdir = write_run(tmp_path / "a")
    with (logdir / METRICS).open("a") as file:
        file.write('{"step": 200, "sec')
    run = runs.read(logdir)
    assert run.steps == 100 and run.notes == ()


def test_read_names_broken_lines_and_keeps_the_others(tmp_path):
    logdir = write_run(tmp_path / "a")
    with (logdir / METRICS).open("a") as file:
        file.write('{"step": 200\n[1]\n{"step": "x", "seconds": 1}\n{"step": 300, "seconds": 90.0}\n')
    run = runs.read(logdir)
    assert run.steps == 300
    assert run.notes == ("metrics.jsonl: 3 of 6 lines left out, the first is line 3",)


def test_read_names_a_broken_config_and_goes_on(tmp_path):
    logdir = write_run(tmp_path / "a-seed7")
    (logdir / CONFIG_FILE).write_text("a: [")
    run = runs.read(logdir)
    assert run.config is None and run.seed == 7
    assert CONFIG_FILE in run.notes[0]


def test_read_takes_event_files_where_there_are_no_rows(tmp_path):
    logdir = tmp_path / "foreign_seed4"
    write_events(logdir, [scalar(0, 1.0), scalar(10, 0.5, seconds=120)])
    run = runs.read(logdir)
    assert (run.steps, run.seed, run.status) == (10, 4, "event files")
    assert run.series["loss"].values.tolist() == [1.0, 0.5]
    assert run.minutes == pytest.approx(2, abs=0.05)


def test_read_of_our_own_events_equals_that_of_the_rows(tmp_path):
    logdir = write_run(tmp_path / "a")
    rows = runs.read(logdir).series["valid_gap"]
    (logdir / METRICS).unlink()
    events = runs.read(logdir).series["valid_gap"]
    assert np.array_equal(events.steps, rows.steps) and np.array_equal(events.values, rows.values)


def test_read_joins_what_stands_in_no_section_and_in_one(tmp_path):
    events = [
        scalar(0, 9.0, tag="valid_gap"),
        scalar(10, 5.0, tag="score/valid_gap"),
        scalar(10, 1.0, tag="value/q_mean"),
    ]
    events += [scalar(10, 2.0, tag=foreign) for foreign in ("rollout/ep_rew_mean", "score/loss", "value/")]
    write_events(tmp_path, events)
    read = {name: one.values.tolist() for name, one in runs.read(tmp_path).series.items()}
    foreign = {"rollout/ep_rew_mean": [2.0], "score/loss": [2.0], "value/": [2.0]}
    assert read == {"valid_gap": [9.0, 5.0], "train/q_mean": [1.0], **foreign}


LOGGED = {
    "score": "valid_gap valid_return train_return episode_return train_return_scaled valid_length",
    "test": "eval_gap eval_return",
    "actor": "actor_entropy actor_entropy_share",
    "value": "value_min target_min target_clip_rate advantage_scale critic_error train/q_mean value_outside_rate",
    "training": "model_loss q_loss actor_saturation train/alpha actor_grad_norm model_clip_rate train/q_grad_norm",
    "world_model": "mask_loss dyn_loss imag_mask_step_0 imag_return miss_rate mask_accuracy prior_entropy move_error",
    "time": "fps updates checkpoint_seconds checkpoint_megabytes",
    "view": "validation_tour",
}


@pytest.mark.parametrize(("section", "name"), [(part, name) for part in LOGGED for name in LOGGED[part].split()])
def test_tag_is_a_section_and_the_last_part_of_the_name_which_it_tells(section, name):
    assert runs.tag(name) == f"{section}/{name.removeprefix('train/')}"
    assert runs.metric_name(runs.tag(name)) == name


def test_tag_puts_score_among_the_two_sections_that_tensorboard_opens():
    assert sorted(section for section, _ in runs.SECTIONS)[:2] == ["actor", "score"]


def test_read_takes_scalars_in_tensor_form_and_passes_over_the_rest(tmp_path):
    values = [
        Summary.Value(tag="return", tensor=make_tensor_proto(np.float32(2.5))),
        Summary.Value(tag="text", tensor=make_tensor_proto(np.array(["words"], dtype=object))),
        Summary.Value(tag="weights", tensor=make_tensor_proto(np.zeros(3, dtype=np.float32))),
    ]
    write_events(tmp_path / "a", [Event(step=1, wall_time=time.time(), summary=Summary(value=values))])
    assert {name: one.values.tolist() for name, one in runs.read(tmp_path / "a").series.items()} == {"return": [2.5]}


def test_read_drops_events_that_a_resumed_run_wrote_anew(tmp_path):
    start = Event(step=20, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
    write_events(tmp_path / "a", [scalar(10, 1.0), scalar(20, 2.0), scalar(30, 3.0), start, scalar(20, 5.0)])
    loss = runs.read(tmp_path / "a").series["loss"]
    assert (loss.steps.tolist(), loss.values.tolist()) == ([10, 20], [1.0, 5.0])


@pytest.mark.parametrize("cut", [3, 20])
def test_read_keeps_what_stands_before_a_torn_record(tmp_path, cut):
    path = write_events(tmp_path / "a", [scalar(10, 1.0), scalar(20, 2.0)])
    path.write_bytes(path.read_bytes()[:-cut])
    run = runs.read(tmp_path / "a")
    assert run.series["loss"].values.tolist() == [1.0]
    assert "is broken from byte" in run.notes[0]


def test_read_of_events_with_bytes_flipped_at_random_gives_no_other_value(tmp_path):
    values = [Summary.Value(tag="return", tensor=make_tensor_proto(np.float32(2.5)))]
    event = Event(step=1, wall_time=time.time(), summary=Summary(value=values))
    path = write_events(tmp_path / "a", [scalar(0, 1.0), event, scalar(2, 3.0), scalar(3, 4.0)])
    content, draws = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(content)
        broken[draws.integers(len(content))] ^= int(draws.integers(1, 256))
        path.write_bytes(broken)
        try:
            run = runs.read(tmp_path / "a")
        except UnreadableRunError:  # nothing stands before the first record
            continue
        assert run.series["loss"].values.tolist() == [1.0, 3.0, 4.0][: len(run.series["loss"].values)]
        assert run.steps == 3 or "is broken from byte" in run.notes[0]


def test_read_names_a_tensor_that_contradicts_itself(tmp_path):
    torn = make_tensor_proto(np.float32(2.5))
    torn.ClearField("float_val")
    torn.tensor_content = b"abc"
    event = Event(step=1, wall_time=time.time(), summary=Summary(value=[Summary.Value(tag="return", tensor=torn)]))
    write_events(tmp_path / "a", [event, scalar(2, 3.0)])
    run = runs.read(tmp_path / "a")
    assert run.series["loss"].values.tolist() == [3.0]
    assert "is broken at step 1" in run.notes[0]


@pytest.mark.parametrize("seed", ["words", {"a": 1}, [1, 2], 1.5])
def test_read_knows_no_seed_that_is_no_whole_number(tmp_path, seed):
    run = runs.read(write_run(tmp_path / "a", **{"seed": seed}))
    assert run.seed is None
    assert "seed is" in run.notes[0] and "no whole number" in run.notes[0]


@pytest.mark.parametrize("content", ["when: 2020-13-45", "a: &a [*a]", f"seed: {'9' * 5000}"])
def test_read_names_a_config_of_others_that_cannot_be_one(tmp_path, content):
    (write_run(tmp_path / "a") / CONFIG_FILE).write_text(content)
    run = runs.read(tmp_path / "a")
    assert run.config is None and CONFIG_FILE in run.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 1{"0" * 400}, "seconds": 1.0}}',
        f'{{"step": 1, "seconds": 1.0, "loss": 1{"0" * 400}}}',
        '{"step": NaN, "seconds": 1.0}',
        '{"step": 1, "seconds": 1e999}',
        '{"step": null, "seconds": 1.0}',
        "[" * 100_000,
    ],
)
def test_read_leaves_out_numbers_without_a_place(tmp_path, line):
    logdir = write_run(tmp_path / "a")
    with (logdir / METRICS).open("a") as file:
        file.write(f"{line}\n")
    run = runs.read(logdir)
    assert run.steps == 100
    assert run.notes == ("metrics.jsonl: 1 of 3 lines left out, the first is line 3",)


def test_read_refuses_what_holds_nothing(tmp_path):
    (tmp_path / METRICS).write_text("")
    with pytest.raises(UnreadableRunError, match="nothing is logged yet"):
        runs.read(tmp_path)
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"garbage, and more of it")
    with pytest.raises(UnreadableRunError, match="is broken from byte 0 on"):
        runs.read(tmp_path)


def test_find_descends_to_runs(tmp_path):
    first, second = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "b")
    assert runs.find(tmp_path) == [second, first]
    assert runs.find(second) == [second]


def test_find_refuses_what_is_no_logdir(tmp_path):
    (tmp_path / "file").touch()
    for name, words in (("none", "does not exist"), ("file", "is no folder"), ("", "has neither metrics.jsonl")):
        with pytest.raises(UnreadableRunError, match=words):
            runs.find(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tsp_attn-seed12", ("tsp_attn", 12)),
        ("dqn_seed1_big", ("dqn_big", 1)),
        ("few/2", ("few", 2)),
        ("CartPole-v1__dqn__7__1640000000", ("CartPole-v1__dqn", 7)),
        ("tsp_20", ("tsp_20", None)),
    ],
)
def test_without_seed_takes_the_seed_out(name, parts):
    assert runs.without_seed(name) == parts
