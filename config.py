"""Configuration: load configs.yaml, merge its sections and the command line, validate."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import itertools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from system import safe_files, terminal
from system.errors import UserError

DEFAULTS = "defaults"
COMMAND_LINE = "command line"
# Overlays for every program, though each reads only some of their keys.
FOR_ALL_PROGRAMS = (DEFAULTS, "debug", "gym")
# A layer that sets the first of two keys alone sets the other with it: only who asks for a schedule gets one.
FOLLOWERS = {"actor.entropy": "actor.entropy_final"}
MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

# A dozen times configs.yaml; the parser takes 5 seconds for that many bytes.
MOST_YAML_BYTES = 2**18
# Entries, with those that aliases repeat; configs.yaml has 1,500, in 4 levels. A few lines of aliases make billions.
MOST_YAML_ENTRIES = 20_000
DEEPEST_YAML = 32


def _names_function(value: object) -> bool:
    return ":" in str(value)


# Every key whose value can name code, with what tells whether it does: a module that is imported, or a function that is
# called. `task: gym_module:Id` has gymnasium import the module.
CODE_KEYS: dict[str, Callable[[object], bool]] = {
    "import": bool,
    "cost": _names_function,
    "imag_reward": _names_function,
    "task": _names_function,
}


class ConfigError(UserError):
    """A mistake in a config file or on the command line."""


class Config(Mapping[str, Any]):
    """An immutable nested mapping: `config.actor.entropy`, `config["actor"]["entropy"]`. Lists become tuples."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[Any, Any]) -> None:
        """Copy `values`.

        Raises:
            ConfigError: a key is not a plain string, or would hide one of this class's own methods.
        """
        for key in values:
            if not isinstance(key, str) or "." in key or hasattr(type(self), key):
                raise ConfigError(f"{key!r} cannot be a config key; choose another name")
        object.__setattr__(self, "_values", {key: _freeze(value) for key, value in values.items()})

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # also what copy and pickle ask for before there are any values
            raise AttributeError(key)
        if key not in self._values:
            raise AttributeError(f"no config key '{key}'; {_nearest(key, self._values)}")
        return self._values[key]

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"a config cannot be changed; use replace({key}=...)")

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (self.to_dict(),)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self.to_dict()!r})"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as in YAML."""
        return {key: _thaw(value) for key, value in self._values.items()}

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key: `{"actor.entropy": 3e-4, ...}`."""
        flat: dict[str, Any] = {}
        for key, value in self._values.items():
            if isinstance(value, Config):
                flat |= {f"{key}.{inner}": entry for inner, entry in value.flat().items()}
            else:
                flat[key] = value
        return flat

    def replace(self, **changes: Any) -> Config:
        """A config with some values changed; `replace(**{"actor.entropy": 0.0})` reaches into a section.

        Raises:
            ConfigError: an unknown key, or a value of another type than the present one.
        """
        return _overlaid(self, changes, self, where="replace")


class CommandLine(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: the resolved config.
        defaults: the config without any named section or override, to tell what differs.
        entry: the entry point's own flags; None for those not given.
        sections: the sections that it names, in order.
        overrides: the config keys that it gives values.
    """

    config: Config
    defaults: Config
    entry: dict[str, str | None]
    sections: list[str]
    overrides: list[str]


def load(path: Path, names: Sequence[str], overrides: Mapping[str, str]) -> Config:
    """Section `defaults`, overlaid by each named section in order, then by the overrides.

    The section called like the family of the resulting task (`gym` for gym_CartPole-v1) lies right above the
    defaults, named or not.

    Args:
        path: a YAML file whose top level holds the sections.
        names: sections to overlay.
        overrides: dotted key -> text, read as a YAML scalar or list (as it stands where the default is a string).

    Raises:
        ConfigError: the file cannot be read; an unknown section or key; a value of another type than the default's.
    """
    sections = _read_sections(path)
    config = _resolved(path, sections, names, overrides)
    family = str(config.get("task", "")).partition("_")[0]
    if family in sections:
        config = _resolved(path, sections, [family, *(name for name in names if name != family)], overrides)
    return config


def _resolved(path: Path, sections: dict[str, Any], names: Sequence[str], overrides: Mapping[str, str]) -> Config:
    defaults = config = Config(sections[DEFAULTS])
    for name in names:
        if name not in sections:
            raise ConfigError(f"{path} has no section '{name}'; {_nearest(name, sections)}")
        config = _overlaid(config, sections[name], defaults, where=f"{path}, section {name}")
    return _overlaid(config, _parsed(overrides, defaults), defaults, where=COMMAND_LINE)


