"""Augmentations: what each does to points by hand, that padding stays padding, and that seeds decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from config import ConfigError
from scenarios import augmentations
from scenarios.augmentations import Augmentation, displace, drop_agents, hide_motion, mirror
from scenarios.samples import Samples
from settings.scenarios import AugmentSettings
from tests.scenario_scenes import settings


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def f32(numbers: list[float]) -> np.ndarray:
    return np.array(numbers, np.float32)


def batch(count: int = 1) -> Samples:
    """An agent ahead on the left that goes left, a road and a line to the left, padding behind each, and a future."""
    agents = np.zeros((count, 3, 1, 8), np.float32)
    agents[:, 0, 0] = [10, 2, 0, 1, 0, 5, 4, 2]
    agents[:, 1, 0] = [20, -2, 1, 0, 5, 0, 4, 2]
    roads = np.zeros((count, 2, 2, 5), np.float32)
    roads[:, 0] = [[0, 3, 0, 1, 14], [0, 5, 0, 1, 14]]
    lines = np.zeros((count, 2, 2, 4), np.float32)
    lines[:, 0] = [[0, 0, 1, 0], [2, 0, 1, 0]]
    future = np.zeros((count, 2, 3), np.float32)
    future[:, 0] = [1, 1, 0.5]
    return {
        "ego": np.tile(f32([5, 0, 0.2, 4, 2, 14]), (count, 1)),
        **{"agents": agents, "agents_valid": np.any(agents, -1), "roads": roads, "roads_valid": np.any(roads, -1)},
        **{"lines": lines, "lines_valid": np.tile([[True, True], [False, False]], (count, 1, 1))},
        **{"future": future, "future_valid": np.tile([True, False], (count, 1))},
        **{"action": np.zeros(count, np.int64), "action_mask": np.ones((count, 5), bool)},
    }


def test_mirror_turns_left_into_right():
    seen = mirror(1.0)(batch(), rng())
    assert seen["agents"][0, 0, 0].tolist() == [10, -2, 0, -1, 0, -5, 4, 2]
    assert seen["roads"][0, 0, 1].tolist() == [0, -5, 0, -1, 14]
    assert seen["future"][0, 0].tolist() == [1, -1, -0.5]
    assert seen["ego"][0].tolist() == f32([5, 0, -0.2, 4, 2, 14]).tolist()


def test_mirror_twice_is_what_it_was():
    before, after = batch(), mirror(1.0)(mirror(1.0)(batch(), rng()), rng())
    assert all((after[name] == before[name]).all() for name in before)


def test_mirror_is_of_a_share_of_the_samples():
    seen = mirror(0.25)(batch(4000), rng())
    assert 900 < (seen["ego"][:, 2] < 0).sum() < 1100
    mirrored = seen["ego"][:, 2] < 0
    assert ((seen["agents"][:, 0, 0, 1] == -2) == mirrored).all()
    assert ((seen["future"][:, 0, 1] == -1) == mirrored).all()


class Fixed(np.random.Generator):
    """Draws that are given: the ego stands 2 m to the left, turned left by a quarter."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))
        self.rest = [2.0, np.pi / 2]

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return np.full(size, self.rest.pop(0))


def test_displaced_ego_sees_all_else_where_it_was():
    seen = displace(2.0, 1.0)(batch(), Fixed())
    # What was 10 m ahead and 2 m to the left is now 10 m to the right.
    assert seen["agents"][0, 0, 0] == pytest.approx(f32([0, -10, 1, 0, 5, 0, 4, 2]), abs=1e-5)
    assert seen["agents"][0, 1, 0] == pytest.approx(f32([-4, -20, 0, -1, 0, -5, 4, 2]), abs=1e-5)
    assert seen["roads"][0, 0, 0] == pytest.approx(f32([1, 0, 1, 0, 14]), abs=1e-5)
    assert seen["lines"][0, 0, 1] == pytest.approx(f32([-2, -2, 0, -1]), abs=1e-5)
    assert seen["future"][0, 0] == pytest.approx(f32([-1, -1, 0.5 - np.pi / 2]), abs=1e-5)
    assert (seen["ego"] == batch()["ego"]).all()


