"""What a suite of environments is: its tasks by name, and how one of them is made."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
from gymnasium.envs.registration import EnvSpec

from config import UserError
from envs.workers import MakeEnv


class Suite(ABC):
    """Environments of one origin, whose packages an extra installs and nothing imports before a task is asked for.

    Attributes:
        EXTRA: of pyproject.toml.
        PACKAGES: what has to be importable.
    """

    EXTRA: ClassVar[str]
    PACKAGES: ClassVar[tuple[str, ...]]

    @abstractmethod
    def tasks(self) -> list[str]:
        """The names of all tasks, without the prefix of the suite."""

    @abstractmethod
    def make(self, name: str, *, render_mode: str | None = None) -> gymnasium.Env:
        """The environment of a task. A suite's other arguments, all by name, are those that `env.kwargs` may give."""

    def maker(self, task: str, name: str, *, render_mode: str | None, arguments: Mapping[str, Any]) -> MakeEnv:
        """What makes the environment of a task.

        Args:
            task: as the user calls it.
            name: the same without the prefix of the suite.
            render_mode: as environments take it.
            arguments: of `make`.

        Raises:
            UserError: packages are missing, or there is no such task or argument. The message says what would do.
        """
        missing = [package for package in self.PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"task {task} needs {' and '.join(missing)}, which is not installed:"
                f' pip install -e ".[{self.EXTRA}]" -c constraints.txt'
            )
        if name not in (tasks := self.tasks()):
            prefix = task.removesuffix(name)
            nearest = [prefix + each for each in difflib.get_close_matches(name, tasks, n=3, cutoff=0.3)]
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"the first is {prefix}{tasks[0]}"
            raise UserError(f"there is no task {task}; {hint}")
        taken = self.arguments()
        for key in arguments:
            if taken is not None and key not in taken:
                others = f"it takes {', '.join(taken)}" if taken else "it takes none"
                raise UserError(f"env.kwargs has {key}, which {task} does not take; {others}")
        return functools.partial(self._make_named, task, name, render_mode, dict(arguments))

    def arguments(self) -> list[str] | None:
        """The names that `env.kwargs` may have; None where the environment itself knows."""
        parameters = inspect.signature(self.make).parameters.values()
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            return None
        return [each.name for each in parameters if each.name not in ("name", "render_mode")]

    def _make_named(self, task: str, name: str, render_mode: str | None, arguments: Mapping[str, Any]) -> gymnasium.Env:
        env = self.make(name, render_mode=render_mode, **arguments)
        if env.unwrapped.spec is None:
            # By this name messages speak of it.
            env.unwrapped.spec = EnvSpec(task)
        return env
