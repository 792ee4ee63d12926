"""Files of the user's cache folder, with a checksum: what takes long to compute is kept there.

It is computed again at need: a file that is missing, damaged or cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from system import safe_files

logger = logging.getLogger(__name__)

DIGEST_SIZE = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """`dreamer-routing` in the user's cache folder."""
    # An empty XDG_CACHE_HOME means the same as none (XDG base directory specification).
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dreamer-routing"


def read(cache_file: Path, *, most: int, what: str) -> bytes | None:
    """What was written there; None where there is nothing, or something else.

    Args:
        cache_file: whose name says what its content was computed from.
        most: bytes that the content may have.
        what: it is, for the warning that it is computed again.
    """
    try:
        content = safe_files.read_bytes(cache_file, most=DIGEST_SIZE + most)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("computing %s again: %s cannot be read (%s)", what, cache_file, error.strerror)
        return None
    digest, data = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
    if digest != _digest(cache_file, data):
        warn_of_damage(cache_file, what=what)
        return None
    return data


def warn_of_damage(cache_file: Path, *, what: str) -> None:
    """Say that a file is not what its name says."""
    logger.warning("computing %s again: %s does not hold them", what, cache_file)


def write(cache_file: Path, data: bytes, *, what: str) -> None:
    """Keep something; where that cannot be, say so and go on."""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that a run reading at this moment never sees half a file.
        with safe_files.replacing(cache_file) as unfinished:
            unfinished.write_bytes(_digest(cache_file, data) + data)
    except OSError as error:
        logger.warning("%s are not cached: %s cannot be written (%s)", what, cache_file, error)


def _digest(cache_file: Path, data: bytes) -> bytes:
    """A checksum of content and of what it was computed from, which the file's name says."""
    return hashlib.sha256(cache_file.name.encode() + data).digest()
