"""Rows of a cache as a model is trained on them: all in memory, drawn by the weights of their types, or in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from jaxtyping import Int64
from tqdm import tqdm

from scenarios import augmentations
from scenarios.augmentations import Augmentation
from scenarios.cache import Cache
from scenarios.manifest import Entry
from scenarios.parts import Part
from scenarios.samples import Samples
from settings.scenarios import SCENARIO_TYPES, ScenarioWeights
from system.errors import UserError
from system.memory import require_memory

# The array that says how much of each row's future is known.
KNOWN = "future_valid"


class Rows:
    """Samples of N rows.

    Attributes:
        arrays: by name, each with N in front.
        types: of each row, as places in `SCENARIO_TYPES`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], types: Int64[np.ndarray, " N"]) -> None:
        """Take them; nothing is copied."""
        self.arrays, self.types = dict(arrays), types

    def __len__(self) -> int:
        return len(self.types)

    def at(self, indices: Int64[np.ndarray, " B"]) -> Samples:
        """Some of the rows, as a batch."""
        return {name: values[indices] for name, values in self.arrays.items()}

    def batches(self, size: int) -> Iterator[Samples]:
        """All rows in order, so many at a time; the last batch may be smaller."""
        for begin in range(0, len(self), size):
            yield {name: values[begin : begin + size] for name, values in self.arrays.items()}


class Draws:
    """Batches of rows for training, each drawn by the weights of types and augmented.

    A batch depends on the seed and on its number alone, so that a run goes on by knowing how many it has had.
    """

    def __init__(
        self, rows: Rows, weights: ScenarioWeights, *, augmented: Sequence[Augmentation] = (), seed: int
    ) -> None:
        """Prepare draws.

        Args:
            rows: to be drawn from.
            weights: how often a row of each type is drawn, relative to one of another type.
            augmented: what is done to each batch.
            seed: of all draws.

        Raises:
            UserError: no row has a weight above 0.
        """
        by_type = np.array([asdict(weights)[name] for name in SCENARIO_TYPES])
        self._sums = np.cumsum(by_type[rows.types])
        if not len(rows) or not self._sums[-1]:
            raise UserError("no row to train on has a weight above 0; see scenario_weights")
        self._rows, self._augmented, self._seed = rows, augmented, seed

    def batch(self, number: int, size: int) -> Samples:
        """The batch of a number, of so many rows."""
        rng = np.random.default_rng((self._seed, number))
        places = rng.random(size) * self._sums[-1]
        # A row of weight 0 takes no room, and is met by no place.
        indices = np.minimum(np.searchsorted(self._sums, places, side="right"), len(self._rows) - 1)
        return augmentations.augment(self._rows.at(indices), self._augmented, rng)


def load(cache: Cache, entries: Sequence[Entry], parts: Sequence[Part], *, what: str) -> Rows:
    """The rows of some scenarios, one after the other, without those of which no future is known.

    Args:
        cache: that they are in.
        entries: which.
        parts: that are wanted of them.
        what: they are for, beside the progress bar.

    Raises:
        UserError: a file is missing or damaged, or there is too little memory.
    """
    count = sum(entry.scenario.rows for entry in entries)
    specs = {name: spec for part in parts for name, spec in part.arrays.items()}
    require_memory(
        count * sum(spec.bytes for spec in specs.values()),
        device=torch.device("cpu"),
        work=f"{count:,} samples to {what} take",
        remedy="take fewer: --scenario_filter.total COUNT",
    )
    arrays = {name: np.empty((count, *spec.shape), spec.dtype) for name, spec in specs.items()}
    types = np.empty(count, np.int64)
    row = 0
    for entry in tqdm(entries, desc=f"samples to {what}", delay=2, disable=None):
        samples = cache.read(entry.scenario, parts)
        # The last row of a log has nothing to be compared with.
        known = samples[KNOWN].any(-1) if KNOWN in specs else np.ones(entry.scenario.rows, bool)
        end = row + int(known.sum())
        for name, values in arrays.items():
            values[row:end] = samples[name][known]
        types[row:end] = SCENARIO_TYPES.index(entry.scenario.type)
        row = end
    return Rows({name: values[:row] for name, values in arrays.items()}, types[:row])
