"""What is printed: text of files shows as text and never steers the terminal, and a lost terminal stops nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from system.errors import UserError

# Control characters that a table or a page needs.
LAYOUT = "\n\t"
INSTEAD = "?"
_silent = False


def printable(text: str) -> str:
    """Text with a question mark for all that a terminal obeys or that shows letters in another order.

    These are control characters but line breaks and tabs, marks of direction, and the halves of characters that stand
    for bytes of a file name that are no text.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in LAYOUT else INSTEAD for letter in text)


def one_line(text: str) -> str:
    """Printable text without line breaks."""
    return printable(" ".join(text.split()))


def show(text: str) -> None:
    """Print results, to stdout. A reader that has left, as `head` does, misses what follows, and stops nothing.

    Raises:
        UserError: they cannot be written, as into a file on a full disk.
    """
    # A terminal of another alphabet shows question marks, too.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(printable(text).encode(encoding, errors="replace").decode(encoding), flush=True)
    except OSError as error:
        # Text that is flushed at the end of the process goes nowhere, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"results cannot be written to stdout ({error.strerror}); make room") from error


def tell(text: str) -> None:
    """Print what is said about the work, to stderr; nothing where another process says it."""
    if not _silent:
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def silent(yes: bool) -> Iterator[None]:
    """Whether `tell` is to say nothing within this."""
    global _silent
    before, _silent = _silent, yes
    try:
        yield
    finally:
        _silent = before


def rank_name() -> str:
    """Which of several processes this one is, as torchrun has it; empty for the first one and for the only one."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}" if rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1" else ""


class Parser(argparse.ArgumentParser):
    """Reads a command line: every option whole, so that a new one never changes what an old command means."""

    def __init__(self, program: str, *, description: str | None) -> None:
        """Describe a program as its docstring does."""
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=program, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong."""
        self.exit(2, printable(f"{self.prog}: error: {message} (see --help)\n"))

    def print_help(self, file: Any = None) -> None:
        """Show the help page."""
        try:
            show(self.format_help().rstrip())
        except UserError as error:
            self.error(str(error))


class Screen:
    """stderr that drops what cannot be shown: a closed terminal or a broken pipe is no reason to stop a run."""

    def __init__(self, stream: Any) -> None:
        """Write to `stream`; None is what a process without a stderr has."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Show `text`, if that can be done."""
        # Python raises ValueError where the stream itself has been closed.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Show what is pending, if that can be done."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether somebody may be looking."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False


def occupy_standard_streams() -> None:
    """Open what of stdin, stdout and stderr is closed to nowhere.

    The next file that is opened, a run's log say, would have its number, and get what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def one_line_errors(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a UserError, or one of `kinds`, into one line on stderr and exit status 2; Ctrl-C likewise into 130.

    Anything else is a defect, of this program or of what the user gave it, and keeps its traceback. What stderr cannot
    show is dropped.
    """
    expected: tuple[type[Exception], ...] = (UserError, *kinds)
    who = " ".join(filter(None, (program, rank_name())))
    occupy_standard_streams()
    with contextlib.redirect_stderr(Screen(sys.stderr)):
        try:
            yield
        except expected as error:
            tell(f"{who}: {one_line(str(error))}")
            raise SystemExit(2) from error
        except KeyboardInterrupt as error:
            tell(f"{who}: {error if error.args else 'interrupted'}")
            raise SystemExit(130) from error
