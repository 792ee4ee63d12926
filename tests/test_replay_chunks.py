from __future__ import annotations

import shutil
from pathlib import Path

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
