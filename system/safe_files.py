"""Files that a stranger may have laid out: only regular ones are read, and no link is followed where one is written."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}
# New files are as readable to others as the user's umask lets them be.
ORDINARY_MODE = 0o666
BLOCK = 2**20


class TooLargeError(ValueError):
    """What a file holds is larger, or nested deeper, than any of ours. The message goes on after the file's name."""


def open_to_read(path: str | os.PathLike, *, most: int | None = None) -> BinaryIO:
    """Open a regular file, or a link to one.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be opened, is something else (a FIFO would be waited for, a device may have no end), or is
            larger. Its `strerror` says so.
    """
    # Without O_NONBLOCK, opening a FIFO waits until somebody writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(descriptor, path)
        size = os.fstat(descriptor).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and such files have {most:,} at most", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, *, most: int | None = None) -> bytes:
    """All that a regular file holds.

    Raises:
        OSError: as `open_to_read`.
    """
    with open_to_read(path, most=most) as file:
        if most is None:
            return file.read()
        # The file is read block by block: Python makes room for all that it is asked to read, however little there is.
        # Files under /proc, and those that grow, also state a smaller size than they have.
        content = bytearray()
        while block := file.read(min(BLOCK, most + 1 - len(content))):
            content += block
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return bytes(content)


def read_text(path: str | os.PathLike, *, most: int | None = None) -> str:
    """The same as text.

    Raises:
        OSError: as `open_to_read`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, most=most).decode("utf-8")


def open_in_place(path: Path) -> BinaryIO:
    """Open a file to read and to append to, made where there is none; what this process truncates or writes is its own.

    Raises:
        OSError: it cannot be opened, is a link, has a second name elsewhere, or is no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, ORDINARY_MODE)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise _not_written(path, "a link") from error
    try:
        _require_regular(descriptor, path)
        if os.fstat(descriptor).st_nlink > 1:
            raise _not_written(path, "one file with another by a hard link")
        return os.fdopen(descriptor, "a+b")
    except BaseException:
        os.close(descriptor)
        raise


def create(path: Path) -> BinaryIO:
    """A new file to write; a file or link that had its name is removed, and what the link pointed to stays.

    Raises:
        OSError: it cannot be made.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, ORDINARY_MODE), "wb")


def require_small(root: Any, parts: Callable[[Any], Iterable[Any]], *, most: int, deepest: int) -> None:
    """Check how much a nested thing holds, counting what it holds several times as often as that.

    Whoever walks through it without such a limit may never come to an end: twenty lists, each with the one before
    twice, hold a million, and a list may hold itself.

    Args:
        root: the outermost.
        parts: gives what a thing holds; nothing for a plain value.
        most: things, `root` among them.
        deepest: levels.

    Raises:
        TooLargeError: there are more.
    """
    waiting, count = [(root, 1)], 0
    while waiting:
        thing, level = waiting.pop()
        count += 1
        if level > deepest:
            raise TooLargeError(f"is nested more than {deepest} levels deep")
        waiting += [(part, level + 1) for part in parts(thing)]
        if count + len(waiting) > most:
            raise TooLargeError(f"holds more than {most:,} entries, counting those that are repeated by reference")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of an empty file beside `path`, of the same suffix, that takes its place when the block ends well.

    Readers meet the old file or the new one. A link of that name is replaced, and what it pointed to stays.

    Raises:
        OSError: there is no such folder, or it cannot be written to.
    """
    temporary = path.parent / f".{uuid.uuid4().hex}{path.suffix}"
    try:
        create(temporary).close()
    except OSError as error:
        # The error names the file that was asked for, not the temporary one.
        raise type(error)(error.errno, error.strerror, str(path)) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole file at once; see `replacing`.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path, *, parents: bool = True) -> None:
    """Make a folder of this program's own, where there is none yet; with `parents` also those that it lies in.

    Raises:
        OSError: it cannot be made, or a link or a file is in its place.
    """
    path.mkdir(parents=parents, exist_ok=True)
    if path.is_symlink():
        raise _not_written(path, "a link")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Check that none of the named files and folders in a folder is a link, before they are needed.

    Raises:
        OSError: one is.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise _not_written(folder / name, "a link")


def _require_regular(descriptor: int, path: str | os.PathLike) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and only regular files are opened", str(path))


def _not_written(path: Path, kind: str) -> OSError:
    return OSError(errno.ELOOP, f"{path.name} is {kind}, which is not followed to write; remove it", str(path))


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or error.filename is None:
        return "make room"
    return f"see to {error.filename}"
