"""Configs in YAML files: sections that lie over one another, and the resolved config of a run."""

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from settings.mapping import Config, as_text, filled, lookup, nearest, overlaid
from system import safe_files, terminal
from system.errors import ConfigError

DEFAULTS = "defaults"
# The key of a section that names those it builds on.
BASE = "base"
COMMAND_LINE = "command line"
# A dozen times configs.yaml; the parser takes 5 seconds for that many bytes.
MOST_YAML_BYTES = 2**18
# Entries, with those that aliases repeat; configs.yaml has 1,500, in 4 levels. A few lines of aliases make billions.
MOST_YAML_ENTRIES = 20_000
DEEPEST_YAML = 32
# The lines up to the end of section `defaults`: sections begin at the margin.
_UP_TO_DEFAULTS = re.compile(rf".*?^{DEFAULTS}:.*?(?=^[^\s#])", re.MULTILINE | re.DOTALL)


def load(path: Path, names: Sequence[str], overrides: Mapping[str, str]) -> Config:
    """Section `defaults`, overlaid by each named section in order, then by the overrides.

    What a section builds on, by its key `base`, lies right below it. The section called like the family of the
    resulting task (`gym` for gym_CartPole-v1) lies right above the defaults, named or not.

    Args:
        path: a YAML file whose top level holds the sections.
        names: sections to overlay.
        overrides: dotted key -> text, read as a YAML scalar or list (as it stands where the default is a string).

    Raises:
        ConfigError: the file cannot be read; an unknown section or key; a value of another type than the default's.
    """
    sections = read_sections(path)
    config = _resolved(path, sections, names, overrides)
    family = str(config.get("task", "")).partition("_")[0]
    if family in sections:
        config = _resolved(path, sections, [family, *(name for name in names if name != family)], overrides)
    return config


def load_defaults(path: Path) -> Config:
    """Section `defaults` alone. The sections behind it are not parsed, which takes most of the time of `load`.

    Raises:
        ConfigError: the file cannot be read, or has no such section.
    """
    text = _readable_text(path)
    lines = _UP_TO_DEFAULTS.match(text)
    return Config(_sections(_mapping(text if lines is None else lines[0], str(path)), path)[DEFAULTS].values)


def _resolved(path: Path, sections: Sections, names: Sequence[str], overrides: Mapping[str, str]) -> Config:
    defaults = config = Config(sections[DEFAULTS].values)
    for name in layers(path, sections, names):
        config = overlaid(config, sections[name].values, defaults, where=f"{path}, section {name}")
    return overlaid(config, _parsed(overrides, defaults), defaults, where=COMMAND_LINE)


def layers(path: Path, sections: Sections, names: Sequence[str], *, above: tuple[str, ...] = ()) -> list[str]:
    """The named sections in order, each after those that it builds on.

    Args:
        path: the file, for the message.
        sections: all that it has.
        names: of those that are wanted.
        above: sections that build on them.

    Raises:
        ConfigError: there is no such section, or one builds on itself.
    """
    found: list[str] = []
    for name in names:
        if name not in sections:
            raise ConfigError(f"{path} has no section '{name}'; {nearest(name, sections)}")
        if name in above:
            raise ConfigError(f"{path}: section {name} builds on itself: {' on '.join([*above, name])}")
        found += [*layers(path, sections, sections[name].base, above=(*above, name)), name]
    return found


