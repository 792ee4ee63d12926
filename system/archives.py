"""Whether an archive of tensors is whole and holds no code, found out before anything in it is loaded."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from typing import BinaryIO

# The attribute by which a member of an archive is a folder.
FOLDER = 0x10
OBJECTS = "holds objects other than tensors and plain values, which are never loaded: they could run code"
ZIP_BEGINS = b"PK\x03\x04"
# All that `checkpoint.save` needs by name. The loader would also take others that run nothing and yet take memory:
# `bytearray` makes gigabytes of a few letters, and so do tensors of which the file holds no numbers.
ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z][A-Za-z0-9]+Storage"
)


class UnsoundError(Exception):
    """An archive must not be loaded. The message says why."""


def require_sound(file: BinaryIO) -> None:
    """Check an archive before anything in it is loaded; the place in the file is its beginning afterwards.

    Raises:
        UnsoundError: it is none that `checkpoint.save` has written.
    """
    # The loader goes by the first bytes, and zipfile by the last ones.
    if file.read(len(ZIP_BEGINS)) != ZIP_BEGINS or not zipfile.is_zipfile(file):
        raise UnsoundError("is empty, truncated or not a checkpoint")
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    declared, size = sum(member.file_size for member in members), file.seek(0, os.SEEK_END)
    # `checkpoint.save` does not compress. A compressed archive can take a thousand times its size in memory.
    if archive.comment or declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnsoundError(f"has {size:,} bytes and declares {declared:,}: it is compressed, or not a checkpoint")
    # torch.load does not compare the checksums that torch.save writes.
    if archive.testzip() is not None:
        raise UnsoundError("is corrupt (a checksum differs)")
    # An entry whose attributes, which no checksum covers, call it a folder would be read as nothing at all, and its
    # tensor be what memory happens to hold.
    if any(member.external_attr & FOLDER for member in members):
        raise UnsoundError("is corrupt (an entry is no file)")
    for member in members:
        if member.filename.endswith(".pkl"):
            _require_plain_pickle(archive.read(member))
    file.seek(0)


def _require_plain_pickle(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        named = argument if opcode.name in ("GLOBAL", "INST") else ""
        if opcode.name == "STACK_GLOBAL" or (named and not ALLOWED.fullmatch(str(named))):
            raise UnsoundError(OBJECTS)
