"""Runs that are told to stop, and runs whose terminal has gone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

import checkpoint
from dreamer import Dreamer
from tests.run_scenes import Rows, loaded, read_metrics, train
from tests.scenes import refusal, without_times
from training.replay import Replay
from training.trainer import Trainer

# Four updates a step, so that a request to stop mostly comes amidst those of one.
ARGUMENTS = ("--steps", "64", "--train_ratio", "28", "--log_every", "20", "--checkpoint_every", "1000")


@pytest.fixture(autouse=True)
def hangup_is_heard() -> Iterator[None]:
    """As in a plain terminal, even where these tests are started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return train(tmp_path_factory.mktemp("undisturbed"), *ARGUMENTS)


def after_update(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    update = Dreamer.update

    def then_act(agent: Dreamer, replay: Replay, *, progress: float) -> dict[str, Tensor]:
        metrics = update(agent, replay, progress=progress)
        if agent.learner.updates == number:
            act()
        return metrics

    monkeypatch.setattr(Dreamer, "update", then_act)


@pytest.mark.run
@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1", "SIGXCPU", "SIGINT"])
def test_signal_stops_between_two_updates(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    after_update(2, lambda: os.kill(os.getpid(), signal.Signals[number]), monkeypatch)
    train(tmp_path, *ARGUMENTS)
    state = loaded(tmp_path / checkpoint.LATEST)
    assert state["updates"] == 2 and state["updates_owed"] >= 1
    assert f"stopped by {number}" in capsys.readouterr().err


@pytest.mark.run
def test_run_that_a_signal_stopped_goes_on_exactly(undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        after_update(6, lambda: os.kill(os.getpid(), signal.SIGHUP), patch)
        train(tmp_path, *ARGUMENTS)
    assert loaded(tmp_path / checkpoint.LATEST)["updates"] == 6
    assert without_times(train(tmp_path, *ARGUMENTS)) == without_times(undisturbed)


@pytest.mark.run
def test_ignored_hangup_stays_ignored(undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_update(3, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
        assert without_times(train(tmp_path, *ARGUMENTS)) == without_times(undisturbed)
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupt_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.run
def test_second_interrupt_stops_at_once_and_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path, *ARGUMENTS, "--steps", "48")
    before = (tmp_path / checkpoint.LATEST).read_bytes()
    after_update(loaded(tmp_path / checkpoint.LATEST)["updates"] + 3, interrupt_twice, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, *ARGUMENTS)
    assert stopped.value.code == 130
    assert "stopped at once" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / checkpoint.LATEST).read_bytes() == before


@pytest.mark.run
def test_second_interrupt_after_a_while_waits_like_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.stopping.IMPATIENCE", 0.0)
    after_update(3, interrupt_twice, monkeypatch)
    train(tmp_path, *ARGUMENTS)
    assert loaded(tmp_path / checkpoint.LATEST)["updates"] == 3


@pytest.mark.parametrize("ratio", [".inf", ".nan"])
def test_train_ratio_without_end_is_refused(ratio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refusal(capsys, "--configs", "debug", "--train_ratio", ratio, "--logdir", str(tmp_path / "run"))
    assert "train_ratio is" in line
    assert not (tmp_path / "run").exists()


class Closed:
    """A stderr that nothing can be written to any more."""

    def __init__(self, error: Exception, *, is_terminal: bool) -> None:
        self.error, self.is_terminal = error, is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def fileno(self) -> int:
        return 2

    def write(self, _text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.run
@pytest.mark.parametrize(
    ("error", "is_terminal"),
    [
        (BrokenPipeError(32, "Broken pipe"), False),
        (OSError(28, "No space left on device"), True),
        (ValueError("closed file"), False),
    ],
)
def test_run_goes_on_when_stderr_fails(
    error: Exception, is_terminal: bool, undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", Closed(error, is_terminal=is_terminal))
    monkeypatch.setattr(os, "get_terminal_size", lambda _descriptor: os.terminal_size((80, 24)))
    assert without_times(train(tmp_path, *ARGUMENTS)) == without_times(undisturbed)


@pytest.mark.run
def test_run_goes_on_without_a_stderr(undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert without_times(train(tmp_path, *ARGUMENTS)) == without_times(undisturbed)


@pytest.mark.run
def test_error_of_an_environment_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_trainer: Trainer) -> None:
        raise FileNotFoundError(2, "No such file or directory", "scenario.xml")

    monkeypatch.setattr(Trainer, "_advance", fail)
    with pytest.raises(FileNotFoundError):
        train(tmp_path, *ARGUMENTS)
    assert read_metrics(tmp_path)
