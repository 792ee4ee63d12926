"""Replay in the host's memory: the same numbers as on one device, and a host that does not wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import config
from benchmarks import operators
from benchmarks.operators import PAPER, Recorder
from config import ConfigError
from settings.run import RunSettings
from system import arrivals
from tests.replay_scenes import CPU, MEMORY, SPACES, EchoEnv, generator, with_memory
from tests.scenes import debug_config
from training import replay_room
from training.devices import make_generator, make_generators
from training.host_replay import HostReplay
from training.replay import Replay
from training.replay_room import MOST_OF_DEVICE, make_replay, on_host

SIZE: dict[str, int] = {"num_envs": 3, "capacity": 90}


def both() -> tuple[Replay, HostReplay]:
    """A replay, and one with the host; where there is no GPU, what learns is the host itself, too."""
    return Replay(SPACES, device=CPU, memory=MEMORY, **SIZE), HostReplay(SPACES, learns_on=CPU, memory=MEMORY, **SIZE)


def new_memory(shape: torch.Size) -> dict[str, Tensor]:
    return {"deter": torch.randn(*shape, 2).half(), "stoch": torch.randint(99, (*shape, 3)).short()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


@pytest.mark.parametrize("whole_episodes", [False, True])
def test_host_replay_gives_the_batches_of_a_replay(whole_episodes: bool) -> None:
    torch.manual_seed(0)
    env, replays = EchoEnv(num_envs=3, episode_rows=[5]), both()
    draws = [generator(3), generator(3)]
    for step in range(100):
        row = with_memory(env.row())
        for replay in replays:
            replay.add(row)
        # Several updates come between two steps, and some batches are drawn after the one whose memory is rewritten.
        for _ in range(step % 3 if step > 20 else 0):
            one, other = (
                replay.sample(4, 5, whole_episodes=whole_episodes, generator=draw)
                for replay, draw in zip(replays, draws, strict=True)
            )
            assert_same(one, other)
            for replay, draw in zip(replays, draws, strict=True):
                replay.sample(4, 5, whole_episodes=whole_episodes, generator=draw)
            memory = new_memory(one["reward"].shape)
            for replay, batch in zip(replays, (one, other), strict=True):
                replay.rewrite(batch, memory)
    assert replays[0].rewards == replays[1].rewards


def test_host_replay_saves_what_was_rewritten(tmp_path: Path) -> None:
    env, replays = EchoEnv(num_envs=3, episode_rows=[5]), both()
    for row in [with_memory(env.row()) for _ in range(20)]:
        for replay in replays:
            replay.add(row)
    batch = replays[0].sample_windows(4, 6, generator=generator())
    memory, other = new_memory(batch["reward"].shape), new_memory(torch.Size((1, 1)))
    before = replays[0].memory["deter"].clone()
    for replay in replays:
        replay.rewrite(batch, memory)
        replay.rewrite({name: batch[name][:1, :1] for name in ("env", "column")}, other)
        replay.save_chunks(tmp_path)
    assert not torch.equal(replays[1].memory["deter"], before)
    assert_same(replays[0].memory, replays[1].memory)


def test_host_replay_puts_in_place_what_was_rewritten_when_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are gathered before the host waits for the latents."""
    _, replay = both()
    env = EchoEnv(num_envs=3, episode_rows=[5])
    for _ in range(20):
        replay.add(with_memory(env.row()))
    batch = replay.sample_windows(4, 6, generator=generator())
    mark, order = Mock(), []
    mark.synchronize.side_effect = lambda: order.append("waits")
    monkeypatch.setattr(arrivals, "mark", lambda _device: mark)
    replay.learns_on = PAPER
    monkeypatch.setattr(HostReplay, "_sent", lambda _self, value: value)
    gathered = HostReplay._gathered

    def noted(self: HostReplay, stored: Tensor, *place: Tensor) -> Tensor:
        order.append(next(name for name, value in {**self.rows, **self.memory}.items() if value is stored))
        return gathered(self, stored, *place)

    monkeypatch.setattr(HostReplay, "_gathered", noted)
    replay.rewrite(batch, new_memory(batch["reward"].shape))
    assert order == []
    replay.sample_windows(4, 6, generator=generator())
    assert order.index("waits") > order.index("seen") and order[-3:] == ["waits", *MEMORY]


@pytest.fixture
def on_paper() -> Iterator[None]:
    with operators.on_paper():
        yield


