"""Saving and loading what replay remembers, which is rewritten."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.replay_scenes import (
    MEMORY,
    EchoEnv,
    remembering,
    with_memory,
)
from training import chunks
from training import replay as replay_module
from training.replay import Replay


def remember_anew(replay: Replay, start: int, stop: int) -> None:
    """Rewrite the memory of one environment's columns."""
    columns = torch.arange(start, stop)[None]
    count = stop - start
    memory = {"deter": torch.randn(1, count, 2).half(), "stoch": torch.randint(99, (1, count, 3)).short()}
    replay.rewrite({"env": torch.ones_like(columns), "column": columns}, memory)


def add_rows(replay: Replay, env: EchoEnv, *, until: int) -> None:
    while replay.total < until:
        replay.add(with_memory(env.row()))


def memory_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    names = [chunk["name"] for chunk in manifest["memory_chunks"]]
    assert all((folder / name).exists() for name in names)
    return names


def assert_restores(folder: Path, manifest: dict[str, Any], replay: Replay) -> None:
    restored, _ = remembering(0, length=replay.length)
    restored.load_chunks(folder, manifest)
    assert_equal_memory(restored, memory_of(replay))


def memory_of(replay: Replay) -> dict[str, torch.Tensor]:
    position = torch.arange(replay.oldest, replay.total) % replay.length
    return {name: value[:, position].clone() for name, value in replay.memory.items()}


def assert_equal_memory(replay: Replay, expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == MEMORY.keys()
    assert all(torch.equal(value, expected[name]) for name, value in memory_of(replay).items())


def test_save_chunks_writes_memory_where_it_was_rewritten_and_nowhere_else(tmp_path: Path) -> None:
    replay, env = remembering(0)
    for columns in (10, 20, 30):
        add_rows(replay, env, until=columns)
        before = memory_files(tmp_path, replay.save_chunks(tmp_path))
    remember_anew(replay, 12, 15)
    add_rows(replay, env, until=40)
    manifest = replay.save_chunks(tmp_path)
    first, second, third, fourth = memory_files(tmp_path, manifest)
    assert [first, third] == [before[0], before[2]] and second != before[1]
    rows = [chunk["name"] for chunk in manifest["chunks"]]
    written = [tmp_path / name for name in (second, fourth, rows[-1])]
    assert replay.bytes_written == sum(path.stat().st_size for path in written)
    assert_restores(tmp_path, manifest, replay)
    assert memory_files(tmp_path, replay.save_chunks(tmp_path)) == [first, second, third, fourth]
    assert replay.bytes_written == 0


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 environments have 30 bytes in a column: 4 columns in a file.
    monkeypatch.setattr(replay_module, "MEMORY_FILE_BYTES", 120)


def test_save_chunks_writes_memory_in_files_of_limited_size(small_files: None, tmp_path: Path) -> None:
    replay, env = remembering(10)
    replay.save_chunks(tmp_path)
    add_rows(replay, env, until=18)
    manifest = replay.save_chunks(tmp_path)
    stretches = [(chunk["start"], chunk["stop"]) for chunk in manifest["memory_chunks"]]
    assert stretches == [(0, 4), (4, 8), (8, 10), (10, 12), (12, 16), (16, 18)]
    remember_anew(replay, 5, 6)
    before, after = (memory_files(tmp_path, each) for each in (manifest, replay.save_chunks(tmp_path)))
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True, True, True]


def test_save_chunks_writes_no_file_of_memory_anew_because_the_ring_goes_on(small_files: None, tmp_path: Path) -> None:
    replay, env = remembering(10, length=10)
    before = memory_files(tmp_path, replay.save_chunks(tmp_path))
    add_rows(replay, env, until=15)
    manifest = replay.save_chunks(tmp_path)
    # The columns from 5 on are left, and the file with 4 to 8 is as it was.
    assert memory_files(tmp_path, manifest)[:2] == before[1:]
    assert_restores(tmp_path, manifest, replay)


