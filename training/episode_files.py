"""Episodes as files: one .npz each, in one layout whatever the task, written whole or not at all, and read as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from config import UserError
from system import arrays, safe_files
from system.terminal import one_line

# The version of the layout, which every file tells under this name.
LAYOUT, LAYOUT_KEY = 1, "layout"
SUFFIX = ".npz"
# Of a list of episodes: a hundred for each of a million.
MOST_LIST_BYTES = 10**8

# Arrays by name, each with a row for every observation: the first one's and, at the end, the one nothing follows.
Episode = Mapping[str, np.ndarray]


class EpisodeFault(UserError):
    """An episode cannot be used. The message goes on after its name."""


class EpisodeSources:
    """Files with an episode each.

    Attributes:
        folder: that their paths begin in.
        names: their paths.
    """

    def __init__(self, place: Path, *, folder: Path, names: list[str]) -> None:
        """Know them.

        Args:
            place: what a user calls them by.
            folder: that their paths begin in.
            names: their paths.
        """
        self.folder, self.names = folder, names
        self._place = place

    def __str__(self) -> str:
        return str(self._place)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One of the episodes.

        Raises:
            EpisodeFault: it cannot be read.
        """
        return read(self.folder / self.names[index])


class EpisodeFolder(EpisodeSources):
    """The episodes in a folder and in those that it holds."""

    def __init__(self, folder: Path) -> None:
        """List the files. Names that begin with a dot are of files that are still being written, and of no episodes.

        Raises:
            UserError: there is no such folder, or no such file in it.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give one with an episode in each {SUFFIX} file (docs/offline.md)")
        paths = (path.relative_to(folder) for path in folder.rglob(f"*{SUFFIX}"))
        names = sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))
        if not names:
            raise UserError(f"{folder} has no {SUFFIX} files; python record.py makes some (docs/offline.md)")
        super().__init__(folder, folder=folder, names=names)


class EpisodeList(EpisodeSources):
    """The episodes that a text names: a path in each line, which begins in the folder of the text."""

    def __init__(self, path: Path) -> None:
        """Read the text; whether the files are there shows when they are read.

        Raises:
            UserError: it cannot be read, is empty, or names what lies outside its folder.
        """
        try:
            lines = safe_files.read_text(path, most=MOST_LIST_BYTES).splitlines()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text with the path of an episode in each line (docs/offline.md)") from error
        names = [line for line in lines if line]
        for name in names:
            if not name.endswith(SUFFIX) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(
                    f"{path} names '{one_line(name)[:80]}'; each line is the path of a {SUFFIX} file beside it"
                )
        if not names:
            raise UserError(f"{path} names no episode")
        super().__init__(path, folder=path.parent, names=names)


def write(path: Path, episode: Episode, *, lasting: bool = True) -> None:
    """Write an episode; a reader meets all of it or nothing.

    Args:
        path: the file.
        episode: its arrays.
        lasting: see `arrays.write`.

    Raises:
        OSError: it cannot be written.
        UserError: it has an array under the layout's own name.
    """
    if LAYOUT_KEY in episode:
        raise UserError(f"an observation is called '{LAYOUT_KEY}', which files of episodes use themselves; rename it")
    arrays.write(path, {LAYOUT_KEY: np.array(LAYOUT), **episode}, lasting=lasting)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an episode; nothing in the file is run, and no more memory taken than there is.

    Raises:
        EpisodeFault: it cannot be read, or is of another layout.
    """
    try:
        episode = arrays.read(path)
    except arrays.ArraysFault as fault:
        raise EpisodeFault(str(fault)) from fault
    layout = episode.pop(LAYOUT_KEY, None)
    if layout is None:
        raise EpisodeFault(f"does not say its {LAYOUT_KEY}, which is {LAYOUT}")
    if layout.shape or layout != LAYOUT:
        raise EpisodeFault(f"has the {LAYOUT_KEY} {layout.tolist()}; this program reads {LAYOUT}")
    return episode
