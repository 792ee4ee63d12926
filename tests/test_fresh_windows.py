"""Windows of rows that nobody has learnt from yet: each once, the oldest first, before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.replay_scenes import CPU, MEMORY, SPACES, EchoEnv, filled, generator, with_memory
from training.fresh_windows import FreshWindows
from training.host_replay import HostReplay
from training.replay import Replay


def starts(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Environment and first column of each window."""
    env, column = batch["seen"][:, 0].long().unbind(-1)
    return list(zip(env.tolist(), column.tolist(), strict=True))


def test_fresh_windows_are_taken_once_in_order_and_whole():
    fresh = FreshWindows(num_envs=2)
    assert fresh.take(3, 4, oldest=0, total=3) == (0, 0, 0)
    assert fresh.take(3, 4, oldest=0, total=9) == (3, 0, 0)
    assert fresh.take(3, 4, oldest=0, total=9) == (1, 4, 1)
    assert fresh.take(3, 4, oldest=0, total=11) == (0, 8, 0)
    assert fresh.take(3, 4, oldest=0, total=16) == (3, 8, 0)
    # What the ring has lost is passed over, and so is the rest of a column of which one environment was taken.
    assert fresh.take(3, 4, oldest=13, total=20) == (2, 13, 0)


def test_online_batches_hold_every_row_once_before_any_is_drawn():
    replay, env, draws, seen = filled(0, length=100), EchoEnv(num_envs=3, episode_rows=[5]), generator(), []
    counts = []
    for _ in range(60):
        replay.add(env.row())
        if replay.total < 12:
            continue
        before, old = replay.fresh.column * 3, replay.fresh.env
        batch = replay.sample_windows(4, 6, online=True, generator=draws)
        count = (replay.fresh.column * 3 - before) // 6 + replay.fresh.env - old
        counts.append(count)
        seen += [(e, column + row) for e, column in starts(batch)[:count] for row in range(6)]
    assert sorted(seen) == [(e, column) for e in range(3) for column in range(60)]
    # The two windows of each environment that were there come first, then three more with every sixth column.
    assert counts[:8] == [4, 2, 0, 0, 0, 0, 3, 0]


def test_online_batch_draws_the_rest_as_any_other():
    online, plain = filled(20), filled(20)
    first = online.sample_windows(8, 6, online=True, generator=generator(3))
    drawn = plain.sample_windows(8, 6, generator=generator(3))
    # Of 20 columns and 3 environments there are 9 windows of 6.
    assert starts(first) == [(0, 0), (1, 0), (2, 0), (0, 6), (1, 6), (2, 6), (0, 12), (1, 12)]
    second = online.sample_windows(8, 6, online=True, generator=generator(3))
    assert starts(second) == [(2, 12), *starts(drawn)[1:]]
    assert first.keys() == drawn.keys() and all(first[name].dtype == drawn[name].dtype for name in drawn)


def test_fresh_window_goes_on_from_the_row_before_it():
    env, replay = (
        EchoEnv(num_envs=3, episode_rows=[50]),
        Replay(SPACES, num_envs=3, capacity=90, device=CPU, memory=MEMORY),
    )
    for _ in range(20):
        replay.add(with_memory(env.row()))
    batch = replay.sample_windows(6, 6, online=True, generator=generator())
    assert batch["is_first"][:, 0].tolist() == [True] * 3 + [False] * 3
    # The action and the memory of column 5, whose rows the first windows ended with.
    assert batch["prev_action"][:, 0].tolist() == [0, 0, 0, 5, 105, 205]
    assert batch["deter"].tolist() == [[0, 0]] * 3 + [[0, 5], [1, 5], [2, 5]]


def test_rows_that_were_lived_through_without_online_are_not_fresh():
    replay = filled(20)
    replay.sample_windows(2, 6, generator=generator())
    assert replay.fresh.take(4, 6, oldest=0, total=20) == (0, 20, 0)


@pytest.mark.parametrize("host", [False, True])
def test_online_batches_go_on_exactly_after_a_stop(host: bool, tmp_path: Path):
    def make() -> Replay:
        size: dict[str, Any] = {"num_envs": 3, "capacity": 90, "memory": MEMORY}
        return HostReplay(SPACES, learns_on=CPU, **size) if host else Replay(SPACES, device=CPU, **size)

    env, kept = EchoEnv(num_envs=3, episode_rows=[5]), make()
    for _ in range(20):
        kept.add(with_memory(env.row()))
    kept.sample_windows(4, 6, online=True, generator=generator())
    again = make()
    again.load_chunks(tmp_path, kept.save_chunks(tmp_path))
    for _ in range(2):
        one, other = (each.sample_windows(4, 6, online=True, generator=generator(1)) for each in (kept, again))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert starts(one)[0] == (2, 12) and (again.fresh.column, again.fresh.env) == (18, 0)


def test_nothing_is_fresh_that_a_run_without_online_has_saved(tmp_path: Path):
    replay, again = filled(20), filled(0)
    manifest = replay.save_chunks(tmp_path)
    del manifest["fresh_column"], manifest["fresh_env"]
    again.load_chunks(tmp_path, manifest)
    assert (again.fresh.column, again.fresh.env) == (20, 0)
