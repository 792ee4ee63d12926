"""What a search draws, keeps and stops, without any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from config import ConfigError
from sweeping.axes import Range
from sweeping.plans import Row, Template
from sweeping.search import JOURNAL, Search, corners

AXES = {"model.lr": Range(1e-4, 1e-2, whole=False, log=True), "envs": Range(2, 5, whole=True, log=False)}


def make(folder: Path, **changes: Any) -> Search:
    settings: dict[str, Any] = {"seeds": ("0", "1"), "metric": "valid_gap", "direction": "minimize", "trials": 6}
    axes = changes.pop("axes", AXES)
    return Search(Template(("debug",), {}, folder), axes, **{**settings, "startup": 2, **changes})


def drawn(search: Search, count: int) -> list[tuple[str, ...]]:
    """The next trials' arguments, each ended with a score by its number."""
    found = []
    for number in range(count):
        trial = search.next()
        assert trial is not None
        found.append(trial.runs[0].arguments[2:-2])
        search.note(trial, "finished", [float(number), float(number) + 1])
    return found


def test_search_draws_within_its_ranges(tmp_path: Path):
    for lr, envs in drawn(make(tmp_path), 6):
        assert 1e-4 <= float(lr.removeprefix("--model.lr=")) <= 1e-2
        assert envs.removeprefix("--envs=") in "2345"


def test_search_ends_after_its_trials_and_knows_the_best(tmp_path: Path):
    search = make(tmp_path, trials=3)
    assert search.best() is None
    drawn(search, 3)
    assert search.next() is None
    name, score, settings = search.best() or ("", 0.0, {})
    assert (name, score, [*settings]) == ("trial0000", 0.5, ["model.lr", "envs"])


def test_search_that_is_gone_on_with_draws_what_it_would_have_drawn(tmp_path: Path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = drawn(make(tmp_path / "whole"), 6)
    parts = drawn(make(tmp_path / "parts"), 4)
    assert parts + drawn(make(tmp_path / "parts"), 2) == whole
    assert len(set(whole)) == 6


def test_interrupted_trial_is_the_next_one(tmp_path: Path):
    search = make(tmp_path)
    trial = search.next()
    assert trial is not None
    search.note(trial, "stopped", [])
    assert make(tmp_path).next() == trial
    # Also where the sweep was killed, and had no time to take note.
    assert make(tmp_path).next() == trial


def test_half_a_line_of_a_killed_process_is_cut_from_the_journal(tmp_path: Path):
    drawn(make(tmp_path), 2)
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 99')
    search = make(tmp_path)
    assert journal.read_bytes().startswith(whole) and b'"op_code": 99' not in journal.read_bytes()
    drawn(search, 4)
    assert search.next() is None


def test_search_stops_what_is_worse_than_the_median_at_the_same_step(tmp_path: Path):
    search = make(tmp_path)
    for value in (1.0, 3.0):
        trial = search.next()
        assert trial is not None
        assert not search.should_stop(trial, trial.runs[0], [Row(10, value), Row(20, value - 1)])
        search.note(trial, "finished", [value, value])
    trial = search.next()
    assert trial is not None
    first, second = trial.runs
    assert not search.should_stop(trial, first, [Row(10, 1.9)])
    # The medians of the best values until then are 2 at step 10 and 1 at step 20.
    assert search.should_stop(trial, first, [Row(10, 1.9), Row(20, 1.1)])
    assert not search.should_stop(trial, second, [Row(10, 99.0)])


def test_trial_without_a_finite_score_has_failed(tmp_path: Path):
    search = make(tmp_path, trials=1)
    trial = search.next()
    assert trial is not None
    search.note(trial, "finished", [1.0, float("nan")])
    assert search.best() is None and make(tmp_path, trials=1).next() is None


@pytest.mark.parametrize(
    "changes", [{"metric": "valid_return"}, {"direction": "maximize"}, {"seeds": ("0",)}, {"axes": {"envs": ["2"]}}]
)
def test_journal_of_another_search_is_refused(changes: dict[str, Any], tmp_path: Path):
    make(tmp_path)
    with pytest.raises(ConfigError, match="another --logdir"):
        make(tmp_path, **changes)


def test_corners_have_every_value_and_both_ends():
    found = corners({**AXES, "actor.type": ["a", "b", "c"]})
    assert found == [
        {"model.lr": "0.0001", "envs": "2", "actor.type": "a"},
        {"model.lr": "0.01", "envs": "5", "actor.type": "b"},
        {"model.lr": "0.0001", "envs": "2", "actor.type": "c"},
    ]
