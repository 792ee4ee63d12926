"""Numbers of environments that are NaN, infinite or beyond float32: refused, set to 0 or dropped, and counted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Shaped

from config import UserError, compiled

# The key that stands for rewards where observations are chosen by key.
REWARD = "reward"


class BadInput(UserError):
    """An environment gave a number that is NaN, infinite or beyond float32. The message is one line."""


class BadInputs:
    """Sees to what is not finite in observations and rewards, as two regular expressions over their keys say.

    Attributes:
        counts: how many observations and rewards were set to 0 or dropped so far, by key.
        rows: the environments of which any was, since `begin_step`.
    """

    def __init__(
        self,
        *,
        zero_keys: str,
        drop_keys: str,
        notice_once: Callable[[str, str], None],
        where: Callable[[int], str],
    ) -> None:
        """Begin with none.

        Args:
            zero_keys: where it matches a whole key, bad numbers are set to 0.
            drop_keys: the same for episodes to be dropped. It comes first: `zero_keys` may be a config's for all
                observations, and this what a user asks for of one.
            notice_once: takes a topic, and the line that the user should read the first time.
            where: names an environment, and the step of its episode at which it is.

        Raises:
            UserError: one is no regular expression.
        """
        self._zero_keys, self._drop_keys = compiled(zero_keys), compiled(drop_keys)
        self._notice_once, self._where = notice_once, where
        self.counts: dict[str, int] = {}
        self.rows: set[int] = set()

    def begin_step(self) -> None:
        """Forget which environments the last step was about."""
        self.rows = set()

    def mend(self, numbers: Mapping[str, Shaped[np.ndarray, "E *S"]]) -> list[int]:
        """See to all environments, in place. Returns those whose episode is to be dropped.

        Args:
            numbers: observations by key, and rewards.

        Raises:
            BadInput: a number is bad, and its key in neither expression.
        """
        if all(np.isfinite(values).all() for values in numbers.values()):
            return []
        rows = range(len(next(iter(numbers.values()))))
        return [row for row in rows if self.mend_row(row, numbers)]

    def mend_row(
        self, row: int, numbers: Mapping[str, Shaped[np.ndarray, "E *S"]], *, begun: int | None = None
    ) -> bool:
        """The same for one environment. Returns whether its episode is to be dropped.

        Args:
            row: the environment.
            numbers: as for `mend`.
            begun: the episodes in a row that began so, where another one may not be dropped.
        """
        drop = False
        for key, of_all in numbers.items():
            # A slice also writes through where a row is one number.
            values = of_all[row : row + 1]
            bad = ~np.isfinite(values)
            if not bad.any():
                continue
            fault = (
                f"{self._where(row)}: '{key}' has {bad.sum()} of {bad.size}"
                " entries that are NaN, infinite or beyond float32"
            )
            dropped, zeroed = self._drop_keys.fullmatch(key), self._zero_keys.fullmatch(key)
            if dropped and begun is None:
                drop = True
                remedy = "the rest of the episode is dropped"
            elif zeroed:
                values[bad] = 0
                remedy = "they are set to 0"
            elif dropped:
                raise BadInput(
                    f"{fault}, and so began {begun} episodes in a row; mend the environment,"
                    f" or let such entries be set to 0 with --guard.zero_keys {_wider(self._zero_keys, key)}"
                )
            else:
                raise BadInput(
                    f"{fault}; mend the environment, or let such entries be set to 0 with --guard.zero_keys"
                    f" {_wider(self._zero_keys, key)}, or such episodes be dropped with --guard.drop_keys"
                    f" {_wider(self._drop_keys, key)}"
                )
            self.note(row, key, f"{fault}; {remedy}")
        return drop

    def note(self, row: int, key: str, line: str) -> None:
        """Count what was not finite, and say so the first time."""
        self.rows.add(row)
        self.counts[key] = self.counts.get(key, 0) + 1
        self._notice_once(f"bad {key}", f"{line}, now and whenever it happens again")


def _wider(pattern: re.Pattern[str], key: str) -> str:
    """What matches `key`, too, as the command line takes it."""
    return shlex.quote("|".join(filter(None, (pattern.pattern, re.escape(key)))))
