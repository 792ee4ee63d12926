from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.replay_scenes import (
    CPU,
    MEMORY,
    SPACES,
    EchoEnv,
    filled,
    generator,
    remembering,
    reward_bounds,
    with_memory,
)
from training.replay import Replay


@pytest.mark.parametrize("columns", [30, 50, 173])
@pytest.mark.parametrize("sampler", ["sample_windows", "sample_episodes"])
def test_sample_reward_names_previous_action(columns: int, sampler: str) -> None:
    batch = getattr(filled(columns), sampler)(64, 7, generator=generator())
    caused = ~batch["is_first"]
    caused[:, 0] &= batch["prev_action"][:, 0] != 0  # the row before a window in the oldest column is gone
    assert caused.any() and batch["is_first"].any()
    torch.testing.assert_close(batch["reward"][caused], batch["prev_action"][caused].float())
    assert (batch["prev_action"][batch["is_first"]] == 0).all()
    assert (batch["reward"][batch["is_first"]] == 0).all()
    torch.testing.assert_close(batch["prev_action"][:, 1:], batch["action"][:, :-1] * ~batch["is_first"][:, 1:])


def test_sample_windows_are_consecutive_rows_of_one_env() -> None:
    batch = filled(173).sample_windows(64, 7, generator=generator())
    env, column = batch["seen"].unbind(-1)
    assert (env == env[:, :1]).all()
    assert (column.diff(dim=1) == 1).all()
    assert {name: value.dtype for name, value in batch.items()} == {
        "seen": torch.float32,
        "action": torch.int64,
        "prev_action": torch.int64,
        "reward": torch.float32,
        "is_first": torch.bool,
        "is_last": torch.bool,
        "is_terminal": torch.bool,
        "env": torch.int64,
        "column": torch.int64,
    }
    assert torch.equal(batch["env"].float(), env) and torch.equal(batch["column"].float(), column)


def test_sample_windows_are_uniform_over_stored_starts_and_envs() -> None:
    replay = filled(73, length=12, num_envs=2)
    batch = replay.sample_windows(9000, 4, generator=generator())
    starts = (batch["seen"][:, 0, 0] * 100 + batch["seen"][:, 0, 1]).long()
    values, counts = starts.unique(return_counts=True)
    # Columns 61..72 are stored, so windows of 4 start at 61..69 in each of two environments: 500 expected each.
    assert values.tolist() == [*range(61, 70), *range(161, 170)]
    assert counts.min() > 400 and counts.max() < 600


def test_sample_windows_know_predecessor_except_of_oldest_column() -> None:
    batch = filled(73, length=12).sample_windows(500, 4, generator=generator())
    first_column = batch["seen"][:, 0, 1]
    begins_episode = batch["is_first"][:, 0]
    unknown = batch["prev_action"][:, 0] == 0
    assert (unknown == (begins_episode | (first_column == 61))).all()
    assert (unknown & ~begins_episode).any()


@pytest.mark.parametrize("columns", range(5, 40))
@pytest.mark.parametrize("length", [9, 12, 100])
def test_sample_episodes_start_at_stored_whole_episodes(columns: int, length: int) -> None:
    replay = filled(columns, length=length)
    batch = replay.sample_episodes(200, 5, generator=generator())
    column = batch["seen"][..., 1]
    assert batch["is_first"][:, 0].all() and not batch["is_first"][:, 1:].any()
    assert batch["is_last"][:, -1].all()
    assert column.min() >= replay.oldest and column.max() < replay.total
    torch.testing.assert_close(column, column[:, :1] + torch.arange(5))


@pytest.mark.parametrize("columns", range(6, 60))
def test_sample_episodes_of_varying_length_stay_inside_ring(columns: int) -> None:
    replay = filled(columns, length=17, episode_rows=[2, 6, 3, 3])
    batch = replay.sample_episodes(200, 6, generator=generator())
    column = batch["seen"][..., 1]
    assert batch["is_first"][:, 0].all()
    assert column.min() >= replay.oldest and column.max() < replay.total
    torch.testing.assert_close(column, column[:, :1] + torch.arange(6))


