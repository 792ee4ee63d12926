"""The command line: what it takes, what programs share, and its help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import config
from config import CommandLine, ConfigError
from tests.config_scenes import SECTIONS, parse, written

COMMENTED = """\
defaults:
  steps: 1000   # env steps,
                # counted over all environments
  name: "#1"
  # How it learns.
  actor:
    lr: 1e-3    # of the actor
    sizes: {width: 4, heads: 2}   # of nodes

  # Not of the key below.

  seed: 0
fast:
  steps: 10
  actor: {sizes: {heads: 1}}
"""


PROGRAMS = """\
defaults: {steps: 1, units: 2, one: {lr: 1.0, units: 3}, two: {lr: 1.0, width: 4}, three: {lr: 1.0}}
shared: {steps: 2}
ours: {one: {units: 5}}
theirs: {steps: 3, two: {width: 5}}
built: {base: [theirs]}
two: {steps: 4}
debug: {one: {units: 1}, two: {width: 1}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, SECTIONS)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return written(tmp_path, PROGRAMS)


def parse_as_one(path: Path, *argv: str, base: Sequence[str] = ()) -> CommandLine:
    return config.parse_command_line(
        list(argv), config_path=path, description="", entry_keys={}, base=base, foreign_keys={"two": "two.py"}
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--configs", "theirs"], "section theirs is for another program: python two.py --configs theirs"),
        (["--configs", "built"], "section built is for another program"),
        (["--configs", "ours", "two"], "section two is for another program"),
        (["--two.width", "1"], "only two.py reads two.width; the nearest is 'one.units'"),
        (["--lr", "1"], "unknown key 'lr'; the nearest are 'one.lr', 'three.lr'$"),
        (["--widht", "1"], "unknown key 'widht'; the nearest is 'units'"),
    ],
)
def test_parse_command_line_refuses_what_another_program_reads(programs: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_as_one(programs, *argv)


def test_parse_command_line_takes_what_programs_share_and_its_own_base(programs: Path) -> None:
    assert parse_as_one(programs, "--configs", "shared", "ours", "debug", "--steps", "7").config.steps == 7
    assert parse_as_one(programs, "--configs", "two", base=["two"]).config.steps == 4


def test_help_leaves_out_what_another_program_reads(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_as_one(programs, "--help")
    page = capsys.readouterr().out.split()
    assert {"ours", "shared", "--one.lr"} <= set(page)
    assert not {"theirs", "built", "--two.lr"} & set(page)


def help_lines(path: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    with pytest.raises(SystemExit):
        parse(path, *argv)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_help_shows_each_keys_comment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = help_lines(written(tmp_path, COMMENTED), capsys, "--help")
    assert "--steps 1000 env steps, counted over all environments" in page
    assert "--name '#1'" in page and "--seed 0" in page
    learning = page.index("# How it learns.")
    assert page[learning + 1 : learning + 5] == [
        "--actor.lr 0.001 of the actor",
        "",
        "# of nodes",
        "--actor.sizes.width 4",
    ]


@pytest.mark.parametrize("argv", [["--configs", "fast", "--help"], ["-h", "--configs=fast"]], ids=" ".join)
def test_help_shows_the_values_of_the_sections_that_are_named(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = help_lines(written(tmp_path, COMMENTED), capsys, *argv)
    assert "--steps 10 env steps, counted over all environments" in page
    assert {"--actor.sizes.width 4", "--actor.sizes.heads 1"} <= set(page)


def test_help_refuses_a_section_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section 'fats'; the nearest is 'fast'"):
        parse(written(tmp_path, COMMENTED), "--configs", "fats", "--help")


def test_help_shows_the_comments_of_configs_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    page = help_lines(Path(config.__file__).with_name("configs.yaml"), capsys, "--help")
    assert "--model_every 4 behaviour updates per world model update" in page


def test_parse_command_line_reads_every_form(path: Path) -> None:
    command = parse(
        path, "--seed", "3", "--configs", "tsp_attn", "debug", "--actor.entropy=-1e-3", "--actor.grad_clip", "-2.5e-1",
        "--resume", "runs/latest.pt", "--logdir=a=b",
    )  # fmt: skip
    assert command.entry == {"resume": "runs/latest.pt", "init": None}
    assert config.difference(command.config, command.defaults) == {
        "seed": 3,
        "steps": 10,
        "logdir": "a=b",
        "actor.entropy": -0.001,
        "actor.grad_clip": -0.25,
        "actor.schedule.warmup": 2,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["--seed", "--compile", "true"], "--seed needs a value"),
        (["--configs"], "--configs needs a value"),
        (["--resume"], "--resume needs a value"),
        (["tsp_attn"], "unexpected 'tsp_attn'"),
        (["--seed", "1", "2"], "unexpected '2'"),
        (["--resum", "x"], "unknown key 'resum'; the nearest is 'resume'"),
        (["--config", "x"], "unknown key 'config'; the nearest is 'configs'"),
        (["--", "x"], "unknown key ''"),
    ],
)
def test_parse_command_line_refuses_mistakes(path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(path, *argv)


def test_parse_command_line_help_lists_sections_and_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(path, "--seed", "--help")
    page = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert stopped.value.code == 0
    assert page[0] == "A test."
    assert "--resume checkpoint to go on from" in page
    assert "tsp_attn TSP with 20 nodes, the default." in page
    assert "debug" in page
    assert "--actor.schedule.warmup 50" in page
    assert "--logdir null" in page
    assert "--compile false" in page
    assert "--layers [64, 64]" in page


def test_one_line_errors_exits_with_status_two(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, config.one_line_errors("dreamer.py"):
        parse(path, "--seed")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "dreamer.py: command line: --seed needs a value (see --help)\n"


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_one_line_errors_keeps_the_traceback_of_what_is_no_mistake(error: type[Exception]) -> None:
    with pytest.raises(error), config.one_line_errors("dreamer.py"):
        raise error("lost")


def test_one_line_errors_keeps_traceback_of_other_errors() -> None:
    with pytest.raises(KeyError), config.one_line_errors("dreamer.py", OSError):
        raise KeyError("a defect")
    with pytest.raises(SystemExit), config.one_line_errors("dreamer.py", OSError):
        raise OSError("no space left")