def test_displacement_keeps_distances_and_is_within_its_bounds():
    before = batch(500)
    seen = displace(0.5, 0.1)(before, rng())
    apart = np.linalg.norm(seen["agents"][:, 0, 0, :2] - seen["agents"][:, 1, 0, :2], axis=-1)
    assert apart == pytest.approx(np.hypot(10, 4), abs=1e-4)
    turned = np.arctan2(seen["agents"][:, 1, 0, 3], seen["agents"][:, 1, 0, 2])
    assert np.abs(turned).max() <= 0.1001 and np.abs(turned).max() > 0.09


@pytest.mark.parametrize("augmentation", [mirror(1.0), displace(1.0, 0.3), drop_agents(0.9), hide_motion(1.0)])
def test_padding_stays_zero_and_numbers_keep_their_type(augmentation: Augmentation):
    before = batch(50)
    seen = augmentation(before, rng())
    for name in ("agents", "roads", "lines", "future"):
        padding = seen[name][~seen[f"{name}_valid"]]
        assert padding.size and not padding.any(), name
    assert {name: (value.shape, value.dtype) for name, value in seen.items()} == {
        name: (value.shape, value.dtype) for name, value in before.items()
    }


@pytest.mark.parametrize("augmentation", [mirror(0.5), displace(1.0, 0.3), drop_agents(0.9), hide_motion(0.5)])
def test_augmentation_is_seeded_and_leaves_what_it_is_given(augmentation: Augmentation):
    given, kept = batch(50), batch(50)
    one, two, other = (augmentation(given, rng(seed)) for seed in (1, 1, 2))
    assert all((given[name] == kept[name]).all() for name in kept)
    assert all((one[name] == two[name]).all() for name in kept)
    assert any((one[name] != other[name]).any() for name in kept)


def test_dropped_agents_leave_no_gap():
    seen = drop_agents(1.0)(batch(400), rng())
    counts = seen["agents_valid"].any(-1).sum(1)
    assert set(counts.tolist()) == {0, 1, 2}
    nearest = seen["agents"][:, 0, 0, 0]
    assert set(nearest[counts == 2].tolist()) == {10.0} and set(nearest[counts == 1].tolist()) == {10.0, 20.0}
    # A share that is drawn evenly between none and all of them leaves half.
    assert counts.mean() == pytest.approx(1.0, abs=0.1)


def test_dropped_agent_is_dropped_at_all_moments():
    samples = batch(200)
    samples["agents"] = samples["agents"].repeat(3, axis=2)
    samples["agents_valid"] = samples["agents_valid"].repeat(3, axis=2)
    valid = drop_agents(0.7)(samples, rng())["agents_valid"]
    assert (valid.all(-1) == valid.any(-1)).all()


def test_hidden_motion_is_that_of_a_share_of_the_egos():
    before, seen = batch(4000), hide_motion(0.25)(batch(4000), rng())
    hidden = (seen["ego"][:, :3] == 0).all(-1)
    assert hidden.mean() == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(seen["ego"][~hidden], before["ego"][~hidden])
    assert np.array_equal(seen["ego"][:, 3:], before["ego"][:, 3:])


def test_augmentations_are_those_that_are_asked_for():
    def of(**changes: float) -> int:
        values = {f"augment.{key}": value for key, value in changes.items()}
        return len(augmentations.chosen(AugmentSettings.of(settings(**values))))

    assert [of(), of(mirror=0.5), of(turn=0.1), of(shift=0.1, turn=0.1)] == [0, 1, 1, 1]
    assert of(drop_agents=0.1, mirror=0.5, hide_motion=0.5) == 3
    with pytest.raises(ConfigError, match="augment.mirror is 2; it must be between 0 and 1"):
        of(mirror=2.0)
