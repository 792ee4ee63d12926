"""Trains on disks that fill up at random moments, and counts how the runs end: in one line, or in a traceback.

    python -m benchmarks.full_disk --runs 200 --seed 0

Each run gets a disk of its own in memory (a tmpfs, so this needs root) of a random size, up to what a whole run takes.
The same command is tried again on the full disk, and then, with room made, goes on to its end. The arguments behind
`--` go to dreamer.py in place of the tiny run that is the default.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dreamer

TINY = [
    *("--configs", "debug", "--device", "cpu", "--steps", "72", "--prefill", "48", "--log_every", "12"),
    *("--eval_every", "1000", "--checkpoint_every", "12", "--valid_instances", "2", "--eval_instances", "2"),
]
ENOUGH, LEAST = 64 << 20, 16 << 10
MS_REMOUNT, MNT_DETACH = 32, 2


def mount(folder: Path, size: int, *, flags: int = 0) -> None:
    """Put a disk of so many bytes on a folder.

    Raises:
        OSError: that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A folder with a disk of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mount(Path(folder), size)
        try:
            yield Path(folder)
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(folder), MNT_DETACH)


def run(arguments: list[str], log: Path) -> tuple[int, str]:
    """One run in a process of its own, which has everything imported already: its exit status and what it printed."""
    process = os.fork()
    if process == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # This does what the interpreter would do at its end: it prints a traceback for any exception but an exit, and
        # clears up.
        status = 1
        try:
            dreamer.main(arguments)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(status)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def ending(status: int, text: str) -> str:
    """How a run ended, in a word."""
    if "Traceback" in text or "Exception ignored" in text or status not in (0, 2):
        return "traceback"
    return "whole" if status == 0 else "one line"


def main(argv: list[str]) -> int:
    """Read the command line; the exit status is 1 if any run ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="dreamer.py's")
    given = parser.parse_args(argv)
    rng, counts = random.Random(given.seed), Counter[tuple[str, str]]()
    command = given.arguments or TINY
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with disk(ENOUGH) as folder:
            run([*command, "--logdir", str(folder / "run")], log)
            used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"a whole run takes {used:,} bytes")
        for number in range(given.runs):
            size = rng.randrange(LEAST, used + LEAST)
            with disk(size) as folder:
                arguments = [*command, "--logdir", str(folder / "run")]
                for attempt in ("full", "tried again", "with room"):
                    if attempt == "with room":
                        mount(folder, ENOUGH, flags=MS_REMOUNT)
                    status, text = run(arguments, log)
                    how = ending(status, text)
                    counts[attempt, how] += 1
                    if how == "traceback" or (attempt == "with room" and how != "whole"):
                        print(f"run {number}, {size:,} bytes, {attempt}: status {status}\n{text}")
    print("| disk | " + " | ".join(hows := ("one line", "whole", "traceback")) + " |\n|---|---|---|---|")
    for attempt in ("full", "tried again", "with room"):
        print(f"| {attempt} | " + " | ".join(str(counts[attempt, how]) for how in hows) + " |")
    return int(any(how == "traceback" for _, how in counts))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
