"""Where a run's figures go beside metrics.jsonl: whatever sinks its config names."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dreamer
from config import ConfigError
from tests.run_scenes import COMMAND, Reference, read_metrics
from tests.scenes import without_times
from training.logger import Logger
from training.sinks import TensorBoardSink, find_sinks

PICTURE = np.zeros((4, 6, 3), np.uint8)
LINES = """
import signal

class Lines:
    def __init__(self, logdir, *, resume_step, config):
        self.file = open(logdir / "lines.txt", "a", buffering=1)
        self.begun = resume_step
        self.tell("begin", resume_step, config.get("seed"))
    def tell(self, *words):
        print(*words, file=self.file)
    def scalars(self, step, seconds, values):
        self.tell("scalars", step, seconds, values)
    def image(self, step, name, image):
        self.tell("image", step, name, image.shape)
    def text(self, name, markdown, *, step=None):
        self.tell("text", step, name, len(markdown.splitlines()))
    def close(self):
        self.tell("close")
        self.file.close()

class Breaking(Lines):
    def scalars(self, step, seconds, values):
        if step > 10:
            raise ConnectionError("no\\nway")
        super().scalars(step, seconds, values)

class Stopping(Lines):
    def scalars(self, step, seconds, values):
        super().scalars(step, seconds, values)
        if step == 200 and self.begun is None:
            signal.raise_signal(signal.SIGTERM)

class Half:
    def scalars(self): ...
    def text(self): ...

def breaks(logdir, **options):
    raise RuntimeError
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_sinks.py").write_text(LINES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_sinks", raising=False)


def told(logdir: Path) -> list[str]:
    return (logdir / "lines.txt").read_text().splitlines()


def test_logger_hands_everything_to_every_sink(own: None, tmp_path: Path):
    logger = Logger(tmp_path, resume_step=5, sinks=find_sinks("own_sinks:Lines, tensorboard"), config={"seed": 3})
    logger.scalars(64, 1.23456, {"loss": math.inf})
    logger.image(64, "view", PICTURE)
    logger.text("config", "a\nb")
    logger.text("warnings", "line", step=64)
    logger.close()
    assert told(tmp_path) == [
        *("begin 5 3", "scalars 64 1.235 {'loss': inf}", "image 64 view (4, 6, 3)"),
        *("text None config 2", "text 64 warnings 1", "close"),
    ]
    assert len([*tmp_path.glob("events.*")]) == 1


def test_logger_without_sinks_writes_metrics_alone(tmp_path: Path):
    logger = Logger(tmp_path, sinks=find_sinks(""))
    logger.scalars(1, 0.5, {"loss": 2.0})
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert find_sinks("tensorboard") == [TensorBoardSink]


def test_sink_that_fails_is_left_out_and_told_of_once(own: None, tmp_path: Path):
    logger = Logger(tmp_path, sinks=find_sinks("own_sinks:Breaking"))
    for step in (10, 20, 30):
        logger.scalars(step, 0.0, {"loss": 1.0})
    (line,) = logger.notices()
    assert "logger own_sinks:Breaking failed in scalars (ConnectionError: no way) and is left out" in line
    logger.scalars(40, 0.0, {"loss": 1.0})
    logger.close()
    assert logger.notices() == [] and told(tmp_path)[1:] == ["scalars 10 0.0 {'loss': 1.0}", "close"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "logger has 'tensorbord'; choose among tensorboard, wandb, or name a class as module:Class"),
        ("tensorboard,own_sinks:Half", "logger names 'own_sinks:Half', which has no image, close"),
        ("own_sinks:Missing", "module 'own_sinks' has no 'Missing'"),
        ("no_such_module:Class", "cannot be loaded"),
    ],
)
def test_find_sinks_refuses_what_is_none(names: str, message: str, own: None):
    with pytest.raises(ConfigError) as refused:
        find_sinks(names)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_find_sinks_tells_what_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger wandb needs its package: pip install -e"):
        find_sinks("wandb")


def test_run_that_is_stopped_and_goes_on_tells_sinks_what_an_undisturbed_one_logs(
    own: None, reference: Reference, tmp_path: Path
):
    logdir = tmp_path / "run"
    command = [*COMMAND, "--device", "cpu", "--logger", "own_sinks:Stopping", "--logdir", str(logdir)]
    dreamer.main(command)
    assert not told(logdir)[-2].startswith("scalars 400")
    dreamer.main(command)
    assert [line for line in told(logdir) if line.startswith("begin")] == ["begin None 0", "begin 200 0"]
    rows = [line.split(" ", 3) for line in told(logdir) if line.startswith("scalars")]
    figures = [{"step": int(step), "seconds": float(seconds), **eval(values)} for _, step, seconds, values in rows]
    assert without_times(figures) == without_times(reference.rows)
    assert not [*logdir.glob("events.*")] and reference.rows[-1]["step"] == 400


def records(path: Path) -> list[Any]:
    """What a file of Weights & Biases holds: a header, then records in blocks, as in a log of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        # A whole record, or the last part of one.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history(folder: Path, *, rows: int) -> list[dict[str, Any]]:
    """What was logged, once the process that writes it has written so many rows."""
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 30
    while len(found) < rows and time.monotonic() < deadline:
        (file,) = folder.glob("*.wandb")
        found = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records(file)
            if record.WhichOneof("record_type") == "history"
        ]
    return found


@pytest.mark.run
def test_wandb_has_each_figure_once_though_a_run_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = find_sinks("wandb")
    logger = Logger(tmp_path, sinks=made, config={"seed": 3})
    logger.text("config", "page")
    logger.scalars(10, 1.0, {"train_return": -5.0})
    logger.scalars(10, 1.1, {"valid_gap": 9.0})
    state = logger.state_dict()
    # What comes beyond the checkpoint is what a killed process has told.
    logger.scalars(20, 2.0, {"train_return": -4.0, "valid_gap": 5.0})
    logger.image(20, "view", PICTURE)
    logger.close()
    resumed = Logger(tmp_path, resume_step=10, sinks=made, config={"seed": 3})
    resumed.load_state_dict(state)
    resumed.scalars(20, 2.1, {"train_return": -4.0, "loss": math.nan})
    resumed.close()
    (line,) = resumed.notices()
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    (second,) = (tmp_path / "wandb").glob(f"offline-run-*-{name}")
    (first,) = {*(tmp_path / "wandb").glob("offline-run-*")} - {second}
    assert f"run {name} begins" in line
    rows = [
        {key: value for key, value in row.items() if key in ("_step", "score/train_return", "score/valid_gap")}
        for row in history(second, rows=2)
    ]
    assert rows == [
        {"_step": 10, "score/train_return": -5.0, "score/valid_gap": 9.0},
        {"_step": 20, "score/train_return": -4.0},
    ]
    assert [row["_step"] for row in history(first, rows=2)] == [10, 20]
    assert any("view/view" in key or "view" in key for key in history(first, rows=2)[1])