def test_sample_episodes_draw_every_whole_episode() -> None:
    batch = filled(23, length=100, num_envs=2).sample_episodes(500, 5, generator=generator())
    starts = (batch["seen"][:, 0, 0] * 100 + batch["seen"][:, 0, 1]).long().unique()
    assert starts.tolist() == [0, 5, 10, 15, 100, 105, 110, 115]


def test_sample_same_seed_gives_same_batch() -> None:
    replay = filled(73)
    left, right = (replay.sample_windows(8, 4, generator=generator(3)) for _ in range(2))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_sample_refuses_more_rows_than_stored() -> None:
    replay = filled(3)
    with pytest.raises(ValueError, match="holds 3 columns; a window of 4 rows needs 4"):
        replay.sample_windows(2, 4, generator=generator())
    with pytest.raises(ValueError, match="prefill more"):
        replay.sample_episodes(2, 5, generator=generator())


def test_sample_episodes_refuses_ring_that_cannot_always_hold_one() -> None:
    with pytest.raises(ValueError, match="a capacity of 27 rows or more"):
        filled(20, length=8).sample_episodes(2, 5, generator=generator())


def test_add_refuses_wrong_keys_shapes_and_dtypes() -> None:
    replay = filled(0)
    row = EchoEnv(num_envs=3, episode_rows=[5]).row()
    with pytest.raises(ValueError, match="row has keys"):
        replay.add({name: value for name, value in row.items() if name != "reward"})
    with pytest.raises(ValueError, match=r"row\['seen'\] is torch.float32 \(1, 2\)"):
        replay.add({**row, "seen": row["seen"][:1]})
    with pytest.raises(ValueError, match=r"row\['reward'\] is torch.float64"):
        replay.add({**row, "reward": row["reward"].double()})
    assert replay.total == 0