def parse_command_line(
    argv: Sequence[str],
    *,
    config_path: Path,
    description: str,
    entry_keys: Mapping[str, str],
    base: Sequence[str] = (),
    of_others: Mapping[str, str] | None = None,
) -> CommandLine:
    """Read `--configs a b`, `--any.nested.key value` (or `=value`) and the entry point's own flags.

    Args:
        argv: the arguments, without the program's name. `--help` prints a page and exits with status 0.
        config_path: the YAML file with the sections.
        description: first lines of the help page.
        entry_keys: flag -> its line of help, for flags that are no config keys; each takes one value.
        base: sections that lie under those that are named.
        of_others: keys, or sections of keys, that another program reads and this one does not, with that program.

    Raises:
        ConfigError: as `load`; a flag without a value, or an argument that belongs to no flag; a key or a section that
            is for another program.
    """
    if "-h" in argv or "--help" in argv:
        page = _help_page(config_path, description=description, entry_keys=entry_keys, of_others=of_others or {})
        terminal.show(page)
        raise SystemExit(0)
    names: list[str] = []
    overrides: dict[str, str] = {}
    entry: dict[str, str | None] = dict.fromkeys(entry_keys)
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"{COMMAND_LINE}: unexpected '{argument}'; write --key value (see --help)")
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals:
            given = [value]
        else:
            limit = len(remaining) if key == "configs" else 1
            # Only two dashes begin a flag: -1e-3 is a value.
            given = list(itertools.takewhile(lambda text: not text.startswith("--"), remaining[:limit]))
            del remaining[: len(given)]
        if not given:
            raise ConfigError(f"{COMMAND_LINE}: --{key} needs a value (see --help)")
        if key == "configs":
            names += given
        elif key in entry:
            entry[key] = given[0]
        else:
            overrides[key] = given[0]
    defaults = load(config_path, [], {})
    named = [name for name in names if name not in base]
    _require_own(named, overrides, path=config_path, entry_keys=entry_keys, of_others=of_others or {})
    settings = load(config_path, [*base, *names], overrides)
    return CommandLine(settings, defaults, entry, sections=names, overrides=list(overrides))


def _require_own(
    names: Sequence[str],
    overrides: Iterable[str],
    *,
    path: Path,
    entry_keys: Iterable[str],
    of_others: Mapping[str, str],
) -> None:
    """Check that this program reads each key that is given, and the keys of each section that is named.

    Raises:
        ConfigError: there is no such key or section, or another program reads it.
    """

    sections = _read_sections(path)
    defaults = Config(sections[DEFAULTS])
    own = [key for key in defaults.flat() if _other_reader([key], of_others) is None]
    for key in overrides:
        _lookup(key, defaults, where=COMMAND_LINE, valid=[*own, "configs", *entry_keys])
        if other := _other_reader([key], of_others):
            raise ConfigError(f"{COMMAND_LINE}: only {other} reads {key}; {_nearest(key, own)}")
    for name in names:
        if name not in sections:
            raise ConfigError(f"{path} has no section '{name}'; {_nearest(name, sections)}")
        if other := _other_owner(name, sections, of_others):
            raise ConfigError(f"section {name} is for another program: python {other} --configs {name}")


def _other_owner(name: str, sections: Mapping[str, Any], of_others: Mapping[str, str]) -> str | None:
    """The other program that a section is for, if any: one that is called like its keys, or sets one of them."""
    if name in FOR_ALL_PROGRAMS:
        return None
    return _other_reader([name, *_flatten(sections[name], Config(sections[DEFAULTS]))], of_others)


def _other_reader(keys: Iterable[str], of_others: Mapping[str, str]) -> str | None:
    """The program that reads one of the keys where this one does not, if any."""
    # `a`, `a.b` and `a.b.c` of the key a.b.c.
    parts = (part for key in keys for part in itertools.accumulate(key.split("."), "{}.{}".format))
    return next((of_others[part] for part in parts if part in of_others), None)


