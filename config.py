"""Configuration: what programs ask of the package `settings`, under one name."""

from __future__ import annotations

from settings.command_line import CommandLine, parse_command_line
from settings.files import load, load_defaults, parse, read, save, to_yaml
from settings.mapping import Config, difference, filled
from settings.named_code import CODE_KEYS, compiled, import_named, load_function, require_trust
from system.errors import ConfigError, UserError
from system.terminal import one_line_errors

__all__ = [
    "CODE_KEYS",
    "CommandLine",
    "Config",
    "ConfigError",
    "UserError",
    "compiled",
    "difference",
    "filled",
    "import_named",
    "load",
    "load_defaults",
    "load_function",
    "one_line_errors",
    "parse",
    "parse_command_line",
    "read",
    "require_trust",
    "save",
    "to_yaml",
]
