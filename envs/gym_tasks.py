"""What makes the environment that a task names: one of a suite, or any that is registered with gymnasium."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium

from config import UserError, import_named
from envs.suites.registry import suite_of
from envs.workers import MakeEnv
from envs.wrappers import with_clipped_rewards, wrapped
from settings.environment import GYM_PREFIX, WrapperSettings

PLAIN = WrapperSettings()


def make_gym(
    task: str,
    *,
    imports: str = "",
    render_mode: str | None = None,
    settings: WrapperSettings = PLAIN,
    training: bool = False,
) -> MakeEnv:
    """What makes the environment of a task such as "gym_CartPole-v1" or "dmc_walker_walk".

    Args:
        task: "gym_" and a registered id, or the prefix of a suite and the name of one of its tasks.
        imports: names of modules to import first, separated by commas: those that register ids.
        render_mode: as the environment takes it.
        settings: its arguments, and what is done to its steps.
        training: whether rewards are clipped, too, where the settings say so.

    Raises:
        UserError: a module cannot be imported, or the task or the name of an argument is unknown.
    """
    modules = [name.strip() for name in imports.split(",") if name.strip()]
    for name in modules:
        try:
            import_named(name)
        except ImportError as error:
            raise UserError(
                f"module '{name}' cannot be imported ({error}); it needs to be the name of a module, on the path, that"
                f" registers {task.removeprefix(GYM_PREFIX)}"
            ) from error
    arguments = settings.arguments
    found = suite_of(task)
    if found is None:
        make = _registered(task.removeprefix(GYM_PREFIX), modules, render_mode, arguments)
    else:
        suite, name = found
        make = suite.maker(task, name, render_mode=render_mode, arguments=arguments)
    return functools.partial(_make_wrapped, make, task, settings, training=training)


def _registered(env_id: str, modules: Sequence[str], render_mode: str | None, arguments: Mapping[str, Any]) -> MakeEnv:
    """What makes an environment by its id.

    Raises:
        UserError: it is unknown.
    """
    try:
        gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        nearest = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "import the module that registers it"
        raise UserError(f"no environment is registered as '{env_id}'; {hint}") from error
    return functools.partial(_make_registered, env_id, modules=modules, render_mode=render_mode, arguments=arguments)


def _make_registered(
    env_id: str, *, modules: Sequence[str], render_mode: str | None, arguments: Mapping[str, Any]
) -> gymnasium.Env:
    # Imported once more, since this may run in another process.
    for name in modules:
        importlib.import_module(name)
    # An environment that draws nothing may lack this argument.
    drawn: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    return gymnasium.make(env_id, **drawn, **arguments)


def _make_wrapped(make: MakeEnv, task: str, settings: WrapperSettings, *, training: bool) -> gymnasium.Env:
    try:
        env = make()
    except TypeError as error:
        unknown = [name for name in settings.arguments if f"unexpected keyword argument '{name}'" in str(error)]
        if not unknown:
            raise
        raise UserError(
            f"env.kwargs has {unknown[0]}, which {task} does not take; see the __init__ of its class"
        ) from error
    env = wrapped(env, settings)
    return with_clipped_rewards(env, settings) if training else env
