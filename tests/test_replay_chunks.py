from __future__ import annotations

from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError
from replay import Replay
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
    with pytest.raises(CheckpointError, match="3 environments of 50 columns, this run has 4 of 50"):
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
