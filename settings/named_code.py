"""Code and patterns that a config names: what is imported, called or matched, and only where the user trusts it."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from settings.environment import holds_text
from settings.mapping import Config
from system.errors import ConfigError

MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def _names_function(value: object) -> bool:
    return ":" in str(value)


# Every key whose value can name code, with what tells whether it does: a module that is imported, or a function that is
# called. `task: gym_module:Id` has gymnasium import the module; a text among the arguments of an environment may name a
# file or a module, by whatever the environment makes of it.
CODE_KEYS: dict[str, Callable[[object], bool]] = {
    "import": bool,
    "cost": _names_function,
    "imag_reward": _names_function,
    "language.reward": _names_function,
    "logger": _names_function,
    "task": _names_function,
    "env.kwargs": holds_text,
}


def require_trust(
    config: Config, source: Path, *, given: Config | None, trust: bool, unused: Collection[str] = ()
) -> None:
    """Check that a config from a file names no code but what the user named too.

    Args:
        config: as the file has it.
        source: the file, or the folder with it.
        given: the config that the user's own command line makes.
        trust: whether the user trusts the file.
        unused: keys whose value nobody will read.

    Raises:
        ConfigError: it names other code. Nothing has been imported or called.
    """
    values, own = config.flat(), {} if given is None else given.flat()
    for key, names_code in CODE_KEYS.items():
        if key in unused:
            continue
        value = values.get(key, "")
        if names_code(value) and not trust and own.get(key) != value:
            repeat = "" if given is None else f"repeat --{key} {shlex.quote(str(value))}, or "
            flag = "--trust" if given is None else "--trust true"
            raise ConfigError(
                f"{source} names code: {key} is {str(value)!r}, which would be imported or called. Code that a file"
                f" names is run only if you say so: look at it first, then {repeat}give {flag}"
            )


def import_named(name: str) -> ModuleType:
    """The module that a user named. What its own code raises is the user's to see, and keeps its traceback.

    Raises:
        ImportError: there is none, it cannot be read, or it ends the program that imports it.
    """
    if not MODULE_NAME.fullmatch(name):
        raise ImportError(f"'{name}' is no name of a module")
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        raise ImportError(str(error)) from error
    except SystemExit as error:
        raise ImportError("it ends the program that imports it") from error


def load_function(name: str, *, key: str) -> Callable[..., Any]:
    """The user's function that config key `key` names as `module:function`.

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_named(module_name)
        if not hasattr(module, function_name):
            raise ImportError(f"module '{module_name}' has no '{function_name}'")
    except ImportError as error:
        raise ConfigError(
            f"{key} names {name!r}, which cannot be loaded: {error}; it needs the name of a module on the path and of a"
            " function in it, such as my_module:my_function"
        ) from error
    function = getattr(module, function_name)
    if not callable(function):
        raise ConfigError(f"{key} names {name!r}, which is {type(function).__name__} and no function")
    return function


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that somebody gave.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
