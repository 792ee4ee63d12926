"""What happens to a run's files: damaged checkpoints, a full disk, two runs in one place, a kill while saving."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import checkpoint
import dreamer
from tests.faults.conftest import COMMON
from training.run_lock import RunLock

ROOT = Path(dreamer.__file__).parent


def step_of(path: Path) -> int:
    return checkpoint.load(path, torch.device("cpu"))["step"]


def damage(path: Path, how: str) -> None:
    """Make a file empty, cut it in half, or flip a byte of its largest tensor."""
    content = bytearray(path.read_bytes())
    if how == "corrupted":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        # Between entries there is padding, in which a byte more or less means nothing.
        names = content[largest.header_offset + 26 : largest.header_offset + 30]
        begin = largest.header_offset + 30 + sum(struct.unpack("<HH", names))
        content[begin + largest.file_size // 2] ^= 0xFF
    path.write_bytes(content[: {"empty": 0, "truncated": len(content) // 2, "corrupted": len(content)}[how]])


@pytest.mark.parametrize("how", ["empty", "truncated", "corrupted"])
def test_damaged_checkpoint_gives_way_to_the_one_before(how: str, runner, routing: list[str], routing_run: Path):
    runner.take(routing_run)
    previous = step_of(runner.logdir / checkpoint.PREVIOUS)
    damage(runner.logdir / checkpoint.LATEST, how)
    run = runner.train(*routing, "--steps", "160")
    assert "latest.pt is" in run.text and f"Going on from {runner.logdir / checkpoint.PREVIOUS}" in run.text
    assert 0 < previous < step_of(runner.logdir / checkpoint.LATEST)
    assert (runner.logdir / checkpoint.UNREADABLE).exists()


@pytest.mark.parametrize("how", ["empty", "truncated", "corrupted"])
def test_damaged_checkpoints_both_are_refused_and_kept(how: str, runner, routing: list[str], routing_run: Path):
    runner.take(routing_run)
    files = [runner.logdir / name for name in (checkpoint.LATEST, checkpoint.PREVIOUS)]
    for path in files:
        damage(path, how)
    before = [path.read_bytes() for path in files]
    line = runner.refused(*routing, "--steps", "200")
    assert str(runner.logdir) in line and "begin in a new logdir" in line
    assert [path.read_bytes() for path in files] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for a run's first files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16m") != 0:
        pytest.skip(f"no tmpfs can be mounted here ({os.strerror(ctypes.get_errno())})")
    try:
        yield folder
    finally:
        libc.umount2(bytes(folder), 2)


def test_full_disk_stops_the_run_and_keeps_its_last_checkpoint(
    small_disk: Path, runner, routing: list[str], monkeypatch: pytest.MonkeyPatch
):
    runner.logdir = small_disk / "run"
    fill = small_disk / "fill"
    filled: list[Path] = []
    save = checkpoint.save

    def on_a_full_disk(path: Path, state: dict, **how: bool) -> None:
        if path.name == checkpoint.LATEST and path.exists() and not filled:
            filled.append(path)
            with suppress(OSError), fill.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        save(path, state, **how)

    monkeypatch.setattr(checkpoint, "save", on_a_full_disk)
    line = runner.refused(*routing)
    assert "cannot be written to" in line and "No space left on device" in line and "make room" in line
    saved = step_of(runner.logdir / checkpoint.LATEST)
    assert 50 <= saved < 150
    fill.unlink()
    runner.train(*routing)
    assert step_of(runner.logdir / checkpoint.LATEST) == 152


def test_refused_write_stops_the_run_in_one_line(runner, routing: list[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(_descriptor: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(checkpoint.os, "fsync", refuse)
    assert "cannot be written to" in runner.refused(*routing)


def test_logdir_in_use_is_refused_and_left_alone(runner, routing: list[str]):
    runner.logdir.mkdir()
    lock = RunLock(runner.logdir)
    try:
        line = runner.refused(*routing)
    finally:
        lock.release()
    assert f"is in use by process {os.getpid()}" in line and "give another --logdir" in line
    assert [path.name for path in runner.logdir.iterdir()] == ["lock"]
    runner.train(*routing, "--steps", "56")


KILLED_WHILE_SAVING = """
import os, signal, sys
import checkpoint, dreamer
calls, sync = [], os.{call}
def killed(*arguments):
    if str(arguments[-1]).endswith("latest.pt") or "{call}" == "fsync":
        calls.append(arguments)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return sync(*arguments)
checkpoint.os.{call} = killed
dreamer.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("call", "count"), [("fsync", 9), ("replace", 2)])
def test_kill_while_saving_loses_nothing_that_was_saved(call: str, count: int, runner, routing: list[str]):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING.format(call=call, count=count)]
    arguments = [*COMMON, *routing, "--logdir", str(runner.logdir)]
    killed = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    files = [runner.logdir / name for name in (checkpoint.LATEST, checkpoint.PREVIOUS)]
    assert any(path.exists() and step_of(path) >= 50 for path in files)
    runner.train(*routing, "--steps", "112")


def test_checkpoint_with_code_in_it_is_refused_and_not_run(runner, routing: list[str], tmp_path: Path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    path = tmp_path / "harmful.pt"
    torch.save({"format": 1, "state": Harm()}, path)
    assert "could run code" in runner.refused(*routing, "--init", str(path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guard.max_skip", "3"], "the nearest is 'guard.max_skips'"),
        (["--guard.max_skips", "0"], "guard.max_skips is 0; it must be at least 1"),
        (["--guard.enabled", "perhaps"], "guard.enabled is 'perhaps'"),
        (["--steps", "many"], "steps is 'many'; it takes a whole number"),
        (["--configs", "tsp_atn"], "the nearest is 'tsp_attn'"),
        (["--task", "knapsack"], "task is 'knapsack'; choose one of"),
        (["--task", "gym_CartPoles-v1"], "no environment is registered as 'CartPoles-v1'"),
        (["--imag_mask", "guessed"], "choose one of rules, predicted"),
        (["--prefill", "10"], "prefill is 10"),
        (["--model.rssm.blocks", "3"], "multiples of 3 blocks"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--actor.lr", "-1"], "actor.lr is -1; it must be above 0"),
        (["--logdir"], "--logdir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_in_the_config_is_answered_before_anything_is_written(arguments: list[str], message: str, runner):
    assert message in runner.refused(*arguments)
    assert not runner.logdir.exists()
