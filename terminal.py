"""What is printed: text of files shows as text, and never steers the terminal."""

from __future__ import annotations

import sys

# What a table or a page needs.
LAYOUT = "\n\t"
INSTEAD = "?"


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
    """Print results, to stdout."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """Print what is said about the work, to stderr."""
    print(printable(text), file=sys.stderr, flush=True)
