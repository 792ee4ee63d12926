from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from comparing import runs
from comparing.runs import METRICS
from training.logger import Logger


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def log(logger: Logger, *numbers: int) -> None:
    for step in numbers:
        logger.scalars(step, 0.0, {"loss": 1.0})


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[Logger]:
    made = Logger(tmp_path)
    log(made, 10, 20, 30)
    yield made
    made.close()


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_text('{"step": 7, "seconds": 0.0}\n')
    os.replace(other, path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(0, 0))


CHANGES: list[tuple[Callable[[Path], None], list[int]]] = [
    (delete, [10, 20, 30]),
    (replace, [10, 20, 30]),
    (truncate, [10, 20]),
    (overwrite, [20, 30]),
]


@pytest.mark.parametrize(("change", "kept"), CHANGES)
@pytest.mark.parametrize("at_save", [False, True])
def test_metrics_changed_by_others_amidst_a_run_are_written_anew(
    change: Callable[[Path], None], kept: list[int], at_save: bool, logger: Logger, tmp_path: Path
):
    change(tmp_path / METRICS)
    damaged = (tmp_path / METRICS).read_bytes() if (tmp_path / METRICS).exists() else None
    if at_save:
        logger.state_dict()
    log(logger, 40)
    assert steps(tmp_path / METRICS) == [*kept, 40]
    (notice,) = logger.notices()
    assert f"{len(kept)} of 3 rows are kept" in notice
    aside = tmp_path / f"{METRICS}.damaged-1"
    assert (aside.read_bytes() if aside.exists() else None) == damaged


def test_metrics_damaged_twice_keep_both_files(logger: Logger, tmp_path: Path):
    for step in (40, 50):
        truncate(tmp_path / METRICS)
        log(logger, step)
    assert sorted(path.name for path in tmp_path.glob(f"{METRICS}.*")) == [f"{METRICS}.damaged-{n}" for n in (1, 2)]


def test_metrics_that_are_only_touched_are_no_news(logger: Logger, tmp_path: Path):
    os.utime(tmp_path / METRICS, ns=(0, 0))
    log(logger, 40)
    assert logger.notices() == [] and steps(tmp_path / METRICS) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("change", "kept"), [(delete, []), (replace, [7]), (truncate, [10, 20]), (overwrite, [20, 30])]
)
def test_metrics_changed_between_runs_are_noticed(change: Callable[[Path], None], kept: list[int], tmp_path: Path):
    logger = Logger(tmp_path)
    log(logger, 10, 20, 30)
    state = logger.state_dict()
    logger.close()
    change(tmp_path / METRICS)
    resumed = Logger(tmp_path, resume_step=30)
    resumed.load_state_dict(state)
    log(resumed, 40)
    resumed.close()
    assert steps(tmp_path / METRICS) == [*kept, 40]
    (notice,) = resumed.notices()
    assert f"{len(kept)} of 3 rows are kept" in notice


def test_metrics_damaged_before_the_checkpoint_repeat_no_row_after_it(tmp_path: Path):
    logger = Logger(tmp_path)
    log(logger, 10, 20)
    state = logger.state_dict()
    log(logger, 30)
    logger.close()
    overwrite(tmp_path / METRICS)
    resumed = Logger(tmp_path, resume_step=20)
    resumed.load_state_dict(state)
    log(resumed, 30)
    resumed.close()
    assert steps(tmp_path / METRICS) == [20, 30]


def test_metrics_of_a_run_without_checkpoint_are_kept_aside(logger: Logger, tmp_path: Path):
    again = Logger(tmp_path)
    log(again, 5)
    again.close()
    assert steps(tmp_path / METRICS) == [5]
    assert steps(tmp_path / f"{METRICS}.damaged-1") == [10, 20, 30]
    assert len(again.notices()) == 1


def test_metrics_go_on_after_a_checkpoint_from_before_checksums(tmp_path: Path):
    logger = Logger(tmp_path)
    log(logger, 10)
    state = {"bytes": logger.state_dict()["bytes"]}
    log(logger, 20)
    logger.close()
    resumed = Logger(tmp_path, resume_step=10)
    resumed.load_state_dict(state)
    resumed.close()
    assert steps(tmp_path / METRICS) == [10] and resumed.notices() == []


def test_resume_from_elsewhere_begins_rows_and_says_nothing(tmp_path: Path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    logger = Logger(there)
    log(logger, 10)
    resumed = Logger(here, resume_step=10)
    resumed.load_state_dict(logger.state_dict(), elsewhere=True)
    log(resumed, 20)
    for each in (logger, resumed):
        each.close()
    assert steps(here / METRICS) == [20] and resumed.notices() == []


class FullDisk:
    """A disk on which each write fills the last bytes and fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, only: str = "") -> None:
        self.full = True
        write = os.write

        def limited(descriptor: int, data: bytes) -> int:
            if not self.full or only not in os.readlink(f"/proc/self/fd/{descriptor}"):
                return write(descriptor, data)
            if len(data) > 8:
                return write(descriptor, data[:8])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", limited)


def test_rows_wait_until_a_full_disk_has_room(logger: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = FullDisk(monkeypatch, only=METRICS)
    log(logger, 40, 50)
    assert steps(tmp_path / METRICS) == [10, 20, 30]
    assert len(logger.notices()) == 1
    disk.full = False
    log(logger, 60)
    assert steps(tmp_path / METRICS) == [10, 20, 30, 40, 50, 60]


def test_rows_that_could_not_be_written_are_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logger = Logger(tmp_path)
    log(logger, 10)
    with monkeypatch.context() as patch:
        FullDisk(patch, only=METRICS)
        log(logger, 20)
        state = logger.state_dict()
    logger.close()
    resumed = Logger(tmp_path, resume_step=20)
    resumed.load_state_dict(state)
    log(resumed, 30)
    resumed.close()
    assert steps(tmp_path / METRICS) == [10, 20, 30]


def test_full_disk_costs_tensorboard_only_what_came_meanwhile(
    logger: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = FullDisk(monkeypatch, only="tfevents")
    log(logger, 40, 50)
    assert len(logger.notices()) == 1
    disk.full = False
    log(logger, 60)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars(runs.tag("loss"))] == [10, 20, 30, 60]
    assert steps(tmp_path / METRICS) == [10, 20, 30, 40, 50, 60]


def test_tensorboards_file_that_is_gone_is_followed_by_another(logger: Logger, tmp_path: Path):
    (file,) = tmp_path.glob("*tfevents*")
    file.unlink()
    log(logger, 40)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars(runs.tag("loss"))] == [40]
    assert len(logger.notices()) == 1


def test_log_in_a_folder_that_is_gone_is_not_made_again(logger: Logger, tmp_path: Path):
    shutil.rmtree(tmp_path)
    log(logger, 40)
    assert not tmp_path.exists()
    tmp_path.mkdir()
