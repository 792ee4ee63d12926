"""Configs in files: what is saved and read, and what is refused."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest

import config
from config import ConfigError
from tests.config_scenes import SECTIONS, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, SECTIONS)


def test_save_read_round_trip_keeps_order_and_types(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path, [], {"device": "1e-2", "actor.entropy": "1e-7", "logdir": "null"})
    config.save(loaded, tmp_path / "config.yaml")
    again = config.read(tmp_path / "config.yaml")
    assert again == loaded
    assert list(again) == list(loaded)
    assert type(again.device) is str


def test_read_takes_missing_keys_from_a_fallback(path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text("steps: 7\nretired: 1\nactor: {entropy: 0.25, schedule: {final: 0.5}}\n")
    fallback = config.load(path, [], {})
    filled = config.read(saved, missing_from=fallback)
    expected = {"steps": 7, "actor.entropy": 0.25, "actor.schedule.final": 0.5, "retired": 1}
    assert filled.flat() == {**fallback.flat(), **expected}
    assert fallback == config.load(path, [], {})
    assert config.read(saved).flat() == expected


def repeated(innermost: str, before: str, after: str) -> str:
    """Seven levels, each with the one before ten times."""
    lines = [f"a0: &a0 {innermost}"]
    for level in range(1, 8):
        lines.append(f"a{level}: &a{level} {before}{', '.join([f'*a{level - 1}'] * 10)}{after}")
    return "\n".join(lines)


LAUGHS, MERGES = repeated("[x, x]", "[", "]"), repeated("{x: 1}", "{<<: [", "]}")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (LAUGHS, "holds more than 20,000 entries"),
        (MERGES, "holds more than 20,000 entries"),
        ("a: &a [*a]", "is nested more than 32 levels deep"),
        ("a: &a {<<: *a}", "is nested more than 32 levels deep"),
        ("a: " + "[" * 40 + "]" * 40, "is nested more than 32 levels deep"),
        ("- " * 2000, "cannot be read (maximum recursion depth"),
        ("a: 1\n" * 60_000, "bytes, and such files have 262,144 at most"),
        ("a: 2001-99-99", "cannot be read (month must be"),
        ("a: " + "9" * 5000, "cannot be read (Exceeds the limit"),
        ("a: !!bool x", "cannot be read ('x')"),
        ("a: !!float x", "cannot be read"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
    ids=[
        "aliases",
        "merges",
        "recursive",
        "merges itself",
        "nested",
        "deep",
        "huge",
        "date",
        "int",
        "bool",
        "float",
        "tag",
    ],
)
def test_read_refuses_files_that_take_memory_or_are_no_config(text: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=re.escape(cause)) as refused:
            config.read(tmp_path / "config.yaml")
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert "config.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_read_takes_a_few_aliases(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert config.read(tmp_path / "config.yaml").to_dict() == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_read_refuses_a_device_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is a device"):
        config.read(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "cause"),
    [("discount: high", "discount is 'high'; it takes a whole number"), ("actor: 5", "actor is 5; it is a section")],
)
def test_read_refuses_a_value_of_another_type_than_the_key_has(
    text: str, cause: str, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(cause)) as refused:
        config.read(tmp_path / "config.yaml", missing_from=config.load(path, [], {}))
    assert str(tmp_path) in str(refused.value)


def test_save_replaces_a_link_and_leaves_its_target(path: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "linked.yaml").symlink_to("precious")
    config.save(config.load(path, [], {}), tmp_path / "linked.yaml")
    assert (tmp_path / "precious").read_text() == "mine"
    assert config.read(tmp_path / "linked.yaml") == config.load(path, [], {})