@pytest.mark.parametrize("names", [("gym", "cartpole"), ("gym", "pixelgrid"), ("tsp_attn",)], ids="-".join)
def test_update_from_the_host_makes_nothing_wait(names: tuple[str, ...], on_paper: None) -> None:
    path = Path(config.__file__).with_name("configs.yaml")
    small = {"batch_size": "2", "batch_length": "8", "envs": "2", "nodes": "5"}
    small |= {"imag_horizon": "3"} if names[0] == "gym" else {}
    paper = operators.make_paper(config.load(path, [*names, "debug"], small))
    own = paper.replay
    spaces = {name: (tuple(value.shape[2:]), value.dtype) for name, value in own.rows.items() if name not in FLAGS}
    memory = {name: (tuple(value.shape[2:]), value.dtype) for name, value in own.memory.items()}
    replay = HostReplay(
        spaces, num_envs=own.num_envs, capacity=own.num_envs * own.length, learns_on=PAPER, memory=memory
    )
    replay.total, replay.oldest = own.total, own.oldest
    replay.episode_start += replay.oldest
    paper.generators["replay"] = generator()
    paper = paper._replace(replay=replay)
    paper.update(0)
    calls = paper.update(1)
    assert calls and bool(memory) == (names[0] == "gym")
    assert {replay.rewards.low.device, replay.rewards.high.device} == {PAPER}
    row = {name: torch.zeros((2, *shape), dtype=dtype, device=PAPER) for name, (shape, dtype) in spaces.items()}
    row |= {name: torch.zeros((2, *shape), dtype=dtype, device=PAPER) for name, (shape, dtype) in memory.items()}
    row |= {name: value[:, 0].to(PAPER) for name, value in replay.rows.items() if name in FLAGS}
    with Recorder():
        replay.add(row)
    assert replay.total == own.total + 1


FLAGS = ("reward", "is_first", "is_last", "is_terminal")


@pytest.mark.parametrize(
    ("choice", "needed", "host"),
    [("auto", 500, False), ("auto", 501, True), ("cpu", 1, True), ("cuda", 10**9, False)],
)
def test_rows_are_left_to_the_host_where_they_would_take_half_of_a_gpu(
    choice: str, needed: int, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_OF_DEVICE == 0.5
    monkeypatch.setattr(replay_room, "free_memory", lambda _device: 1000)
    assert on_host(choice, torch.device("cuda"), needed=needed) is host


def test_rows_of_a_run_on_the_cpu_are_where_it_learns() -> None:
    assert not on_host("auto", CPU, needed=10**18) and not on_host("cpu", CPU, needed=1)
    with pytest.raises(ConfigError, match="replay_device is cuda, and the run learns on the cpu"):
        on_host("cuda", CPU, needed=1)


@pytest.mark.parametrize(("choice", "kind"), [("cpu", HostReplay), ("auto", Replay), ("cuda", Replay)])
def test_make_replay_keeps_rows_where_the_setting_says(
    choice: str, kind: type[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_room, "free_memory", lambda _device: 10**12)
    settings = RunSettings.of(debug_config(replay_device=choice))
    # Paper stands for a GPU.
    replay = make_replay(settings, SPACES, memory=MEMORY, device=PAPER)
    assert type(replay) is kind and replay.device == (CPU if choice == "cpu" else PAPER)
    assert replay.row_bytes == sum(value[0, 0].numel() * value.element_size() for value in everything(replay))


def everything(replay: Replay) -> list[Any]:
    return [*replay.rows.values(), *replay.memory.values(), replay.episode_start]


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_for_a_gpu_are_gathered_in_pinned_memory(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, replay = both()
    asked: list[bool] = []
    empty = torch.empty

    def noted(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(pin_memory)
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", noted)
    replay.learns_on = torch.device("cuda" if pinned else "cpu")
    replay._gathered(replay.rows["seen"], torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
    assert asked == [pinned]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_replay_gives_a_gpu_the_batches_of_a_replay() -> None:
    device = torch.device("cuda")
    one = Replay(SPACES, device=CPU, memory=MEMORY, **SIZE)
    other = HostReplay(SPACES, learns_on=device, memory=MEMORY, **SIZE)
    env, draws = EchoEnv(num_envs=3, episode_rows=[5]), [generator(3), generator(3)]
    for step in range(60):
        row = with_memory(env.row())
        one.add(row)
        other.add({name: value.to(device) for name, value in row.items()})
        for _ in range(2 if step > 20 else 0):
            left, right = (
                each.sample_windows(4, 6, generator=draw) for each, draw in zip((one, other), draws, strict=True)
            )
            assert all(value.device.type == "cuda" for value in right.values())
            assert_same(left, {name: value.cpu() for name, value in right.items()})
            memory = new_memory(left["reward"].shape)
            one.rewrite(left, memory)
            other.rewrite(right, {name: value.to(device) for name, value in memory.items()})


def test_generator_of_a_role_is_the_one_among_all_roles() -> None:
    alone, among = make_generator(7, "replay", CPU), make_generators(7, CPU)["replay"]
    assert torch.equal(alone.get_state(), among.get_state())
    assert not torch.equal(alone.get_state(), make_generators(7, CPU)["model"].get_state())
