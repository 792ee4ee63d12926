"""The config as a nested mapping that cannot be changed, and how one is laid over another."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from system.errors import ConfigError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
# A layer that sets the first of two keys alone sets the other with it: only who asks for a schedule gets one.
FOLLOWERS = {"actor.entropy": "actor.entropy_final"}


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
            raise AttributeError(f"no config key '{key}'; {nearest(key, self._values)}")
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
        return {key: thawed(value) for key, value in self._values.items()}

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
        return overlaid(self, changes, self, where="replace")


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
            filled[name] = _fit(key, thawed(values[name]), entry, where=where)
        elif name in values:
            if not isinstance(values[name], Mapping):
                raise ConfigError(f"{where}: {key} is {as_text(values[name])}; it is a section with keys of its own")
            filled[name] = _filled(values[name], entry, where=where, section=f"{key}.")
    return filled


def difference(config: Config, default: Config) -> dict[str, Any]:
    """The values of `config`, under dotted keys, that are not those of `default`."""
    before = default.flat()
    return {key: value for key, value in config.flat().items() if key not in before or value != before[key]}


def overlaid(config: Config, overlay: Mapping[Any, Any], defaults: Config, *, where: str) -> Config:
    """A config with the values of an overlay, each fitted to the type of its default.

    Args:
        config: what lies below.
        overlay: values by key, nested or dotted.
        defaults: has every key.
        where: the overlay comes from, for the message.

    Raises:
        ConfigError: there is no such key, or it takes values of another type.
    """
    values = config.to_dict()
    flat = flattened(overlay, defaults)
    for key, follower in FOLLOWERS.items():
        if key in flat and follower in defaults.flat():
            flat.setdefault(follower, flat[key])
    for key, value in flat.items():
        *sections, name = key.split(".")
        fitted = _fit(key, thawed(value), lookup(key, defaults, where=where), where=where)
        target = values
        for section in sections:
            target = target[section]
        target[name] = fitted
    return Config(values)


def flattened(overlay: Mapping[Any, Any], defaults: Config) -> dict[str, Any]:
    """Dotted keys of an overlay, entering a mapping only where the defaults have a section."""
    flat: dict[str, Any] = {}
    for key, value in overlay.items():
        section = defaults.get(str(key))
        if isinstance(value, Mapping) and isinstance(section, Config):
            flat |= {f"{key}.{name}": entry for name, entry in flattened(value, section).items()}
        else:
            flat[str(key)] = value
    return flat


def lookup(key: str, defaults: Config, *, where: str, valid: Sequence[str] = ()) -> Any:
    """The default of a key; where there is no such key, `valid` are those of which the nearest is named."""
    value: Any = defaults
    for name in key.split("."):
        if not isinstance(value, Config) or name not in value:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(key, valid or defaults.flat())}")
        value = value[name]
    return value


def _fit(key: str, value: Any, default: Any, *, where: str) -> Any:
    """`value` as the type of `default`; a default of None takes anything but a section."""
    if isinstance(default, Config):
        inner = next(iter(default.flat()), "...")
        raise ConfigError(f"{where}: {key} is a section; set one of its keys, such as {key}.{inner}")
    if isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} takes a value (default {as_text(default)}), not a section")
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
    raise ConfigError(
        f"{where}: {key} is {as_text(value)}; it takes {kind[type(default)]} (default {as_text(default)})"
    )


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(entry) for entry in value)
    return value


def thawed(value: Any) -> Any:
    """The value as plain dicts and lists."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [thawed(entry) for entry in value]
    return value


def require_type(key: str, value: Any, kind: type) -> None:
    """Raise a ConfigError where the value of a key is of another type; a whole number will do for a number."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key} is {as_text(value)}; it takes {KINDS[kind]}")


def nearest(key: str, valid: Iterable[str]) -> str:
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


def as_text(value: Any) -> str:
    """A value as one writes it in the file."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_text, value))}]"
    return {"None": "null", "True": "true", "False": "false", "inf": ".inf"}.get(repr(value), repr(value))
