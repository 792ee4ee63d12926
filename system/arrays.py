"""Files of named arrays, .npz: written whole or not at all, and read as data."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from system import safe_files
from system.errors import UserError

# The level of compression that takes the least time.
QUICK = 1


class ArraysFault(UserError):
    """A file cannot be used. The message goes on after its name."""


def write(path: Path, arrays: Mapping[str, np.ndarray], *, lasting: bool = True) -> None:
    """Write arrays; a reader meets all of them or nothing. The same arrays give the same bytes.

    Args:
        path: the file.
        arrays: by name.
        lasting: whether to wait until they are on the disk, and to spend time on making them small. What can be
            computed again needs neither: where the power fails, its file may be damaged, which is noticed.

    Raises:
        OSError: the file cannot be written.
    """
    with safe_files.replacing(path) as temporary, temporary.open("wb") as file:
        # Names may be any text here, where keywords of a function may not.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=None if lasting else QUICK) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
        if lasting:
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; nothing in it is run, and no more memory taken than there is.

    Raises:
        ArraysFault: it cannot be read.
    """
    try:
        with safe_files.open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            _require_room(archive)
            return {member.removesuffix(".npy"): _array(archive, member) for member in archive.namelist()}
    except ArraysFault:
        raise
    except OSError as error:
        raise ArraysFault(f"cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ArraysFault("is damaged, or no .npz file") from error
    # Of other compressions, passwords, arrays of objects and headers that are none.
    except (ValueError, LookupError, TypeError, NotImplementedError, RuntimeError, MemoryError, SyntaxError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArraysFault(f"holds what is no array of plain values ({cause})") from error


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        # The checksum is compared where a member ends.
        if file.read(1):
            raise ArraysFault(f"holds more under {member} than its array")
    return array


def _require_room(archive: zipfile.ZipFile) -> None:
    # It loads PyTorch, for which who reads nothing need not wait, such as a process that simulates.
    from system.memory import memory_at_hand, readable_bytes

    size, free = sum(member.file_size for member in archive.infolist()), memory_at_hand()
    if free is not None and size > free:
        raise ArraysFault(f"would take {readable_bytes(size)} of memory, and {readable_bytes(free)} are free")
