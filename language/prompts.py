"""Prompts with their answers: made here or read from a file, and which of them are held out."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from config import ConfigError, UserError
from system import safe_files

# Prompts that are made here: so many of so many letters, and what comes behind them.
SORTED_LETTERS, ALPHABET, LETTERS, ASKS = "sorted_letters", "abcdefgh", 4, ":"
# The most bytes of a file of prompts.
MOST_BYTES = 2**30
UNPAIRED = re.compile("[\ud800-\udfff]")


class Example(NamedTuple):
    """A prompt, and the answer that is looked for."""

    prompt: str
    answer: str


class Prompts(NamedTuple):
    """All prompts of a run.

    Attributes:
        training: those to learn from.
        validation: held out, to look at while training.
        test: held out, for the end.
        faults: why rows of the file were left out, a line each.
    """

    training: list[Example]
    validation: list[Example]
    test: list[Example]
    faults: tuple[str, ...] = ()


def find_prompts(name: str, *, held_out: float) -> Prompts:
    """The prompts that the key `language.prompts` names.

    Args:
        name: of prompts that are made here, or a file of JSON lines.
        held_out: share that validates, and as large a share that tests.

    Raises:
        UserError: there is no such file, most of its rows are bad, or too few prompts are left to learn from.
    """
    faults: list[str] = []
    examples = sorted_letters() if name == SORTED_LETTERS else read_examples(Path(name), faults)
    return split(examples, held_out=held_out, faults=faults)


def sorted_letters() -> list[Example]:
    """Every word of 4 letters out of 8; the answer has the same letters by the alphabet."""
    words = ("".join(letters) for letters in itertools.product(ALPHABET, repeat=LETTERS))
    return [Example(word + ASKS, "".join(sorted(word))) for word in words]


def read_examples(path: Path, faults: list[str]) -> list[Example]:
    """The rows of a file of JSON lines; why others cannot be used is added to `faults`.

    Raises:
        UserError: it cannot be read, or more of its rows are bad than good.
    """
    try:
        text = safe_files.read_text(path, most=MOST_BYTES)
    except OSError as error:
        raise ConfigError(
            f"language.prompts is {str(path)!r}, which cannot be read ({error.strerror or error}); give"
            f" {SORTED_LETTERS}, or a file with a line of JSON for each prompt"
        ) from error
    except ValueError as error:
        raise ConfigError(f"language.prompts: {path} is no text in UTF-8, or too large ({error})") from error
    examples = []
    # Not `splitlines`: inside a text, JSON may have characters that this takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            example = _example(line)
            if isinstance(example, str):
                faults.append(f"{path}:{number}: {example}")
            else:
                examples.append(example)
    if len(faults) > len(examples) or not examples:
        first = f"; the first: {faults[0]}" if faults else ""
        total = len(faults) + len(examples)
        raise UserError(
            f'{path}: {len(faults):,} of {total:,} rows are no {{"prompt": text, "answer": text}}, so that nothing is'
            f" learnt{first}"
        )
    return examples


def _example(line: str) -> Example | str:
    """What a row holds, or what is wrong with it."""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return "is no JSON"
    if not isinstance(row, dict):
        return "is no mapping"
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str):
            return f"has no text under {key!r}"
    if any(UNPAIRED.search(row[key]) for key in ("prompt", "answer")):
        return "has half of a pair of surrogates, which is no character"
    if not row["prompt"].strip():
        return "has an empty prompt"
    return Example(row["prompt"], row["answer"])


def split(examples: Iterable[Example], *, held_out: float, faults: Iterable[str] = ()) -> Prompts:
    """Training, validation and test, by the text of the prompt: the same text is never on two sides.

    Raises:
        UserError: nothing is left of one of them.
    """
    training: list[Example] = []
    validation: list[Example] = []
    test: list[Example] = []
    for example in examples:
        share = int.from_bytes(hashlib.sha256(example.prompt.encode()).digest()[:8], "big") / 2**64
        (validation if share < held_out else test if share < 2 * held_out else training).append(example)
    if not (training and validation and test):
        raise UserError(
            f"language.held_out is {held_out:g}, which leaves {len(training)} prompts to learn from,"
            f" {len(validation)} to validate and {len(test)} to test; give more prompts, or another share"
        )
    return Prompts(training, validation, test, tuple(faults))