@pytest.mark.parametrize(("was", "now", "stops"), [(120, 240, [8, 10]), (240, 120, [4, 8, 10])])
def test_save_chunks_into_files_of_another_size_writes_memory_anew(
    was: int, now: int, stops: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replay, _ = remembering(10)
    monkeypatch.setattr(replay_module, "MEMORY_FILE_BYTES", was)
    before = memory_files(tmp_path, replay.save_chunks(tmp_path))
    monkeypatch.setattr(replay_module, "MEMORY_FILE_BYTES", now)
    manifest = replay.save_chunks(tmp_path)
    assert [chunk["stop"] for chunk in manifest["memory_chunks"]] == stops
    assert_restores(tmp_path, manifest, replay)
    for _ in range(2):
        replay.save_chunks(tmp_path)
    assert not (tmp_path / before[0]).exists()


def test_save_chunks_writes_memory_that_was_rewritten_after_a_resume(tmp_path: Path) -> None:
    replay, _ = remembering(30)
    manifest = replay.save_chunks(tmp_path)
    resumed, _ = remembering(0)
    resumed.load_chunks(tmp_path, manifest)
    assert memory_files(tmp_path, resumed.save_chunks(tmp_path)) == memory_files(tmp_path, manifest)
    remember_anew(resumed, 0, 30)
    assert_restores(tmp_path, resumed.save_chunks(tmp_path), resumed)


@pytest.mark.parametrize("most_bytes", [60, 2**25])
def test_save_chunks_keeps_the_memory_that_last_two_manifests_need_through_resumes(
    most_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay_module, "MEMORY_FILE_BYTES", most_bytes)
    replay, env = remembering(0, length=20)
    kept: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
    for save in range(30):
        add_rows(replay, env, until=replay.total + 1 + 5 * save % 13)
        begin = replay.oldest + save % 3
        if begin < replay.total:
            remember_anew(replay, begin, min(replay.total, begin + 4))
        kept.append((replay.save_chunks(tmp_path), memory_of(replay)))
        for manifest, memory in kept[-3:]:
            restored, _ = remembering(0, length=20)
            restored.load_chunks(tmp_path, manifest)
            assert_equal_memory(restored, memory)
        if save % 4 == 0:
            replay, _ = remembering(0, length=20)
            replay.load_chunks(tmp_path, kept[-1][0])
    assert len(list(tmp_path.iterdir())) < (40 if most_bytes > 60 else 100)


@pytest.mark.parametrize("resumed", [False, True])
def test_save_chunks_deletes_memory_that_was_replaced_two_saves_ago(resumed: bool, tmp_path: Path) -> None:
    replay, _ = remembering(20)
    for _ in range(10):
        remember_anew(replay, 0, 20)
        manifest = replay.save_chunks(tmp_path)
        if resumed:
            replay, _ = remembering(0)
            replay.load_chunks(tmp_path, manifest)
    # The rows, and memory as this manifest and the two before it have it.
    assert len(list(tmp_path.iterdir())) == 4


def test_save_chunks_after_going_back_spares_the_memory_of_a_newer_manifest(tmp_path: Path) -> None:
    replay, _ = remembering(20)
    older = replay.save_chunks(tmp_path)
    remember_anew(replay, 0, 20)
    newer = replay.save_chunks(tmp_path)
    other, _ = remembering(0)
    other.load_chunks(tmp_path, older)
    for _ in range(4):
        remember_anew(other, 0, 20)
        other.save_chunks(tmp_path)
    assert_restores(tmp_path, newer, replay)


def test_save_chunks_in_emergencies_spares_what_was_saved_before_the_first(tmp_path: Path) -> None:
    replay, _ = remembering(20)
    remember_anew(replay, 0, 20)
    regular, memory = replay.save_chunks(tmp_path), memory_of(replay)
    for _ in range(5):
        remember_anew(replay, 0, 20)
        replay.save_chunks(tmp_path, emergency=True)
    restored, _ = remembering(0)
    restored.load_chunks(tmp_path, regular)
    assert_equal_memory(restored, memory)
    for _ in range(3):
        remember_anew(replay, 0, 20)
        replay.save_chunks(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_save_chunks_of_numbered_checkpoints_spares_them_all(tmp_path: Path) -> None:
    replay, _ = remembering(20)
    kept = []
    for _ in range(6):
        remember_anew(replay, 0, 20)
        kept.append((replay.save_chunks(tmp_path, numbered=True), memory_of(replay)))
    for manifest, memory in kept:
        restored, _ = remembering(0)
        restored.load_chunks(tmp_path, manifest)
        assert_equal_memory(restored, memory)


def test_load_chunks_takes_a_manifest_with_the_whole_memory(tmp_path: Path) -> None:
    replay, env = remembering(73, length=40)
    manifest = replay.save_chunks(tmp_path)
    for chunk in manifest.pop("memory_chunks"):
        (tmp_path / chunk["name"]).unlink()
    manifest |= {"memory": {name: value.clone() for name, value in replay.memory.items()}}
    del manifest["replaced"]
    resumed, _ = remembering(0, length=40)
    resumed.load_chunks(tmp_path, manifest)
    assert_equal_memory(resumed, memory_of(replay))
    add_rows(replay, env, until=75)
    for row in range(73, 75):
        resumed.add({name: value[:, row % 40] for name, value in {**replay.rows, **replay.memory}.items()})
    assert_restores(tmp_path, resumed.save_chunks(tmp_path), replay)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_save_chunks_that_fails_leaves_no_file_behind(
    failing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replay, env = remembering(20)
    before = replay.save_chunks(tmp_path)
    files = sorted(tmp_path.iterdir())
    add_rows(replay, env, until=30)
    remember_anew(replay, 5, 25)
    calls = itertools.count()
    write = chunks.write

    def write_some(*arguments: Any, **options: Any) -> chunks.Chunk:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(chunks, "write", write_some)
    with pytest.raises(OSError, match="No space"):
        replay.save_chunks(tmp_path)
    monkeypatch.undo()
    assert next(calls) == failing + 1 and sorted(tmp_path.iterdir()) == files
    other, _ = remembering(0)
    other.load_chunks(tmp_path, before)
    assert_restores(tmp_path, replay.save_chunks(tmp_path), replay)


def test_discard_save_takes_back_what_no_checkpoint_will_name(tmp_path: Path) -> None:
    replay, env = remembering(20)
    replay.save_chunks(tmp_path)
    files = sorted(tmp_path.iterdir())
    add_rows(replay, env, until=30)
    remember_anew(replay, 5, 25)
    replay.save_chunks(tmp_path)
    replay.discard_save()
    assert sorted(tmp_path.iterdir()) == files
    assert_restores(tmp_path, replay.save_chunks(tmp_path), replay)
    assert replay.notices == []


def test_save_chunks_writes_memory_that_was_deleted_anew(tmp_path: Path) -> None:
    replay, _ = remembering(20)
    (name,) = memory_files(tmp_path, replay.save_chunks(tmp_path))
    (tmp_path / name).unlink()
    assert_restores(tmp_path, replay.save_chunks(tmp_path), replay)
    assert len(replay.notices) == 1
