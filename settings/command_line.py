"""What a command line asks for: sections, keys and a program's own flags."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from settings.files import COMMAND_LINE, DEFAULTS, Sections, layers, load, read_sections, read_text
from settings.help_page import help_page
from settings.mapping import Config, flattened, lookup, nearest
from system import terminal
from system.errors import ConfigError

# Overlays for every program, though each reads only some of their keys.
SHARED_SECTIONS = (DEFAULTS, "debug", "gym")


class CommandLine(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: the resolved config.
        defaults: the config without any named section or override, to tell what differs.
        entry: the entry point's own flags; None for those not given.
        sections: the sections that it names, in order.
        overrides: the config keys that it gives values.
        given: these, and those of sections that are of one program, with the place that each comes from.
    """

    config: Config
    defaults: Config
    entry: dict[str, str | None]
    sections: list[str]
    overrides: list[str]
    given: dict[str, str]


def parse_command_line(
    argv: Sequence[str],
    *,
    config_path: Path,
    description: str,
    entry_keys: Mapping[str, str],
    base: Sequence[str] = (),
    foreign_keys: Mapping[str, str] | None = None,
) -> CommandLine:
    """Read `--configs a b`, `--any.nested.key value` (or `=value`) and the entry point's own flags.

    Args:
        argv: the arguments, without the program's name. `--help` prints a page, of the sections that `--configs` names,
            and exits with status 0.
        config_path: the YAML file with the sections.
        description: first lines of the help page.
        entry_keys: flag -> its line of help, for flags that are no config keys; each takes one value.
        base: sections that lie under those that are named.
        foreign_keys: keys, or sections of keys, that another program reads and this one does not, with that program; or
            with none, a key of such a section that this one reads as well.

    Raises:
        ConfigError: as `load`; a flag without a value, or an argument that belongs to no flag; a key or a section that
            is for another program.
    """
    if "-h" in argv or "--help" in argv:
        _show_help(
            argv,
            config_path,
            description=description,
            flags=entry_keys,
            base=base,
            foreign_keys=foreign_keys or {},
        )
        raise SystemExit(0)
    names, overrides, entry = read_flags(argv, entry_keys)
    defaults = load(config_path, [], {})
    named = [name for name in names if name not in base]
    _require_own(named, overrides, path=config_path, entry_keys=entry_keys, foreign_keys=foreign_keys or {})
    settings = load(config_path, [*base, *names], overrides)
    places = {**_set_by(named, config_path, defaults), **dict.fromkeys(overrides, COMMAND_LINE)}
    return CommandLine(settings, defaults, entry, sections=names, overrides=list(overrides), given=places)


def read_flags(
    argv: Sequence[str], entry_keys: Iterable[str]
) -> tuple[list[str], dict[str, str], dict[str, str | None]]:
    """The sections that `--configs` names, the values of config keys, and those of a program's own flags, as texts.

    Args:
        argv: the arguments, without the program's name.
        entry_keys: the program's own flags, of one value each; what is not given is None.

    Raises:
        ConfigError: a flag without a value, or an argument that belongs to no flag.
    """
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
    return names, overrides, entry


def _set_by(names: Sequence[str], path: Path, defaults: Config) -> dict[str, str]:
    """The keys that named sections set, or those that they build on; overlays for every program set none."""
    sections = read_sections(path)
    return {
        key: f"section {name}"
        for name in names
        for layer in layers(path, sections, [name])
        if layer not in SHARED_SECTIONS
        for key in flattened(sections[layer].values, defaults)
    }


def _show_help(
    argv: Sequence[str],
    path: Path,
    *,
    description: str,
    flags: Mapping[str, str],
    base: Sequence[str],
    foreign_keys: Mapping[str, str],
) -> None:
    """Print what there is to give: flags, sections, and keys with the values that the named sections have.

    Raises:
        ConfigError: the file cannot be read, or a section that is named is none of this program's.
    """
    texts = [text for text in argv if text not in ("-h", "--help")]
    names: list[str] = []
    for index, text in enumerate(texts):
        flag, equals, value = text.partition("=")
        if flag == "--configs":
            names += (
                [value] if equals else itertools.takewhile(lambda each: not each.startswith("--"), texts[index + 1 :])
            )
    _require_own(names, [], path=path, entry_keys=flags, foreign_keys=foreign_keys)
    sections = read_sections(path)
    own = [name for name in sections if name != DEFAULTS and _other_owner(name, sections, foreign_keys) is None]
    resolved = load(path, [*base, *names], {}).flat()
    terminal.show(
        help_page(
            read_text(path),
            path=path,
            description=description,
            flags=flags,
            sections=own,
            keys={key: value for key, value in resolved.items() if _other_reader([key], foreign_keys) is None},
            named=names,
        )
    )


def _require_own(
    names: Sequence[str],
    overrides: Iterable[str],
    *,
    path: Path,
    entry_keys: Iterable[str],
    foreign_keys: Mapping[str, str],
) -> None:
    """Check that this program reads each key that is given, and the keys of each section that is named.

    Raises:
        ConfigError: there is no such key or section, or another program reads it.
    """
    sections = read_sections(path)
    defaults = Config(sections[DEFAULTS].values)
    own = [key for key in defaults.flat() if _other_reader([key], foreign_keys) is None]
    for key in overrides:
        lookup(key, defaults, where=COMMAND_LINE, valid=[*own, "configs", *entry_keys])
        if other := _other_reader([key], foreign_keys):
            raise ConfigError(f"{COMMAND_LINE}: only {other} reads {key}; {nearest(key, own)}")
    layers(path, sections, names)
    for name in names:
        if other := _other_owner(name, sections, foreign_keys):
            raise ConfigError(f"section {name} is for another program: python {other} --configs {name}")


def _other_owner(name: str, sections: Sections, foreign_keys: Mapping[str, str]) -> str | None:
    """The other program that a section is for, if any: one that is called like its keys, or sets one of them."""
    if name in SHARED_SECTIONS:
        return None
    defaults, (base, values) = Config(sections[DEFAULTS].values), sections[name]
    own = _other_reader([name, *flattened(values, defaults)], foreign_keys)
    return own or next(filter(None, (_other_owner(each, sections, foreign_keys) for each in base)), None)


def _other_reader(keys: Iterable[str], foreign_keys: Mapping[str, str]) -> str | None:
    """The program that reads one of the keys where this one does not, if any."""
    for key in keys:
        # `a`, `a.b` and `a.b.c` of the key a.b.c; the longest that is listed decides.
        parts = [*itertools.accumulate(key.split("."), "{}.{}".format)]
        owner = next((foreign_keys[part] for part in reversed(parts) if part in foreign_keys), "")
        if owner:
            return owner
    return None
