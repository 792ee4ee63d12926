from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError
from tests.replay_scenes import (
    CPU,
    MEMORY,
    SPACES,
    EchoEnv,
    Memory,
    assert_equal_rows,
    filled,
    generator,
    remembering,
    with_memory,
)
from training import chunks
from training import replay as replay_module
from training.replay import Replay


@pytest.mark.parametrize("saves", [[0], [7], [7, 20, 20, 49, 55], [30, 260], [50, 100, 150, 173]])
def test_save_chunks_restores_exactly(tmp_path: Path, saves: list[int]) -> None:
    replay = filled(0)
    env = EchoEnv(num_envs=3, episode_rows=[5, 3])
    for columns in saves:
        while replay.total < columns:
            replay.add(env.row())
        manifest = replay.save_chunks(tmp_path)
    restored = filled(0)
    restored.load_chunks(tmp_path, manifest)
    assert_equal_rows(replay, restored)
    for _ in range(9):
        row = env.row()
        replay.add(row)
        restored.add(row)
    assert_equal_rows(replay, restored)
    left, right = (each.sample_episodes(50, 5, generator=generator()) for each in (replay, restored))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_save_chunks_writes_each_row_once(tmp_path: Path) -> None:
    replay = filled(0)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    written: set[tuple[str, int]] = set()
    for _ in range(4):
        for _ in range(10):
            replay.add(env.row())
        replay.save_chunks(tmp_path)
        before, written = written, {(path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
        assert before < written
        assert len(written) == len(before) + 1


def test_save_chunks_after_long_gap_writes_stored_columns_only(tmp_path: Path) -> None:
    filled(130, length=20).save_chunks(tmp_path)
    (chunk,) = tmp_path.iterdir()
    assert chunk.name.startswith("000000000110-000000000130-")
    assert checkpoint.load(chunk, CPU)["seen"][0, :, 1].tolist() == list(range(110, 130))


def test_save_chunks_keeps_what_last_two_manifests_need_through_resumes(tmp_path: Path) -> None:
    replay = filled(0, length=20)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    manifests = []
    for save in range(30):
        for _ in range(1 + 5 * save % 13):
            replay.add(env.row())
        # Before the new checkpoint replaces them, latest.pt and previous.pt still hold the last two manifests.
        manifests.append(replay.save_chunks(tmp_path))
        for manifest in manifests[-3:]:
            filled(0, length=20).load_chunks(tmp_path, manifest)
        if save % 4 == 0:
            replay = filled(0, length=20)
            replay.load_chunks(tmp_path, manifests[-1])
    assert 2 <= len(list(tmp_path.iterdir())) < 15


def test_save_chunks_after_going_back_spares_newer_manifest(tmp_path: Path) -> None:
    replay = filled(12)
    older = replay.save_chunks(tmp_path)
    env = EchoEnv(num_envs=3, episode_rows=[4])
    for _ in range(6):
        replay.add(env.row())
    newer = replay.save_chunks(tmp_path)
    other = filled(0)
    other.load_chunks(tmp_path, older)
    for _ in range(6):
        other.add(env.row())
    other.save_chunks(tmp_path)
    restored = filled(0)
    restored.load_chunks(tmp_path, newer)
    assert_equal_rows(replay, restored)


def test_save_chunks_to_another_folder_writes_everything(tmp_path: Path) -> None:
    replay = filled(30)
    manifest = replay.save_chunks(tmp_path / "first")
    resumed = filled(0)
    resumed.load_chunks(tmp_path / "first", manifest)
    moved = resumed.save_chunks(tmp_path / "second")
    restored = filled(0)
    restored.load_chunks(tmp_path / "second", moved)
    assert_equal_rows(replay, restored)


def test_save_chunks_clears_what_a_kill_left(tmp_path: Path) -> None:
    left = tmp_path / "000000000000-000000000005-abcdabcd.pt.tmp"
    left.write_bytes(b"half a chunk")
    filled(5).save_chunks(tmp_path)
    assert not left.exists()


def test_load_chunks_reports_missing_and_corrupt_chunks(tmp_path: Path) -> None:
    manifest = filled(30).save_chunks(tmp_path)
    (chunk,) = tmp_path.iterdir()
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated") as error:
        filled(0).load_chunks(tmp_path, manifest)
    assert "\n" not in str(error.value)
    chunk.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        filled(0).load_chunks(tmp_path, manifest)


def test_load_chunks_refuses_another_replay(tmp_path: Path) -> None:
    manifest = filled(30).save_chunks(tmp_path)
    with pytest.raises(CheckpointError, match="3 environments, this run has 4"):
        filled(0, num_envs=4).load_chunks(tmp_path, manifest)
    wider = Replay({**SPACES, "seen": ((3,), torch.float32)}, num_envs=3, capacity=150, device=CPU)
    with pytest.raises(CheckpointError, match="for 'seen'; this run stores"):
        wider.load_chunks(tmp_path, manifest)
    other = Replay({**SPACES, "more": ((), torch.float32)}, num_envs=3, capacity=150, device=CPU)
    with pytest.raises(CheckpointError, match="this run stores"):
        other.load_chunks(tmp_path, manifest)


@pytest.mark.parametrize("columns", [30, 73])
def test_save_chunks_restores_rewritten_memory_exactly(tmp_path: Path, columns: int) -> None:
    replay, env = remembering(columns, length=40)
    replay.save_chunks(tmp_path)
    for _ in range(3):
        replay.add(with_memory(env.row()))
    # Rows of the chunk that is written already are rewritten too.
    batch = replay.sample_windows(20, 6, generator=generator())
    draws = {"deter": torch.randn(20, 6, 2).half(), "stoch": torch.randint(99, (20, 6, 3)).short()}
    replay.rewrite(batch, draws)
    manifest = replay.save_chunks(tmp_path)
    checkpoint.save(tmp_path / "latest.pt", {"replay": manifest})
    restored, _ = remembering(0, length=40)
    restored.load_chunks(tmp_path, checkpoint.load(tmp_path / "latest.pt", CPU)["replay"])
    assert_equal_rows(replay, restored)
    assert restored.memory.keys() == MEMORY.keys()
    assert all(torch.equal(value, replay.memory[name]) for name, value in restored.memory.items())


@pytest.mark.parametrize("length", [15, 45, 200])
@pytest.mark.parametrize("columns", [10, 73])
def test_load_chunks_into_ring_of_another_length_keeps_what_fits(tmp_path: Path, columns: int, length: int) -> None:
    replay, env = remembering(columns, length=30)
    manifest = replay.save_chunks(tmp_path)
    restored, _ = remembering(0, length=length)
    restored.load_chunks(tmp_path, manifest)
    kept = min(columns, 30, length)
    assert (restored.total, restored.oldest, restored.length) == (columns, columns - kept, length)
    for added in range(60):
        for name, value in {**restored.rows, **restored.memory}.items():
            for column in range(restored.oldest, min(restored.total, columns)):
                theirs = {**replay.rows, **replay.memory}[name][:, column % 30]
                assert torch.equal(value[:, column % length], theirs)
        batch = restored.sample_episodes(20, 5, generator=generator())
        assert batch["column"].min() >= restored.oldest and torch.equal(batch["seen"][..., 1].long(), batch["column"])
        restored.add(with_memory(env.row()))
        assert restored.oldest == max(columns - kept, columns + added + 1 - length)


def test_load_chunks_of_a_ring_cut_short_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, cut = (Replay(SPACES, num_envs=3, capacity=300, device=CPU, rows_to_come=rows) for rows in (None, 60))
    assert (whole.length, cut.length) == (100, 20)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    for row in [env.row() for _ in range(20)]:
        whole.add(row)
        cut.add(row)
    resumed = Replay(SPACES, num_envs=3, capacity=300, device=CPU, rows_to_come=120)
    resumed.load_chunks(tmp_path, cut.save_chunks(tmp_path))
    for row in [env.row() for _ in range(20)]:
        whole.add(row)
        resumed.add(row)
        left, right = (each.sample_windows(20, 6, generator=generator()) for each in (whole, resumed))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_load_chunks_makes_room_for_more_rows_than_are_to_come(tmp_path: Path) -> None:
    replay = filled(40)
    short = Replay(SPACES, num_envs=3, capacity=150, device=CPU, rows_to_come=30)
    short.load_chunks(tmp_path, replay.save_chunks(tmp_path))
    assert_equal_rows(replay, short)


def test_save_chunks_in_a_smaller_ring_spares_what_the_checkpoint_before_needs(tmp_path: Path) -> None:
    replay = filled(0)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    for columns in (5, 10, 20, 21):
        while replay.total < columns:
            replay.add(env.row())
        before = replay.save_chunks(tmp_path)
    small = filled(0, length=10)
    small.load_chunks(tmp_path, before)
    for _ in range(2):
        small.add(env.row())
        small.save_chunks(tmp_path)
    restored = filled(0)
    restored.load_chunks(tmp_path, before)
    assert_equal_rows(replay, restored)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"deter": MEMORY["deter"]},
        {**MEMORY, "deter": ((3,), torch.float16)},
        {**MEMORY, "stoch": ((3,), torch.int32)},
    ],
    ids=["none", "a key less", "another shape", "another dtype"],
)
def test_load_chunks_refuses_another_memory(tmp_path: Path, other: Memory) -> None:
    replay, _ = remembering(30)
    manifest = replay.save_chunks(tmp_path)
    mine, _ = remembering(0, memory=other)
    with pytest.raises(CheckpointError, match="this run keeps") as error:
        mine.load_chunks(tmp_path, manifest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["folder", "newest", "oldest", "cut"])
def test_save_chunks_writes_what_was_deleted_anew(lost: str, tmp_path: Path) -> None:
    folder = tmp_path / "replay"
    replay = filled(0)
    env = EchoEnv(num_envs=3, episode_rows=[5, 3])
    for columns in (30, 60, 70):
        while replay.total < columns:
            replay.add(env.row())
        replay.save_chunks(folder)
    files = sorted(folder.iterdir())
    if lost == "folder":
        shutil.rmtree(folder)
    elif lost == "cut":
        files[0].write_bytes(files[0].read_bytes()[:100])
    else:
        files[0 if lost == "oldest" else -1].unlink()
    replay.add(env.row())
    manifest = replay.save_chunks(folder)
    assert len(replay.notices) == 1
    restored = filled(0)
    restored.load_chunks(folder, manifest)
    assert_equal_rows(replay, restored)


def test_save_chunks_makes_no_folder_where_the_runs_own_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        filled(10).save_chunks(tmp_path / "gone" / "replay")


# Memory, which is rewritten


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
