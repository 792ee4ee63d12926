"""A folder that a stranger filled: what its links point to is never written, and only regular files are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
import compare
import config
import dreamer
import solve
from comparing import event_files, runs
from comparing.curves import draw
from comparing.runs import LOCK, Series
from config import ConfigError
from routing.files import RoutingInstance
from routing.metrics import EXACT
from solving import answers, writing
from system import safe_files
from training.logger import Logger
from training.replay import Replay
from training.run_lock import LogdirInUseError, RunLock

CPU = torch.device("cpu")
SHORT = ["--configs", "debug", "--device", "cpu", "--steps", "48"]
SQUARE = np.array([[0.0, 0], [0, 1], [1, 1], [1, 0]])


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("mine")
    return path


@pytest.mark.run
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "replay", "guard"])
def test_run_refuses_a_link_in_place_of_a_file_that_it_writes_on(
    name: str, precious: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logdir = tmp_path / "friend"
    logdir.mkdir()
    (logdir / name).symlink_to(tmp_path if name in ("replay", "guard") else precious)
    with pytest.raises(SystemExit) as stopped:
        dreamer.main([*SHORT, "--logdir", str(logdir)])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(logdir) in line and f"{name} is a link" in line and "remove it" in line
    assert precious.read_text() == "mine"
    assert {path.name for path in logdir.iterdir()} <= {"lock", name}


@pytest.mark.run
def test_run_replaces_links_that_have_the_names_of_its_files(precious: Path, tmp_path: Path) -> None:
    logdir = tmp_path / "friend"
    logdir.mkdir()
    names = ("config.yaml", "run.json", "latest.pt.tmp")
    for name in names:
        (logdir / name).symlink_to(precious)
    dreamer.main([*SHORT, "--logdir", str(logdir)])
    assert precious.read_text() == "mine"
    assert not any((logdir / name).is_symlink() for name in names)
    assert checkpoint.load(logdir / "latest.pt", CPU)["step"] == 48


def test_lock_leaves_a_file_with_a_second_name_alone(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.link(precious, tmp_path / "run" / "lock")
    with pytest.raises(OSError, match="hard link"):
        RunLock(tmp_path / "run")
    assert precious.read_text() == "mine"


def test_lock_shows_no_more_than_a_process_id_of_what_it_holds(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    (tmp_path / "lock").write_bytes(b"1" * 10**6)
    with pytest.raises(LogdirInUseError) as refused:
        RunLock(tmp_path)
    assert len(str(refused.value)) < len(str(tmp_path)) + 200
    first.release()


def test_event_files_have_names_that_cannot_be_foreseen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Logger(tmp_path / name).close()
    ends = [next((tmp_path / name).glob(runs.EVENT_FILES)).name.rpartition(".")[2] for name in ("a", "b")]
    assert ends[0] != ends[1] and min(map(len, ends)) >= 12


def test_replay_writes_no_chunk_through_a_link_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / "000000000000-000000000000-own.pt"
    kept.touch()
    (tmp_path / "replay").symlink_to("elsewhere")
    replay = Replay({"action": ((), torch.int64)}, num_envs=1, capacity=4, device=CPU)
    with pytest.raises(OSError, match="replay is a link"):
        replay.save_chunks(tmp_path / "replay")
    assert list((tmp_path / "elsewhere").iterdir()) == [kept]


@pytest.mark.parametrize("problem", ["tsp", "cvrp"])
def test_solve_writes_through_no_link(problem: str, precious: Path, tmp_path: Path) -> None:
    loads: dict[str, Any] = {} if problem == "tsp" else {"demand": np.array([0, 1, 1, 1]), "capacity": 3}
    tour = np.array([0, 1, 2, 3])
    solution = solve.Solution(RoutingInstance("own", problem, SQUARE, EXACT, **loads), tour, 4, 0.1)
    names = ("own.png", "own.tour" if problem == "tsp" else "own.sol")
    for name in names:
        (tmp_path / name).symlink_to(precious)
    writing.write(solution, tmp_path, None)
    assert precious.read_text() == "mine"
    assert not any((tmp_path / name).is_symlink() for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "precious"])


def test_comparison_is_drawn_through_no_link(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").symlink_to(precious)
    steps = np.array([1.0, 2.0])
    draw({"one": [Series(steps, steps, steps)]}, tmp_path / "picture.png", label="gap", log_scale=False)
    assert precious.read_text() == "mine"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# What is read


def write_metrics(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0, "valid_gap": 5.0}\n')
    return folder


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "lock"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_read_notes_what_is_no_regular_file_and_waits_for_none(name: str, make, tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "friend")
    make(folder / name)
    run = runs.read(folder)
    assert run.steps == 1
    assert len(run.notes) == (name != "lock")
    assert all("only regular files" in note and "\n" not in note for note in run.notes)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.out.tfevents.1.host"])
def test_compare_leaves_out_a_run_whose_log_is_a_fifo(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "friend").mkdir()
    os.mkfifo(tmp_path / "friend" / name)
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "friend"), "--out", str(tmp_path / "picture.png")])
    assert "it is a FIFO" in capsys.readouterr().err


def test_read_notes_a_log_of_a_terabyte(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "friend")
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(runs.UnreadableRunError, match="bytes, and such files have"):
        runs.read(folder)


def test_read_takes_no_memory_for_an_event_that_is_not_there(tmp_path: Path) -> None:
    events = tmp_path / "events.out.tfevents.1.host"
    events.write_bytes(event_files.HEADER.pack(2**60, 0) + b"short")
    with pytest.raises(runs.UnreadableRunError, match="is broken from byte 0 on"):
        runs.read(tmp_path)


def test_refuse_links_passes_over_what_is_not_there(tmp_path: Path) -> None:
    safe_files.refuse_links(tmp_path, ("replay",))
    assert list(tmp_path.iterdir()) == []


def test_table_of_solutions_has_one_line_for_a_name_of_several(tmp_path: Path) -> None:
    instance = RoutingInstance("own\n\x1b[2J999", "tsp", SQUARE, EXACT)
    solution = answers.Solution(instance, np.arange(4), 4, 0.1)
    _, row = answers.table([solution]).splitlines()
    assert row.startswith("own ?[2J999") and "\x1b" not in answers.tours([solution], columns=80)


def test_names_and_settings_of_others_steer_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_metrics(tmp_path / "friend\x1b]0;owned\x07-seed0")
    (folder / "config.yaml").write_text('seed: 0\ncost: "a\\e[2Jb"\n')
    other = write_metrics(tmp_path / "other-seed0")
    (other / "config.yaml").write_text("seed: 0\ncost: c\n")
    compare.main([str(folder), str(other), "--out", str(tmp_path / "picture.png")])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and "a?[2Jb" in printed.out


def test_mistake_is_told_without_escapes_of_the_file_that_it_is_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a\x1b[2J.yaml"
    path.write_text('cost: "\\e[1m')
    with pytest.raises(SystemExit), dreamer.one_line_errors("dreamer.py", ConfigError):
        config.read(path)
    assert "\x1b" not in capsys.readouterr().err


def test_lock_that_was_removed_is_taken_anew(tmp_path):
    first = RunLock(tmp_path)
    (tmp_path / LOCK).unlink()
    first.hold()
    with pytest.raises(LogdirInUseError):
        RunLock(tmp_path)
    first.release()


def test_lock_that_another_process_has_taken_meanwhile_is_told_of(tmp_path):
    first = RunLock(tmp_path)
    (tmp_path / LOCK).unlink()
    second = RunLock(tmp_path)
    with pytest.raises(LogdirInUseError):
        first.hold()
    second.release()
