from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError
from system import terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "?]0;owned?"),
        ("\x1b[2J\x9b31m", "?[2J?31m"),
        ("a\rb\x08", "a?b?"),
        ("abc\u202etxt.exe", "abc?txt.exe"),
        ("\udcff", "?"),
        ("Größe 5 µm\tx\ny", "Größe 5 µm\tx\ny"),
    ],
)
def test_printable_takes_away_what_a_terminal_obeys(text: str, shown: str) -> None:
    assert terminal.printable(text) == shown


def test_one_line_takes_away_line_breaks_too() -> None:
    assert terminal.one_line("a\r\n b\x1b[1m\u2028c") == "a b?[1m c"


def test_show_and_tell_print_to_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show("result\x1b[0m")
    terminal.tell("remark\x1b[0m")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("result?[0m\n", "remark?[0m\n")


WITHOUT_STDERR = """
import os
from system import terminal
os.close(2)
with terminal.one_line_errors("program"), open("log", "w") as log:
    print(log.fileno())
"""


@pytest.mark.run
def test_closed_stderr_leaves_its_number_to_no_other_file(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_STDERR], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert int(finished.stdout) > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_show_says_in_one_line_that_there_is_no_room_for_results(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="stdout.*No space left"):
            terminal.show("result")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_help_page_without_room_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            terminal.Parser("program.py", description=None).print_help()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_show_replaces_letters_that_the_terminal_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    terminal.show("Größe")
    assert shown.buffer.getvalue() == b"Gr??e\n"  # type: ignore[attr-defined]
