"""The page of `--help`: flags, sections, and every key with its value and the config file's comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node

from settings.files import DEFAULTS
from settings.mapping import as_text

WIDTH = 120
# Columns for values; what is longer pushes its comment aside.
VALUES = 13


class Comment(NamedTuple):
    """What a file says of a key: on its own line and on those that go on with it, and in lines above it."""

    beside: str
    above: str


def help_page(
    text: str,
    *,
    path: Path,
    description: str,
    flags: Mapping[str, str],
    sections: Sequence[str],
    keys: Mapping[str, Any],
    named: Sequence[str],
) -> str:
    """The page.

    Args:
        text: of the config file.
        path: of that file.
        description: first lines.
        flags: each with its line of help.
        sections: those to list.
        keys: all that can be set, dotted, with the values that they have.
        named: the sections that these values come from, beside the defaults.
    """
    width = max(len(name) for name in [*sections, *keys, *flags, "configs"]) + 4
    lines = [description, "", "usage: [--configs SECTION ...] [--KEY VALUE ...]", ""]
    lines += ["flags:", f"  {'--configs':{width}}sections to overlay on the defaults, in order"]
    lines += [f"  {'--configs X --help':{width}}this page with the values that section X has"]
    lines += [f"  {'--' + flag:{width}}{line}" for flag, line in flags.items()]
    comments = file_comments(text)
    lines += ["", f"sections of {path}:"]
    for name in sections:
        lines += _row(name, comments[name].above if name in comments else "", width=width)
    lines += ["", f"keys and their values with --configs {' '.join(named)}:" if named else "keys and their defaults:"]
    return "\n".join([*lines, *_key_lines(keys, comments, width=width)])


def _key_lines(keys: Mapping[str, Any], comments: Mapping[str, Comment], *, width: int) -> Iterator[str]:
    told: set[str] = set()
    for key, value in keys.items():
        parts = key.split(".")
        # What the file says of a whole section of keys comes before the first of them.
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            comment = comments.get(f"{DEFAULTS}.{name}", Comment("", ""))
            heading = " ".join(filter(None, (comment.above, comment.beside if depth < len(parts) else "")))
            if heading and name not in told:
                yield from ("", *textwrap.wrap(heading, WIDTH, initial_indent="  # ", subsequent_indent="  # "))
            told.add(name)
        yield from _row(f"--{key}", comment.beside, width=width, value=as_text(value))


def _row(name: str, comment: str, *, width: int, value: str | None = None) -> list[str]:
    """A name, a value if there is one, and a comment in a column of its own."""
    start = f"  {name:{width}}"
    if value is not None:
        start += f"{value:{VALUES}} " if comment else value
    if not comment:
        return [start.rstrip()]
    wrapped = textwrap.wrap(comment, max(40, WIDTH - len(start)))
    return [start + wrapped[0], *(" " * len(start) + line for line in wrapped[1:])]


def file_comments(text: str) -> dict[str, Comment]:
    """What a YAML file of sections says of each key, by its dotted name, which begins with its section's."""
    lines = text.splitlines()
    root = YAML(typ="safe", pure=True).compose(text)
    return {name: _comment(lines, key, value) for name, key, value in _entries(root, prefix="")}


def _entries(node: Node, *, prefix: str) -> Iterator[tuple[str, Node, Node]]:
    """Every key below a node with its dotted name and its value."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key, value
            yield from _entries(value, prefix=f"{name}.")


def _comment(lines: Sequence[str], key: Node, value: Node) -> Comment:
    above: list[str] = []
    first = key.start_mark.line
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    if len(indent) == key.start_mark.column:
        while first and lines[first - 1].startswith(f"{indent}#"):
            first -= 1
            above.insert(0, _said(lines[first]))
    beside = []
    if not isinstance(value, MappingNode) or value.flow_style:
        last = value.end_mark.line
        rest = lines[last][value.end_mark.column :].strip()
        # Only what comes last on its line has a comment of its own: another key may follow within braces.
        if rest.startswith("#"):
            beside.append(_said(rest))
            for line in lines[last + 1 :]:
                if not line.startswith(f"{indent} ") or not line.lstrip().startswith("#"):
                    break
                beside.append(_said(line))
    return Comment(" ".join(beside), " ".join(above))


def _said(line: str) -> str:
    return line.lstrip().removeprefix("#").strip()
