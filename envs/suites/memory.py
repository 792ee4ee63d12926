"""Tasks of POPGym, in which what is seen now does not tell what to do: the past has to be remembered."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium

from config import UserError
from envs.suites.suite import Suite


class Memory(Suite):
    """Tasks are called by POPGym's classes: RepeatFirstEasy, AutoencodeHard."""

    EXTRA: ClassVar = "memory"
    PACKAGES: ClassVar = ("popgym",)

    def tasks(self) -> list[str]:
        """Every class, in each of its difficulties."""
        from popgym.envs import ALL

        return sorted(each.__name__ for each in ALL)

    def make(self, name: str, *, render_mode: str | None = None, **arguments: Any) -> gymnasium.Env:
        """The environment of a task.

        Args:
            name: of the task.
            render_mode: None: few of these tasks can be drawn, and none by this program.
            arguments: of the class.

        Raises:
            UserError: it is to be drawn.
        """
        if render_mode is not None:
            raise UserError(f"tasks for memory are not drawn, {name} neither; it cannot be filmed")
        from popgym import envs

        return getattr(envs, name)(**arguments)