def _parsed(overrides: Mapping[str, str], defaults: Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        is_text = isinstance(lookup(key, defaults, where=COMMAND_LINE), str)
        values[key] = text if is_text else read_value(text, key=key, where=COMMAND_LINE)
    return values


def read_value(text: str, *, key: str, where: str) -> Any:
    """A scalar, list or mapping of YAML.

    Args:
        text: YAML, on one line or more.
        key: that it is a value of, for the message.
        where: it comes from, likewise.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return copy.deepcopy(_yaml().load(text))
    except (YAMLError, ValueError, KeyError, RecursionError, safe_files.TooLargeError) as error:
        raise ConfigError(f"{where}: cannot read {text!r} as a value of {key}") from error


class FileSection(NamedTuple):
    """A section of a file: the names of those that it builds on, and its own values."""

    base: tuple[str, ...]
    values: dict[Any, Any]


Sections = dict[str, FileSection]


def read_sections(path: Path) -> Sections:
    """The sections of a file, in its order.

    Raises:
        ConfigError: the file cannot be read, holds something else than sections, or has no defaults.
    """
    return _sections(_read_mapping(path), path)


def _sections(content: Mapping[str, Any], path: Path) -> Sections:
    if DEFAULTS not in content:
        raise ConfigError(f"{path} has no section '{DEFAULTS}'")
    sections: Sections = {}
    for name, values in content.items():
        if not isinstance(values, dict):
            raise ConfigError(f"section '{name}' of {path} must be a mapping of keys to values")
        base = [] if name == DEFAULTS else values.get(BASE, [])
        if not isinstance(base, list) or not all(isinstance(each, str) for each in base):
            raise ConfigError(f"section '{name}' of {path} has {BASE} {as_text(base)}; it takes a list of sections")
        own = {key: value for key, value in values.items() if key != BASE or name == DEFAULTS}
        sections[name] = FileSection(tuple(base), own)
    return sections


def read_text(path: Path) -> str:
    """The text of a file of sections, with its comments."""
    return safe_files.read_text(path, most=MOST_YAML_BYTES)


def save(config: Config, path: Path) -> None:
    """Write a resolved config as YAML, at once; `read` is the inverse."""
    safe_files.write_text(path, to_yaml(config))


def read(path: Path, *, missing_from: Config | None = None) -> Config:
    """The config that `save` wrote; a key that did not exist then is taken from `missing_from`.

    Raises:
        ConfigError: the file is missing or is no such config.
    """
    saved = _read_mapping(path)
    return Config(saved) if missing_from is None else filled(saved, missing_from, where=str(path))


def parse(text: str, *, where: str) -> Config:
    """The config that `to_yaml` wrote.

    Args:
        text: YAML.
        where: it comes from, for the message.

    Raises:
        ConfigError: it is no such config.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ConfigError(f"{where} has {len(text):,} letters, and configs have {MOST_YAML_BYTES:,} at most")
    return Config(_mapping(text, where))


def to_yaml(config: Config) -> str:
    """The config as YAML text."""
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(config.to_dict(), stream)
    return stream.getvalue()


def _read_mapping(path: Path) -> dict[str, Any]:
    return _mapping(_readable_text(path), str(path))


def _readable_text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = copy.deepcopy(_content(text))
    except MarkedYAMLError as error:
        line = f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where
        raise ConfigError(f"{line}: {str(error.problem).splitlines()[0]}") from error
    except YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {str(error).splitlines()[0]}") from error
    except safe_files.TooLargeError as error:
        raise ConfigError(f"{where} {error}") from error
    # The parser goes as deep as the text does; a date or a number that is none is found while values are made.
    except (ValueError, KeyError, RecursionError) as error:
        raise ConfigError(f"{where} holds what cannot be read ({terminal.one_line(str(error))})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must hold a mapping of keys to values")
    return content


@functools.lru_cache(maxsize=4)
def _content(text: str) -> Any:
    # A program's start reads configs.yaml several times, and parsing it is most of what that takes.
    return _yaml().load(text)


class _SmallConstructor(SafeConstructor):
    """Refuses what aliases make large before any of it is made."""

    def construct_document(self, node: Node) -> Any:
        safe_files.require_small(node, _entries, most=MOST_YAML_ENTRIES, deepest=DEEPEST_YAML)
        return super().construct_document(node)


def _entries(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _yaml() -> YAML:
    # The pure reader follows YAML 1.2, in which 1e-2 is a number and `on` is a string.
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _SmallConstructor
    return yaml
