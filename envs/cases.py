"""Which episode of an evaluation each of its environments plays."""

from __future__ import annotations


class Cases:
    """Which episode of an evaluation each row plays: the next that none has begun.

    So the episodes of an evaluation, counted from 0, begin with the same seeds however many rows share them.
    """

    def __init__(self, num_envs: int, *, seed: int) -> None:
        self.seed = seed
        self.of_row = [-1] * num_envs
        self._attempts = [0] * num_envs
        self._begun = 0

    def begin(self, row: int, *, again: bool) -> tuple[int, int]:
        """Number and attempt of the episode that a row begins: the same number where it begins it `again`."""
        if not again:
            self.of_row[row], self._attempts[row] = self._begun, 0
            self._begun += 1
        self._attempts[row] += 1
        return self.of_row[row], self._attempts[row]
