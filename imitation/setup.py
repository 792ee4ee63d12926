"""From a config to what a planner learns from and is judged by: a cache, filled where it has to be, split by logs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import Config
from driving.candidates import MODES, STEPS
from imitation.batches import NEEDS
from imitation.evaluation import DrivingEvaluator, spread
from imitation.source import Cached
from imitation.task import PlanningTask
from scenarios import augmentations, caching, dataset
from scenarios.cache import Cache
from scenarios.dataset import Draws, Rows
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs, Part, chosen
from scenarios.report import Report
from scenarios.splits import Split, split
from settings.imitation import ImitationSettings
from settings.scenarios import ScenarioSettings
from training.setup import Setup


class Filled(NamedTuple):
    """A cache that has all that a config asks of it.

    Attributes:
        cache: where samples are.
        report: what there is, and what it took.
        parts: that a sample consists of.
    """

    cache: Cache
    report: Report
    parts: tuple[Part, ...]

    def rows(self, entries: list[Any], *, what: str) -> Rows:
        """The samples of some scenarios."""
        return dataset.load(self.cache, entries, self.parts, what=what)


# All that can be built, so that a cache is also a replay for `dreamer.py`.
EVERYTHING = Needs(features=tuple(name for part in KNOWN for name in part.arrays), targets=())


def fill(config: Config, needs: Needs = NEEDS) -> Filled:
    """Have in the cache what the config describes.

    Args:
        config: says which scenarios.
        needs: what is asked of each sample.

    Raises:
        UserError: it cannot be had.
    """
    settings = ScenarioSettings.of(config)
    report = caching.fill(settings, needs, KNOWN, seed=config.seed)
    return Filled(Cache(Path(settings.cache.path)), report, chosen(needs, KNOWN))


def make_setup(config: Config, device: torch.device, **_: Any) -> Setup:
    """What a planner's run needs; the cache is filled and read when somebody asks for it.

    Raises:
        UserError: a value of the config is out of its range.
    """
    scenarios, settings = ScenarioSettings.of(config), ImitationSettings.of(config)

    @functools.cache
    def filled() -> tuple[Filled, Split]:
        found = fill(config)
        return found, split(found.report.entries, scenarios.split)

    def make_source() -> Cached:
        cache, sets = filled()
        rows = cache.rows(sets.train, what="learn from")
        draws = Draws(rows, scenarios.weights, augmented=augmentations.chosen(scenarios.augment), seed=config.seed)
        logs = {entry.scenario.log for entry in sets.train}
        told = [f"{len(rows):,} rows of {len(logs):,} logs in {scenarios.cache.path}", *cache.report.lines()]
        return Cached(rows, draws, told=told)

    def make_evaluator(pictures: Any) -> DrivingEvaluator:
        cache, sets = filled()
        rows = {
            "valid": spread(cache.rows(sets.valid, what="validate"), settings.valid_rows),
            "test": cache.rows(sets.test, what="test"),
            "held_out": cache.rows(sets.held_out, what="test"),
        }
        return DrivingEvaluator(rows, device=device)

    def nowhere(_: Any) -> Any:
        raise AssertionError("logs are learnt from without an environment")

    task = PlanningTask(modes=MODES, points=STEPS)
    return Setup(task, nowhere, make_evaluator, close=lambda: None, make_source=make_source)
