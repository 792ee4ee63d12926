"""What makes the gymnasium environment that a task names."""

from __future__ import annotations

import difflib
import functools
import importlib

import gymnasium

from config import UserError, import_named
from envs.workers import MakeEnv

TASK_PREFIX = "gym_"


def make_gym(task: str, *, imports: str = "", render_mode: str | None = None) -> MakeEnv:
    """What makes the environment of a task such as "gym_CartPole-v1".

    Args:
        task: "gym_" and a registered id.
        imports: names of modules to import first, separated by commas: those that register ids.
        render_mode: as the environment takes it.

    Raises:
        UserError: a module cannot be imported, or the id is unknown.
    """
    modules = [name.strip() for name in imports.split(",") if name.strip()]
    env_id = task.removeprefix(TASK_PREFIX)
    for name in modules:
        try:
            import_named(name)
        except ImportError as error:
            raise UserError(
                f"module '{name}' cannot be imported ({error}); it needs to be the name of a module, on the path, that"
                f" registers {env_id}"
            ) from error
    try:
        gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        nearest = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "import the module that registers it"
        raise UserError(f"no environment is registered as '{env_id}'; {hint}") from error
    return functools.partial(_make_registered, env_id, modules=modules, render_mode=render_mode)


def _make_registered(env_id: str, *, modules: list[str], render_mode: str | None) -> gymnasium.Env:
    # Imported once more, since this may run in another process.
    for name in modules:
        importlib.import_module(name)
    # An environment that draws nothing may lack this argument.
    return gymnasium.make(env_id) if render_mode is None else gymnasium.make(env_id, render_mode=render_mode)
