"""Which rows of replay nobody has learnt from yet: windows side by side, the oldest first."""

from __future__ import annotations


class FreshWindows:
    """Where the next window of fresh rows begins.

    The rows of each environment are cut into windows one after another, and each is taken once, the oldest first:
    of all environments before the next columns.

    Attributes:
        column: the first column of the next window.
        env: its environment.
    """

    def __init__(self, *, num_envs: int) -> None:
        self.num_envs, self.column, self.env = num_envs, 0, 0

    def take(self, most: int, length: int, *, oldest: int, total: int) -> tuple[int, int, int]:
        """Take as many windows as have been lived through whole.

        Args:
            most: windows to take at most.
            length: rows in each.
            oldest: the oldest column that is stored; what came before is passed over.
            total: columns until now.

        Returns:
            How many windows there are, and column and environment of the first.
        """
        if self.column < oldest:
            self.skip(oldest)
        column, env = self.column, self.env
        ready = (total - column) // length * self.num_envs - env
        count = max(0, min(most, ready))
        blocks, self.env = divmod(env + count, self.num_envs)
        self.column += blocks * length
        return count, column, env

    def skip(self, column: int) -> None:
        """Pass over all columns before one."""
        self.column, self.env = column, 0
