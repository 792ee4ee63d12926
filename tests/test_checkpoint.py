from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import CheckpointError

CPU = torch.device("cpu")


class Exploit:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_save_load_round_trip(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "names": ["a", None, 0.5]}
    checkpoint.save(tmp_path / "latest.pt", state)
    loaded = checkpoint.load(tmp_path / "latest.pt", CPU)
    assert loaded.keys() == state.keys()
    assert (loaded["step"], loaded["names"]) == (3, ["a", None, 0.5])
    torch.testing.assert_close(loaded["module"], state["module"], rtol=0, atol=0)
    assert loaded["optimizer"]["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


def test_save_keeps_one_before_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "latest.pt", {"step": step})
        checkpoint.save(tmp_path / f"step_{step:09d}.pt", {"step": step})
    checkpoint.save(tmp_path / "step_000000003.pt", {"step": 3})
    steps = {path.name: checkpoint.load(path, CPU)["step"] for path in tmp_path.iterdir()}
    numbered = {f"step_{step:09d}.pt": step for step in (1, 2, 3)}
    assert steps == {"latest.pt": 3, "previous.pt": 2, **numbered}


@pytest.mark.parametrize("value", [np.float64(1.0), {1, 2}, Exploit(), np.zeros(2)])
def test_save_refuses_value_that_load_would_refuse(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\.nested\[1\] is a "):
        checkpoint.save(tmp_path / "latest.pt", {"nested": [0, value]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_save_killed_at_any_call_leaves_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "latest.pt", {"step": step})
    original = getattr(os, call)
    calls = []

    def killed_at_nth(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == nth:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed_at_nth)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "latest.pt", {"step": 3})
    state = checkpoint.load_latest(tmp_path, CPU)
    assert state is not None
    assert state["step"] == (3 if (call, nth) == ("fsync", 2) else 2)
    checkpoint.save(tmp_path / "latest.pt", {"step": 4})
    assert checkpoint.load(tmp_path / "latest.pt", CPU)["step"] == 4
    assert checkpoint.load(tmp_path / "previous.pt", CPU)["step"] in (2, 3)


SAVE_FOREVER = """
import sys
from collections.abc import Callable
from pathlib import Path
import torch
import checkpoint
for step in range(1, 1000000):
    checkpoint.save(Path(sys.argv[1]), {"step": step, "weights": torch.full((30000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.run
def test_save_survives_kill_of_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / "latest.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            announced = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        announced = max([announced, *map(int, writer.stdout.read().split())])
    state = checkpoint.load_latest(tmp_path, CPU)
    assert state is not None
    assert state["step"] in (announced, announced + 1)
    assert (state["weights"] == state["step"]).all()


def write_legacy_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"format": 1, "state": {}}))


def write_foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.txt", "not ours")


def write_truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_flipped_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # In the middle of the tensor's data, 4,000 times 1.0: the archive's own structure stays whole.
    position = content.index(np.ones(100, dtype=np.float32).tobytes()) + 8000
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "cannot be opened .No such file or directory"),
        (lambda path: path.write_bytes(b""), "is empty, truncated or not a checkpoint"),
        (write_truncated, "is empty, truncated or not a checkpoint"),
        (write_legacy_pickle, "is empty, truncated or not a checkpoint"),
        (write_flipped_byte, "is corrupt .a checksum differs"),
        (write_foreign_zip, "is corrupt or not a checkpoint"),
        (lambda path: torch.save({"format": 1, "state": Exploit()}, path), "could run code"),
        (lambda path: torch.save([1], path), "not a checkpoint of this program"),
        (lambda path: torch.save({"weights": torch.ones(2)}, path), "not a checkpoint of this program"),
        (lambda path: torch.save({"format": 99, "state": {}}, path), "has format 99, and this version reads format 1"),
    ],
)
def test_load_reports_unusable_file_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "latest.pt"
    checkpoint.save(path, {"weights": torch.ones(4000)})
    assert callable(damage)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path, CPU)
    assert "\n" not in str(error.value)
    assert "give another checkpoint" in str(error.value)
    assert not Path("unpickled").exists()


def test_load_points_to_previous_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "latest.pt", {"step": step})
    write_truncated(tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match=f"--resume {tmp_path / 'previous.pt'}"):
        checkpoint.load(tmp_path / "latest.pt", CPU)


def test_load_latest_of_new_logdir_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path, CPU) is None


def test_load_latest_falls_back_and_keeps_good_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "latest.pt", {"step": step})
    write_truncated(tmp_path / "latest.pt")
    assert checkpoint.load_latest(tmp_path, CPU) == {"step": 1}
    assert "Going on from" in capsys.readouterr().err
    checkpoint.save(tmp_path / "latest.pt", {"step": 3})
    assert checkpoint.load(tmp_path / "previous.pt", CPU) == {"step": 1}


def test_load_latest_raises_where_none_is_readable(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "latest.pt", {"step": step})
    for name in ("latest.pt", "previous.pt"):
        write_truncated(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"previous\.pt is empty, truncated"):
        checkpoint.load_latest(tmp_path, CPU)
    assert (tmp_path / "latest.pt").exists()


def test_generators_restored_draw_the_same(tmp_path: Path) -> None:
    generators = {name: torch.Generator(device=CPU).manual_seed(seed) for seed, name in enumerate(("acting", "model"))}
    for generator in generators.values():
        torch.rand(3, generator=generator, device=CPU)
    checkpoint.save(tmp_path / "latest.pt", {"generators": checkpoint.generator_state(generators)})
    expected = [torch.rand(5, generator=generator, device=CPU) for generator in generators.values()]
    fresh = {name: torch.Generator(device=CPU) for name in generators}
    checkpoint.restore_generators(fresh, checkpoint.load(tmp_path / "latest.pt", CPU)["generators"])
    torch.testing.assert_close(
        [torch.rand(5, generator=generator, device=CPU) for generator in fresh.values()], expected
    )


def test_restore_generators_refuses_other_names_and_devices() -> None:
    generators = {"acting": torch.Generator(device=CPU)}
    with pytest.raises(CheckpointError, match=r"generators for \['model'\], this run for \['acting'\]"):
        checkpoint.restore_generators(generators, {"model": generators["acting"].get_state()})
    with pytest.raises(CheckpointError, match="'acting' was saved on another kind of device than cpu"):
        checkpoint.restore_generators(generators, {"acting": torch.zeros(16, dtype=torch.uint8)})


# Files that a stranger has made


def rewritten(path: Path, change: Callable[[bytes], bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a checkpoint anew, with another pickle in it or another compression."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def pickled(value: str) -> Callable[[bytes], bytes]:
    """A pickle whose state is what an expression in opcodes gives."""
    opcodes = {
        "bytearray": b"c__builtin__\nbytearray\n(J\x00\xca\x9a\x3btR",
        "meta tensor": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R",
    }[value]
    return lambda _: (
        b"\x80\x02}(X\x06\x00\x00\x00formatK\x01X\x05\x00\x00\x00state}X\x01\x00\x00\x00w" + opcodes + b"su."
    )


def laughing(levels: int) -> dict[str, object]:
    value: list[object] = [0, 0]
    for _ in range(levels):
        value = [value, value]
    return {"laugh": value}


@pytest.mark.parametrize(
    ("attack", "cause"),
    [
        (lambda path: rewritten(path, lambda same: same, compression=zipfile.ZIP_DEFLATED), "it is compressed"),
        (lambda path: rewritten(path, pickled("bytearray")), "objects other than tensors"),
        (lambda path: rewritten(path, pickled("meta tensor")), "objects other than tensors"),
        (lambda path: rewritten(path, lambda same: b"\xff" + same), "corrupt or not a checkpoint"),
        (lambda path: path.write_bytes(b"legacy" + path.read_bytes()), "not a checkpoint"),
        (lambda path: torch.save({"format": 1, "state": laughing(40)}, path), "entries, counting those"),
        (lambda path: torch.save({"format": 1, "state": laughing(70)}, path), "64 levels deep"),
        (lambda path: torch.save({"format": 1, "state": {"w": torch.zeros(1).expand(2**40)}}, path), "tensors claim"),
    ],
    ids=["compressed", "bytearray", "meta tensor", "no pickle", "legacy", "references", "nested", "expanded"],
)
def test_load_refuses_small_files_that_take_much_memory(attack: Callable[[Path], object], cause: str, tmp_path: Path):
    path = tmp_path / "friend.pt"
    checkpoint.save(path, {"weights": torch.zeros(10**6)})
    attack(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=cause) as refused:
        checkpoint.load(path, CPU)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    # Kilobytes; on macOS bytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_load_refuses_what_is_no_regular_file_at_once(make: Callable[[Path], object], tmp_path: Path):
    make(tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match="only regular files are opened"):
        checkpoint.load(tmp_path / "latest.pt", CPU)


def test_save_that_cannot_keep_the_one_before_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / checkpoint.PREVIOUS).mkdir()
    checkpoint.save(tmp_path / checkpoint.LATEST, {"step": 1})
    with pytest.raises(OSError, match=checkpoint.PREVIOUS):
        checkpoint.save(tmp_path / checkpoint.LATEST, {"step": 2})
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LATEST, checkpoint.PREVIOUS}
    assert checkpoint.load(tmp_path / checkpoint.LATEST, torch.device("cpu")) == {"step": 1}


def test_save_follows_no_link(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    for name in ("latest.pt", "latest.pt.tmp"):
        (tmp_path / name).symlink_to("precious")
    checkpoint.save(tmp_path / "latest.pt", {"step": 1}, keep_before=False)
    assert (tmp_path / "precious").read_text() == "mine"
    assert checkpoint.load(tmp_path / "latest.pt", CPU) == {"step": 1}