@contextmanager
def one_line_errors(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a UserError, or one of `kinds`, into one line on stderr and exit status 2; Ctrl-C likewise into 130.

    Anything else is a defect, of this program or of what the user gave it, and keeps its traceback. What stderr cannot
    show is dropped.
    """
    expected: tuple[type[Exception], ...] = (UserError, *kinds)
    with contextlib.redirect_stderr(terminal.Screen(sys.stderr)):
        try:
            yield
        except expected as error:
            terminal.tell(f"{program}: {terminal.one_line(str(error))}")
            raise SystemExit(2) from error
        except KeyboardInterrupt as error:
            terminal.tell(f"{program}: {error if error.args else 'interrupted'}")
            raise SystemExit(130) from error


def validate_choices(config: Config, choices: Mapping[str, Sequence[Any]]) -> None:
    """Check that each dotted key of `choices` has one of the values listed for it.

    Raises:
        ConfigError: it has another.
    """
    flat = config.flat()
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise ConfigError(f"{key} is {flat[key]!r}; choose one of {', '.join(map(str, allowed))}")


def validate_ranges(config: Config, ranges: Mapping[str, tuple[int | float, int | float]]) -> None:
    """Check that each number named by a dotted key lies within its bounds, both included; `math.inf` is no bound.

    Raises:
        ConfigError: one does not, or is infinite.
    """
    flat = config.flat()
    for key, (low, high) in ranges.items():
        if math.isinf(flat[key]):
            raise ConfigError(f"{key} is {flat[key]:g}; it must be finite")
        if not low <= flat[key] <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key} is {flat[key]:g}; it must be {bounds}")


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that somebody gave.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def difference(config: Config, default: Config) -> dict[str, Any]:
    """The values of `config`, under dotted keys, that are not those of `default`."""
    before = default.flat()
    return {key: value for key, value in config.flat().items() if key not in before or value != before[key]}


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


def filled(saved: Any, missing_from: Config, *, where: str) -> Config:
    """A saved config as a mapping; a key that did not exist then is taken from `missing_from`.

    Args:
        saved: what a file holds; keys that exist no longer are kept.
        missing_from: tells the types of values too.
        where: the file, for the message.

    Raises:
        ConfigError: it is no mapping, or a value is of another type than that in `missing_from`.
    """
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{where} holds no config, but {type(saved).__name__}")
    return Config(_filled(saved, missing_from, where=where, section=""))


def _filled(values: Mapping[str, Any], fallback: Config, *, where: str, section: str) -> dict[str, Any]:
    filled = {**fallback.to_dict(), **values}
    for name, entry in fallback.items():
        key = f"{section}{name}"
        if name in values and not isinstance(entry, Config):
            filled[name] = _fit(key, _thaw(values[name]), entry, where=where)
        elif name in values:
            if not isinstance(values[name], Mapping):
                raise ConfigError(f"{where}: {key} is {_text(values[name])}; it is a section with keys of its own")
            filled[name] = _filled(values[name], entry, where=where, section=f"{key}.")
    return filled


def require_trust(config: Config, source: Path, *, given: Config | None, trust: bool) -> None:
    """Check that a config from a file names no code but what the user named too.

    Args:
        config: as the file has it.
        source: the file, or the folder with it.
        given: the config that the user's own command line makes.
        trust: whether the user trusts the file.

    Raises:
        ConfigError: it names other code. Nothing has been imported or called.
    """
    for key, names_code in CODE_KEYS.items():
        value = config.get(key)
        if names_code(value) and not trust and (given is None or given.get(key) != value):
            repeat = "" if given is None else f"repeat --{key} {shlex.quote(str(value))}, or "
            flag = "--trust" if given is None else "--trust true"
            raise ConfigError(
                f"{source} names code: {key} is {str(value)!r}, which would be imported or called. Code that a file"
                f" names is run only if you say so: look at it first, then {repeat}give {flag}"
            )


def to_yaml(config: Config) -> str:
    """The config as YAML text."""
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(config.to_dict(), stream)
    return stream.getvalue()


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


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(entry) for entry in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_thaw(entry) for entry in value]
    return value


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


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = safe_files.read_text(path, most=MOST_YAML_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    return _mapping(text, str(path))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = _yaml().load(text)
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


def _read_sections(path: Path) -> dict[str, Any]:
    sections = _read_mapping(path)
    if DEFAULTS not in sections:
        raise ConfigError(f"{path} has no section '{DEFAULTS}'")
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"section '{name}' of {path} must be a mapping of keys to values")
    return sections


def _parsed(overrides: Mapping[str, str], defaults: Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        is_text = isinstance(_lookup(key, defaults, where=COMMAND_LINE), str)
        try:
            values[key] = text if is_text else _yaml().load(text)
        except (YAMLError, ValueError, KeyError, RecursionError) as error:
            raise ConfigError(f"{COMMAND_LINE}: cannot read {text!r} as a value of {key}") from error
    return values


def _overlaid(config: Config, overlay: Mapping[Any, Any], defaults: Config, *, where: str) -> Config:
    values = config.to_dict()
    flat = _flatten(overlay, defaults)
    for key, follower in FOLLOWERS.items():
        if key in flat and follower in defaults.flat():
            flat.setdefault(follower, flat[key])
    for key, value in flat.items():
        *sections, name = key.split(".")
        fitted = _fit(key, _thaw(value), _lookup(key, defaults, where=where), where=where)
        target = values
        for section in sections:
            target = target[section]
        target[name] = fitted
    return Config(values)


def _flatten(overlay: Mapping[Any, Any], defaults: Config) -> dict[str, Any]:
    """Dotted keys of an overlay, entering a mapping only where the defaults have a section."""
    flat: dict[str, Any] = {}
    for key, value in overlay.items():
        section = defaults.get(str(key))
        if isinstance(value, Mapping) and isinstance(section, Config):
            flat |= {f"{key}.{name}": entry for name, entry in _flatten(value, section).items()}
        else:
            flat[str(key)] = value
    return flat


def _lookup(key: str, defaults: Config, *, where: str, valid: Sequence[str] = ()) -> Any:
    """The default of a key; where there is no such key, `valid` are those of which the nearest is named."""
    value: Any = defaults
    for name in key.split("."):
        if not isinstance(value, Config) or name not in value:
            raise ConfigError(f"{where}: unknown key '{key}'; {_nearest(key, valid or defaults.flat())}")
        value = value[name]
    return value


def _fit(key: str, value: Any, default: Any, *, where: str) -> Any:
    """`value` as the type of `default`; a default of None takes anything but a section."""
    if isinstance(default, Config):
        inner = next(iter(default.flat()), "...")
        raise ConfigError(f"{where}: {key} is a section; set one of its keys, such as {key}.{inner}")
    if isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} takes a value (default {_text(default)}), not a section")
    if default is None:
        return value
    if isinstance(default, tuple) and isinstance(value, list):
        element = default[0] if default else None
        return [_fit(f"{key}[{index}]", entry, element, where=where) for index, entry in enumerate(value)]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(default) is float and is_number and not math.isnan(value):
        return float(value)
    if type(default) is int and is_number and float(value).is_integer():
        return int(value)
    if type(value) is type(default) and type(default) not in (int, float):
        return value
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
    raise ConfigError(f"{where}: {key} is {_text(value)}; it takes {kind[type(default)]} (default {_text(default)})")


def _nearest(key: str, valid: Iterable[str]) -> str:
    """The key that was most likely meant, or all whose last part is just what was given."""
    parts = {name: _last_part(name) for name in valid}
    same = [name for name, part in parts.items() if part == _last_part(key)]
    if len(same) > 1 and "." not in key:
        return f"the nearest are {', '.join(map(repr, same))}"
    names = {name: name for name in same or parts}
    if "." not in key:
        # `entrpy` is meant to be the last part of some key.
        names = {**{parts[name]: name for name in names}, **names}
    matches = difflib.get_close_matches(key, list(names), n=1, cutoff=0.0)
    return f"the nearest is '{names[matches[0]]}'" if matches else "there are none"


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    """A value as one writes it in the file."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return {"None": "null", "True": "true", "False": "false", "inf": ".inf"}.get(repr(value), repr(value))


def _help_page(
    config_path: Path, *, description: str, entry_keys: Mapping[str, str], of_others: Mapping[str, str]
) -> str:
    sections = _read_sections(config_path)
    comments = _section_comments(safe_files.read_text(config_path, most=MOST_YAML_BYTES))
    flat = Config(sections[DEFAULTS]).flat()
    keys = {key: value for key, value in flat.items() if _other_reader([key], of_others) is None}
    names = [name for name in sections if name != DEFAULTS and _other_owner(name, sections, of_others) is None]
    width = max(len(name) for name in [*names, *keys, *entry_keys, "configs"]) + 4
    lines = [description, "", "usage: [--configs SECTION ...] [--KEY VALUE ...]", ""]
    lines += ["flags:", f"  {'--configs':{width}}sections to overlay on the defaults, in order"]
    lines += [f"  {'--' + flag:{width}}{text}" for flag, text in entry_keys.items()]
    lines += ["", f"sections of {config_path}:"]
    lines += [f"  {name:{width}}{comments.get(name, '')}".rstrip() for name in names]
    lines += ["", "keys and their defaults:"]
    lines += [f"  {'--' + key:{width}}{_text(value)}" for key, value in keys.items()]
    return "\n".join(lines)


def _section_comments(text: str) -> dict[str, str]:
    """The comment lines right above each top-level key."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            above.append(line.lstrip("# "))
        else:
            if line[:1].strip():
                comments[line.partition(":")[0]] = " ".join(above)
            above = []
    return comments


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
