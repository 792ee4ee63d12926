"""Episodes as files: written whole, read as data alone, and each fault told in a line."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import UserError
from training import episode_files
from training.episode_files import EpisodeFault, EpisodeFolder, EpisodeList

EPISODE = {
    "a/0": np.arange(6, dtype=np.float32).reshape(3, 2),
    "action": np.array([1, 0, 0]),
    "reward": np.array([0, 1, 2], np.float32),
}


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array: Any, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_an_episode_is_read_as_it_was_written(tmp_path: Path):
    episode_files.write(tmp_path / "one.npz", EPISODE)
    arrays = episode_files.read(tmp_path / "one.npz")
    assert arrays.keys() == EPISODE.keys()
    for name, array in EPISODE.items():
        assert arrays[name].dtype == array.dtype and (arrays[name] == array).all()


def test_numpy_reads_and_writes_the_same_files(tmp_path: Path):
    episode_files.write(tmp_path / "ours.npz", EPISODE)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as theirs:
        assert theirs["layout"] == 1 and (theirs["a/0"] == EPISODE["a/0"]).all()
    np.savez(tmp_path / "theirs.npz", layout=1, reward=EPISODE["reward"])
    assert episode_files.read(tmp_path / "theirs.npz")["reward"].tolist() == [0, 1, 2]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "episode.npz"
    episode_files.write(path, EPISODE)
    before = path.read_bytes()
    # The last array cannot be written, after the others have been.
    with pytest.raises(ValueError, match="pickle"):
        episode_files.write(path, {**EPISODE, "zzz": np.array([object()])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_still_being_written_are_no_episodes(tmp_path: Path):
    episode_files.write(tmp_path / "b.npz", EPISODE)
    episode_files.write(tmp_path / "a.npz", EPISODE)
    (tmp_path / ".0123.npz").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not an episode")
    assert EpisodeFolder(tmp_path).names == ["a.npz", "b.npz"]


def test_folders_in_a_folder_hold_episodes_too(tmp_path: Path):
    for place in ("b/c", "a", ".hidden/a"):
        (tmp_path / place).mkdir(parents=True)
        episode_files.write(tmp_path / place / "one.npz", EPISODE)
    folder = EpisodeFolder(tmp_path)
    assert folder.names == ["a/one.npz", "b/c/one.npz"]
    assert folder.read(1)["action"].tolist() == EPISODE["action"].tolist()


@pytest.mark.parametrize("place", ["nowhere", "file", "empty"])
def test_a_folder_without_episodes_is_refused(place: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{place} (is no folder|has no .npz files)"):
        EpisodeFolder(tmp_path / place)


def test_a_list_names_the_episodes_beside_it(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("a/one.npz", "two.npz", "three.npz"):
        episode_files.write(tmp_path / name, EPISODE)
    (tmp_path / "some.txt").write_text("two.npz\na/one.npz\n")
    episodes = EpisodeList(tmp_path / "some.txt")
    assert episodes.names == ["two.npz", "a/one.npz"] and str(episodes) == str(tmp_path / "some.txt")
    assert episodes.read(1)["action"].tolist() == EPISODE["action"].tolist()
    (tmp_path / "two.npz").unlink()
    with pytest.raises(EpisodeFault, match="cannot be read"):
        episodes.read(0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "names no episode"),
        (b"../other.npz\n", r"names '\.\./other\.npz'; each line is the path of a \.npz file beside it"),
        (b"/etc/passwd.npz\n", "names '/etc/passwd.npz'"),
        (b"notes.txt\n", "names 'notes.txt'"),
        (b"PK\x03\x04\xff", "is no text with the path of an episode in each line"),
    ],
)
def test_a_list_that_names_something_else_is_refused(text: bytes, fault: str, tmp_path: Path):
    (tmp_path / "some.txt").write_bytes(text)
    with pytest.raises(UserError, match=fault):
        EpisodeList(tmp_path / "some.txt")


class Touch:
    """What runs code where a pickle of it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("member", ["reward", "layout"])
def test_nothing_that_a_file_holds_is_run(member: str, tmp_path: Path):
    marker, members = tmp_path / "ran", {"layout": npy(1), "reward": npy([0.0])}
    members[member] = npy(np.array([Touch(marker)], object), allow_pickle=True)
    with pytest.raises(EpisodeFault, match="holds what is no array of plain values"):
        episode_files.read(archive(tmp_path / "evil.npz", **members))
    path = tmp_path / "pickle.npz"
    path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(EpisodeFault, match=r"is damaged, or no \.npz file"):
        episode_files.read(path)
    assert not marker.exists()


def test_a_damaged_file_is_no_episode(tmp_path: Path):
    path = tmp_path / "episode.npz"
    episode_files.write(path, EPISODE)
    whole = path.read_bytes()
    faults = 0
    for cut in range(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(EpisodeFault):
            episode_files.read(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            arrays = episode_files.read(path)
        except EpisodeFault:
            faults += 1
            continue
        # What is changed may be a date.
        assert all(name not in arrays or (arrays[name] == array).all() for name, array in EPISODE.items())
    assert faults > 20


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"reward": npy([0.0])}, "does not say its layout, which is 1"),
        ({"layout": npy(2), "reward": npy([0.0])}, "has the layout 2; this program reads 1"),
        ({"layout": npy("1")}, "has the layout 1; this program reads 1"),
        ({"layout": npy([1])}, r"has the layout \[1\]"),
        ({"layout": b"none"}, "holds what is no array"),
        ({"layout": npy(1) + b"more"}, "holds more under layout.npy than its array"),
    ],
)
def test_another_layout_is_no_episode(members: dict[str, bytes], fault: str, tmp_path: Path):
    with pytest.raises(EpisodeFault, match=fault):
        episode_files.read(archive(tmp_path / "episode.npz", **members))


def test_more_than_memory_holds_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    episode_files.write(tmp_path / "bomb.npz", {**EPISODE, "zeros": np.zeros(10**6)})
    assert (tmp_path / "bomb.npz").stat().st_size < 10_000
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 10**6)
    with pytest.raises(EpisodeFault, match="would take 8 MB of memory, and 1 MB are free"):
        episode_files.read(tmp_path / "bomb.npz")


def test_an_observation_cannot_be_called_as_the_layout_is(tmp_path: Path):
    with pytest.raises(UserError, match="an observation is called 'layout'"):
        episode_files.write(tmp_path / "episode.npz", {"layout": np.zeros(3)})
    assert not list(tmp_path.iterdir())