def test_replay_refuses_reserved_names_and_tiny_capacity() -> None:
    with pytest.raises(ValueError, match="must have 'action'"):
        Replay({"seen": ((2,), torch.float32)}, num_envs=2, capacity=10, device=CPU)
    with pytest.raises(ValueError, match="none of"):
        Replay({**SPACES, "reward": ((), torch.float32)}, num_envs=2, capacity=10, device=CPU)
    with pytest.raises(ValueError, match="3 environments need 6"):
        Replay(SPACES, num_envs=3, capacity=5, device=CPU)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_replay_takes_memory_as_it_fills() -> None:
    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = megabytes()
    spaces = {"image": ((64, 64, 3), torch.uint8), "action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=4, capacity=40_000, device=CPU)
    assert replay.row_bytes == 64 * 64 * 3 + 8 + 4 + 3 + 8
    assert megabytes() - before < 50  # of 492


def test_replay_makes_room_for_no_more_rows_than_will_come() -> None:
    def lengths(rows: int) -> int:
        return Replay(SPACES, num_envs=3, capacity=60, device=CPU, rows_to_come=rows).length

    assert (lengths(30), lengths(90), lengths(1)) == (10, 20, 2)


def test_reward_bounds_leave_out_first_rows() -> None:
    replay = Replay(SPACES, num_envs=1, capacity=10, device=CPU)
    assert reward_bounds(replay) == (torch.inf, -torch.inf)
    row = EchoEnv(num_envs=1, episode_rows=[5]).row()
    replay.add({**row, "reward": torch.tensor([9.0])})
    assert reward_bounds(replay) == (torch.inf, -torch.inf)
    for reward in (-2.0, -1.0):
        replay.add({**row, "reward": torch.tensor([reward]), "is_first": torch.tensor([False])})
    assert reward_bounds(replay) == (-2.0, -1.0)


# Memory


@pytest.mark.parametrize("columns", [30, 73])
def test_sample_windows_bring_the_memory_of_the_row_before(columns: int) -> None:
    replay, _ = remembering(columns, length=40)
    batch = replay.sample_windows(300, 4, generator=generator())
    env, first_column = batch["seen"][:, 0].unbind(-1)
    stored = first_column > replay.oldest
    assert stored.any() and (~stored).any()
    before = torch.stack((env, first_column - 1), -1)
    torch.testing.assert_close(batch["deter"][stored].float(), before[stored])
    named = (100 * env + first_column - 1).long()[:, None] + torch.arange(3)
    assert torch.equal(batch["stoch"][stored].long(), named[stored])
    assert (batch["deter"][~stored] == 0).all() and (batch["stoch"][~stored] == 0).all()
    assert batch["deter"].dtype == torch.float16 and batch["stoch"].dtype == torch.int16


@pytest.mark.parametrize("columns", [30, 73, 80])
def test_rewrite_changes_the_memory_of_the_sampled_rows_and_of_no_other(columns: int) -> None:
    replay, _ = remembering(columns, length=40)
    rows = {name: value.clone() for name, value in replay.rows.items()}
    memory = {name: value.clone() for name, value in replay.memory.items()}
    batch = replay.sample_windows(5, 4, generator=generator())
    # What is written names its row, so that rows sampled twice get the same from both windows.
    replay.rewrite(
        batch, {"deter": -batch["seen"].half() - 1, "stoch": -batch["action"][..., None].short().expand(-1, -1, 3) - 1}
    )
    sampled = torch.zeros(3, 40, dtype=torch.bool)
    env, column = batch["seen"].long().unbind(-1)
    sampled[env, column % 40] = True
    assert 4 <= sampled.sum() <= 20
    torch.testing.assert_close(replay.memory["deter"][sampled], -rows["seen"][sampled].half() - 1)
    torch.testing.assert_close(
        replay.memory["stoch"][sampled], -rows["action"][sampled][:, None].short().expand(-1, 3) - 1
    )
    assert all(torch.equal(replay.memory[name][~sampled], memory[name][~sampled]) for name in memory)
    assert all(torch.equal(replay.rows[name], rows[name]) for name in rows)


def test_rewritten_memory_is_what_the_next_window_begins_with() -> None:
    replay, _ = remembering(30)
    batch = replay.sample_windows(1, 25, generator=generator())
    replay.rewrite(batch, {"deter": torch.full((1, 25, 2), 0.5).half(), "stoch": torch.full((1, 25, 3), 7).short()})
    later = replay.sample_windows(200, 5, generator=generator(1))
    before = later["column"][:, 0] - 1
    follows = (later["env"][:, 0] == batch["env"][0, 0]) & torch.isin(before, batch["column"])
    assert follows.any() and not follows.all()
    assert ((later["deter"] == 0.5).all(-1) == follows).all()
    assert ((later["stoch"] == 7).all(-1) == follows).all()


def test_add_refuses_a_row_without_its_memory() -> None:
    replay, env = remembering(3)
    with pytest.raises(ValueError, match="row has keys"):
        replay.add(env.row())
    row = with_memory(env.row())
    with pytest.raises(ValueError, match=r"row\['deter'\] is torch.float32"):
        replay.add({**row, "deter": row["deter"].float()})


def test_replay_refuses_an_observation_called_like_its_memory() -> None:
    with pytest.raises(ValueError, match="none of"):
        Replay({**SPACES, "deter": ((2,), torch.float32)}, num_envs=3, capacity=30, device=CPU, memory=MEMORY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_add_and_sample_never_wait_for_gpu() -> None:
    device = torch.device("cuda")
    replay = Replay(SPACES, num_envs=3, capacity=60, device=device)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    rows = [{name: value.to(device) for name, value in env.row().items()} for _ in range(30)]
    random = torch.Generator(device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in rows:
            replay.add(row)
        replay.sample_windows(8, 5, generator=random)
        episodes = replay.sample_episodes(8, 5, generator=random)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert episodes["reward"].device.type == "cuda"
