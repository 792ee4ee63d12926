"""Episodes as files: one .npz each, in one layout whatever the task, written whole or not at all, and read as data."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from config import UserError
from system import safe_files
from system.memory import memory_at_hand, readable_bytes

# The version of the layout, which every file tells under this name.
LAYOUT, LAYOUT_KEY = 1, "layout"
SUFFIX = ".npz"

# Arrays by name, each with a row for every observation: the first one's and, at the end, the one nothing follows.
Episode = Mapping[str, np.ndarray]


class EpisodeFault(UserError):
    """An episode cannot be used. The message goes on after its name."""


class EpisodeFolder:
    """The episodes in a folder, by their files' names."""

    def __init__(self, folder: Path) -> None:
        """List the files; those whose names begin with a dot are still being written.

        Raises:
            UserError: there is no such folder, or no such file in it.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give one with an episode in each {SUFFIX} file (docs/offline.md)")
        self.folder = folder
        self.names = sorted(path.name for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
        if not self.names:
            raise UserError(f"{folder} has no {SUFFIX} files; python record.py makes some (docs/offline.md)")

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One of the episodes.

        Raises:
            EpisodeFault: it cannot be read.
        """
        return read(self.folder / self.names[index])


def write(path: Path, episode: Episode) -> None:
    """Write an episode; a reader meets all of it or nothing.

    Raises:
        OSError: it cannot be written.
        UserError: it has an array under the layout's own name.
    """
    if LAYOUT_KEY in episode:
        raise UserError(f"an observation is called '{LAYOUT_KEY}', which files of episodes use themselves; rename it")
    with safe_files.replacing(path) as temporary, temporary.open("wb") as file:
        # Names may be any text here, where keywords of a function may not.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in {LAYOUT_KEY: np.array(LAYOUT), **episode}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an episode; nothing in the file is run, and no more memory taken than there is.

    Raises:
        EpisodeFault: it cannot be read, or is of another layout.
    """
    try:
        with safe_files.open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            _require_room(archive)
            arrays = {member.removesuffix(".npy"): _array(archive, member) for member in archive.namelist()}
    except EpisodeFault:
        raise
    except OSError as error:
        raise EpisodeFault(f"cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise EpisodeFault("is damaged, or no .npz file") from error
    # Of other compressions, passwords, arrays of objects and headers that are none.
    except (ValueError, LookupError, TypeError, NotImplementedError, RuntimeError, MemoryError, SyntaxError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise EpisodeFault(f"holds what is no array of plain values ({cause})") from error
    layout = arrays.pop(LAYOUT_KEY, None)
    if layout is None:
        raise EpisodeFault(f"does not say its {LAYOUT_KEY}, which is {LAYOUT}")
    if layout.shape or layout != LAYOUT:
        raise EpisodeFault(f"has the {LAYOUT_KEY} {layout.tolist()}; this program reads {LAYOUT}")
    return arrays


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        # The checksum is compared where a member ends.
        if file.read(1):
            raise EpisodeFault(f"holds more under {member} than its array")
    return array


def _require_room(archive: zipfile.ZipFile) -> None:
    size, free = sum(member.file_size for member in archive.infolist()), memory_at_hand()
    if free is not None and size > free:
        raise EpisodeFault(f"would take {readable_bytes(size)} of memory, and {readable_bytes(free)} are free")
