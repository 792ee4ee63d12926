"""The Behaviour Suite: small tasks that each ask for one ability, such as memory or exploration."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium

from config import UserError
from envs.suites.dm_env_tasks import DmEnvTask
from envs.suites.suite import Suite


class BSuite(Suite):
    """Tasks are called by experiment and setting: cartpole/0, memory_len/9, deep_sea/0."""

    EXTRA: ClassVar = "bsuite"
    PACKAGES: ClassVar = ("bsuite",)

    def tasks(self) -> list[str]:
        """Every experiment in each of its settings."""
        from bsuite import sweep

        return list(sweep.SWEEP)

    def make(self, name: str, *, render_mode: str | None = None, **arguments: Any) -> gymnasium.Env:
        """The environment of a task.

        Args:
            name: of the experiment and its setting.
            render_mode: None: these tasks cannot be drawn.
            arguments: of the experiment, in place of the setting's own.

        Raises:
            UserError: it is to be drawn.
        """
        if render_mode is not None:
            raise UserError(f"bsuite draws no task, {name} neither; it cannot be filmed")
        import bsuite
        from bsuite import sweep

        experiment, _, _ = name.partition("/")
        env = bsuite.bsuite.load(experiment, {**sweep.SETTINGS[name], **arguments})

        def reseed(seed: int) -> None:
            # Experiments wrap one another, and each has random numbers of its own.
            part = env
            while part is not None:
                if "_rng" in vars(part):
                    part._rng.seed(seed)
                part = vars(part).get("_env")

        return DmEnvTask(env, reseed=reseed)
