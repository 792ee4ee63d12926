from __future__ import annotations

import fcntl
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from comparing.runs import METRICS
from config import Config
from training.averages import MetricAverages
from training.logger import Logger
from training.progress import ProgressBar
from training.run_facts import save_run_facts
from training.run_lock import LogdirInUseError, RunLock


def rows(logdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def tensorboard(logdir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(logdir))
    accumulator.Reload()
    return accumulator


def tensorboard_steps(logdir: Path, name: str) -> list[int]:
    return [event.step for event in tensorboard(logdir).Scalars(name)]


def test_logger_writes_flat_rows_with_step_and_seconds_first(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.scalars(64, 1.23456, {"train_return": -5.5, "updates": 3, "fps": np.float64(2.0)})
    assert rows(tmp_path) == [{"step": 64, "seconds": 1.235, "train_return": -5.5, "updates": 3, "fps": 2.0}]
    assert list(rows(tmp_path)[0])[:2] == ["step", "seconds"]
    logger.close()
    (event,) = tensorboard(tmp_path).Scalars("score/train_return")
    assert (event.step, event.value) == (64, -5.5)


def test_logger_writes_non_finite_values_as_null(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.scalars(1, 0.0, {"loss": math.nan, "scale": -math.inf, "gap": 2.0})
    logger.close()
    assert rows(tmp_path) == [{"step": 1, "seconds": 0.0, "loss": None, "scale": None, "gap": 2.0}]
    assert math.isnan(tensorboard(tmp_path).Scalars("world_model/loss")[0].value)


def test_logger_resumed_drops_rows_after_checkpoint(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    for step in (10, 20):
        logger.scalars(step, 0.0, {"loss": 1.0})
    state = logger.state_dict()
    for step in (30, 40):
        logger.scalars(step, 0.0, {"loss": 2.0})
    logger.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 50, "sec')  # as a kill leaves it

    resumed = Logger(tmp_path, resume_step=20)
    resumed.load_state_dict(state)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    resumed.scalars(25, 0.0, {"loss": 3.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 1.0), (20, 1.0), (25, 3.0)]
    assert tensorboard_steps(tmp_path, "world_model/loss") == [10, 20, 25]


def test_logger_resumed_state_counts_rows_it_kept(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.scalars(10, 0.0, {})
    first = logger.state_dict()
    logger.scalars(20, 0.0, {})
    logger.close()
    resumed = Logger(tmp_path, resume_step=10)
    resumed.load_state_dict(first)
    assert resumed.state_dict() == first
    resumed.close()


def test_logger_resumed_in_new_logdir_begins_there(tmp_path: Path) -> None:
    logger = Logger(tmp_path, resume_step=20)
    logger.load_state_dict({"bytes": 1000})
    logger.scalars(30, 0.0, {})
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [30]


def test_logger_resumed_cuts_torn_row_of_file_shorter_than_marked(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 10, "seconds": 0.0}\n{"step": 20, "sec')
    logger = Logger(tmp_path, resume_step=20)
    logger.load_state_dict({"bytes": 1000})
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [10]


def test_logger_begun_anew_drops_rows_of_run_without_checkpoint(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.scalars(10, 0.0, {"loss": 1.0})
    logger.close()
    again = Logger(tmp_path)
    again.scalars(5, 0.0, {"loss": 1.0})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [5]
    assert tensorboard_steps(tmp_path, "world_model/loss") == [5]


def test_logger_shows_images_and_text(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.image(7, "validation_tour", np.zeros((4, 6, 3), dtype=np.uint8))
    logger.text("config", "# facts")
    logger.close()
    events = tensorboard(tmp_path)
    (image,) = events.Images("view/validation_tour")
    assert (image.step, image.height, image.width) == (7, 4, 6)
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"# facts"]


def test_metric_averages_mean_min_and_max() -> None:
    averages = MetricAverages()
    for value in (1.0, 2.0, 6.0):
        metric = torch.tensor(value)
        averages.add({"loss": metric, "value_min": metric, "value_max": metric.bfloat16()})
    averages.add({"loss": torch.tensor(-1.0), "now_and_then": torch.tensor(5.0)})
    assert averages.fetch() == {"loss": 2.0, "value_min": 1.0, "value_max": 6.0, "now_and_then": 5.0}
    assert averages.fetch() == {}


def test_metric_averages_take_in_each_finite_value() -> None:
    averages = MetricAverages()
    averages.add_each("train_return", torch.tensor([1.0, torch.nan, 2.0]))
    averages.add_each("train_return", torch.tensor([torch.nan, torch.nan, 6.0]))
    assert averages.fetch() == {"train_return": 3.0}


def test_metric_averages_moves_to_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    averages = MetricAverages()
    transfers = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> object:
        transfers.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for name in ("item", "cpu", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
    for _ in range(3):
        averages.add({"loss": torch.ones(()), "gap_max": torch.ones(())})
    assert averages.fetch() == {"loss": 1.0, "gap_max": 1.0}
    assert transfers == [(2,)]


NAMES = ("loss", "loss_min", "loss_max")


def averages_of(*values: float) -> dict[str, float]:
    averages = MetricAverages()
    for value in values:
        averages.add(dict.fromkeys(NAMES, torch.tensor(value)))
    return averages.fetch()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_metric_averages_pass_over_values_that_are_not_finite(bad: float) -> None:
    expected = {"loss": 2.0, "loss_min": 1.0, "loss_max": 3.0}
    assert averages_of(1.0, bad, 3.0) == averages_of(bad, 1.0, 3.0) == averages_of(3.0, 1.0, bad) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metric_averages_of_no_finite_value_are_nan(bad: float) -> None:
    averages = averages_of(bad, bad)
    assert tuple(averages) == NAMES
    assert all(math.isnan(value) for value in averages.values())


def test_metric_averages_resumed_give_same_numbers() -> None:
    kept, resumed = MetricAverages(), MetricAverages()
    for value in (1.0, math.nan):
        kept.add({"loss": torch.tensor(value), "loss_min": torch.tensor(value)})
    resumed.load_state_dict(kept.state_dict())
    for averages in (kept, resumed):
        averages.add({"loss": torch.tensor(2.0), "loss_min": torch.tensor(2.0)})
    assert resumed.fetch() == kept.fetch() == {"loss": 1.5, "loss_min": 1.0}


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_bar_prints_one_plain_line_a_call_without_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = ProgressBar(500, initial=100, clock=clock)
    clock.now = 10.0
    bar.move(150)
    bar.update(200, {"gap": "12.3 %", "return": -3.123456})
    bar.close()
    assert capsys.readouterr().err == "step 200/500  gap 12.3 %  return -3.123  10.0 steps/s  00:30 left\n"


def shown(columns: int, monkeypatch: pytest.MonkeyPatch, steps: Callable[[ProgressBar, Clock], None]) -> list[str]:
    """What a terminal of this width shows, one state of the line after another."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(reader, "rb", buffering=0) as screen, open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        clock = Clock()
        bar = ProgressBar(2_000_000, updates_from=1000, clock=clock)
        steps(bar, clock)
        terminal.flush()
        os.set_blocking(screen.fileno(), False)
        parts = []
        while select.select([screen], [], [], 0)[0]:
            parts.append(screen.read(10_000))
        bar.close()
    return b"".join(parts).decode().replace("\n", "\r").split("\r")


FIGURES: dict[str, float | str] = {"gap": "2.51 %", "return": -3.8612, "entropy": "0.112"}


def halfway(bar: ProgressBar, clock: Clock) -> None:
    clock.now = 1.0
    bar.move(1000)
    clock.now = 101.0
    bar.update(1_001_000, {**FIGURES})


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_progress_bar_on_terminal_shows_gap_first_and_one_speed(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = shown(columns, monkeypatch, halfway)[-1]
    assert line.startswith("gap 2.51 %") and line.count("steps/s") == 1 and "01:39 left" in line
    assert len(line) <= columns and (line.count("█") >= 3) == (columns >= 80)
    assert ("entropy" in line) == (columns > 80)


def test_progress_bar_without_width_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in shown(0, monkeypatch, halfway) if line)
    assert line.startswith("step 1001000/2000000  gap 2.51 %")


def test_progress_bar_moves_between_two_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(bar: ProgressBar, clock: Clock) -> None:
        halfway(bar, clock)
        for step in (1_200_000, 1_400_000, 1_400_001):
            clock.now += 10 if step % 2 == 0 else 0
            bar.move(step)

    lines = [line for line in shown(80, monkeypatch, moves) if "gap" in line]
    assert [line.split("%|")[0].split()[-1] for line in lines] == ["50", "60", "70"]


def test_progress_bar_tells_time_left_from_the_steps_with_updates(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = ProgressBar(11_000, updates_from=1000, clock=clock)
    clock.now = 1.0
    bar.update(900, {})
    bar.move(1000)
    clock.now = 101.0
    bar.update(2000, {})
    early, late = capsys.readouterr().err.splitlines()
    assert "left" not in early
    assert late == "step 2000/11000  10.0 steps/s  15:00 left"


def test_progress_bar_has_no_time_left_beyond_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = ProgressBar(100, clock=clock)
    clock.now = 10.0
    bar.update(110, {})
    assert capsys.readouterr().err == "step 110/100  11.0 steps/s  00:00 left\n"


HOLD_LOCK = """
import sys, time
from pathlib import Path
from training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.run
def test_run_lock_refuses_logdir_of_live_process_until_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LogdirInUseError, match=f"in use by process {holder.pid}; give another --logdir"):
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunLock(tmp_path).release()
    lock = RunLock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    lock.release()


@pytest.mark.run
def test_save_run_facts_writes_files_and_names_differences(tmp_path: Path) -> None:
    defaults = Config({"seed": 0, "actor": {"entropy": 3e-4, "type": "mlp"}})
    page = save_run_facts(
        tmp_path,
        defaults.replace(**{"actor.entropy": 0.01}),
        ["dreamer.py", "--logdir", "a b"],
        defaults=defaults,
    )
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["command"] == "dreamer.py --logdir 'a b'"
    assert facts["packages"]["torch"] == torch.__version__
    assert "commit" in facts
    assert "entropy: 0.01" in (tmp_path / "config.yaml").read_text()
    assert "| actor.entropy | 0.0003 | 0.01 |" in page
    assert "| seed" not in page
    assert "seed: 0" in page


@pytest.mark.run
def test_save_run_facts_works_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    defaults = Config({"seed": 0})
    assert "nothing" in save_run_facts(tmp_path, defaults, ["dreamer.py"], defaults=defaults)
    assert json.loads((tmp_path / "run.json").read_text())["commit"] is None
