"""Rows of a cache for training: which there are, how often each is drawn, and what is done to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from config import ConfigError, UserError
from scenarios import caching, dataset
from scenarios.cache import Cache
from scenarios.dataset import Draws, Rows
from scenarios.samples import Samples
from settings.scenarios import SCENARIO_TYPES, ScenarioWeights
from system import memory
from tests.scenario_scenes import CHOICES, KNOWN, NEEDS, SPEEDS, scenario_settings, settings, write_logs

FREE, TURN = SCENARIO_TYPES.index("free"), SCENARIO_TYPES.index("turn_left")


def weights(**changes: float) -> ScenarioWeights:
    return ScenarioWeights.of(settings(**{f"scenario_weights.{key}": value for key, value in changes.items()}))


def rows(*types: int) -> Rows:
    count = len(types)
    return Rows({"number": np.arange(count), "ego": np.zeros((count, 6), np.float32)}, np.array(types, np.int64))


def load(folder: Path) -> Rows:
    report = caching.fill(scenario_settings(folder), NEEDS, KNOWN, seed=0)
    return dataset.load(Cache(folder / "cache"), report.entries, (SPEEDS, CHOICES), what="train on")


def test_rows_are_those_of_the_files_one_after_the_other(tmp_path: Path):
    write_logs(tmp_path, "a", "b")
    found = load(tmp_path)
    assert len(found) == 100 and found.arrays["ego"].shape == (100, 6)
    assert found.arrays.keys() == {"ego", "action", "action_mask"}
    # Agent 3 at 4 m/s before agent 7 at 6 m/s, 21 and 4 rows of each, in two logs.
    expected = np.tile(np.repeat([4.0, 6.0], 25), 2)
    assert found.arrays["ego"][:, 0].tolist() == expected.tolist()
    assert (found.types == FREE).all()


def test_rows_that_memory_does_not_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_logs(tmp_path, "a")
    entries = caching.fill(scenario_settings(tmp_path), NEEDS, KNOWN, seed=0).entries
    monkeypatch.setattr(memory, "memory_at_hand", lambda: 10)
    with pytest.raises(UserError, match="50 samples to train on take about .* take fewer: --scenario_filter.total"):
        dataset.load(Cache(tmp_path / "cache"), entries, (SPEEDS, CHOICES), what="train on")


def test_batches_are_all_rows_in_order():
    assert [batch["number"].tolist() for batch in rows(*[FREE] * 5).batches(2)] == [[0, 1], [2, 3], [4]]


def test_types_are_drawn_by_their_weights():
    draws = Draws(rows(FREE, FREE, TURN), weights(turn_left=6.0), seed=0)
    counts = np.bincount(draws.batch(0, 8000)["number"], minlength=3)
    # 1 : 1 : 6
    assert np.allclose(counts, [1000, 1000, 6000], atol=150)


def test_type_of_weight_zero_is_never_drawn():
    draws = Draws(rows(TURN, FREE, TURN, FREE, TURN), weights(turn_left=0.0), seed=0)
    assert set(draws.batch(0, 500)["number"].tolist()) == {1, 3}


@pytest.mark.parametrize("types", [(), (TURN, TURN)])
def test_nothing_to_draw_is_refused(types: tuple[int, ...]):
    with pytest.raises(UserError, match="no row to train on has a weight above 0"):
        Draws(rows(*types), weights(turn_left=0.0), seed=0)


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ConfigError, match="scenario_weights are all 0"):
        weights(**dict.fromkeys(SCENARIO_TYPES, 0.0))


def test_batch_depends_on_seed_and_number_alone():
    draws, again = (Draws(rows(*[FREE] * 100), weights(), seed=3) for _ in range(2))
    first, second = (draws.batch(number, 20)["number"].tolist() for number in (1, 2))
    assert again.batch(2, 20)["number"].tolist() == second != first
    assert Draws(rows(*[FREE] * 100), weights(), seed=4).batch(1, 20)["number"].tolist() != first


def test_batches_are_augmented_and_rows_are_not():
    def louder(samples: Samples, rng: np.random.Generator) -> Samples:
        return {**samples, "ego": samples["ego"] + np.float32(rng.uniform(1, 2))}

    some = rows(*[FREE] * 4)
    draws = Draws(some, weights(), augmented=[louder], seed=0)
    one, two = (draws.batch(number, 4)["ego"] for number in (0, 1))
    assert (one >= 1).all() and not (one == two).any()
    assert (draws.batch(0, 4)["ego"] == one).all() and not some.arrays["ego"].any()
