"""README, CONTRIBUTING and docs/: every command and snippet runs, at a small size; every link leads somewhere.

A command that stands in a fenced `sh` block or between backticks is run in an empty folder that has `examples/` and
`checkpoints/`. The runs that it reads are made by the commands of the pages that make them. One that nothing here
knows how to make small fails: add it to `PROGRAMS`.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import checkpoint
import config
from scenarios import caching
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs
from system.sockets import parts_of
from tests.scenario_scenes import scenario_settings, write_logs
from tests.street_scenes import write_town
from tests.suite_scenes import require_drawing, require_packages
from tests.test_guard import REPORT
from tests.trip_scenes import write_log
from training import launch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:python |pytest |pip |tensorboard |(?:dreamer|sac)\.py -)[^`]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
CODE_PATH = re.compile(r"`([\w/]+\.py)`")
TOUR_STOP = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
SAVED_AS = re.compile(r"Save this as `(\w+\.py)`")

# What a page leaves open, and what stands for it here.
PLACEHOLDERS = {
    "S": "0",
    "LOGDIR": "logdir/tsp_attn-seed0",
    "LOGDIR...": "logdir/tsp_attn-seed0",
    "...": "logdir/tsp_attn-seed0",
    "THAT.pt": "checkpoints/cvrp20.pt",
    "town.osm.pbf": "town.osm",
    "logdir/RUN/guard/step_*.pt": "report.pt",
    "theirs=/elsewhere/ppo_*": "theirs=logdir/debug-seed*",
    "Dreamer=lanes/*": "Dreamer=logdir/tsp_attn-seed0",
    "SAC=longitudinal/*": "SAC=logdir/sac_pendulum-seed0",
}
# Pages do not say where these come from, for they are not ours.
FOREIGN_FILE = {".tsp": "town.tsp", ".vrp": "parcels.vrp"}
# What changes nothing but how long a run takes; the section `debug` makes networks small, too.
SHORT = ("--steps", "60", "--eval_every", "0")
AGENTS = ("dreamer.py", "sac.py", "grpo.py", "planner.py")
# Modes of planner.py that train nothing.
NO_TRAINING = {"cache", "validate", "test"}
SHORT_WITH_WEIGHTS = (
    *("--steps", "220", "--envs", "2", "--prefill", "200", "--eval_every", "0", "--eval_instances", "4"),
    *("--valid_instances", "4", "--batch_size", "2", "--imag_tours", "2"),
)
# Installation, which CI does by itself, and looking for the shell.
NOT_RUN = ("pip", "git", "cd")
# Commands that take longer than a second or two even so; and those that a page reports from, in running text.
SLOW = (
    *("python -m benchmarks.faults", "python -m benchmarks.full_disk", "python -m benchmarks.ablations"),
    *("python -m benchmarks.sac_", "python -m benchmarks.speed", "python -m benchmarks.zoo"),
    *("python -m benchmarks.scenario_cache", "python -m benchmarks.traffic_prediction"),
    *("python -m benchmarks.closed_loop", "python -m benchmarks.driving_film"),
    *("python dreamer.py --configs drive_dreamer", "python -m benchmarks.ranks"),
    "python -m benchmarks.collectors",
    *("python sac.py --configs sac_longitudinal sac_two_hot", "python sac.py --configs sac_longitudinal --context"),
    *("python dreamer.py --configs cvrp_attn tsp_few_steps", "python dreamer.py --configs tsp_few_steps tsp_river"),
    *("python dreamer.py --configs tsp_few_steps tsp_stretch --cost", "python -m benchmarks.onnx_agreement"),
    *("python dreamer.py --configs tsp_attn debug --steps", "python dreamer.py --configs tsp_few_steps tsp_dreamt"),
    *(
        "python dreamer.py --configs dmc_vision",
        "python dreamer.py --configs atari",
        "python dreamer.py --configs crafter",
    ),
    *("python dreamer.py --task gym_CartPole-v1 --collectors", "python dreamer.py --task gym_Pendulum-v1"),
    "python compare.py --group 'Dreamer=",
)


class Command(NamedTuple):
    """One command as it stands on a page, and whether it stands in a fenced block."""

    text: str
    page: str
    fenced: bool

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text, comments=True)
        words = [PLACEHOLDERS.get(word, word) for word in words]
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        return words if not words[0].endswith(".py") else ["python", *words]

    @property
    def program(self) -> str:
        first, *others = self.words
        if first != "python":
            return first
        return f"-m {others[1]}" if others[0] == "-m" else others[0]

    @property
    def arguments(self) -> list[str]:
        first, *others = self.words
        if first != "python":
            return others
        return others[2:] if others[0] == "-m" else others[1:]

    @property
    def logdir(self) -> str | None:
        """The folder of the run that it makes."""
        arguments = self.arguments
        if self.program not in AGENTS or {"--evaluate", "--help", "--collect"} & set(arguments):
            return None
        if "--mode" in arguments and value_of(arguments, "--mode") in NO_TRAINING:
            return None
        if "--logdir" in arguments:
            return value_of(arguments, "--logdir")
        seed = value_of(arguments, "--seed") if "--seed" in arguments else "0"
        return f"logdir/{'-'.join(values_of(arguments, '--configs')) or value_of(arguments, '--task')}-seed{seed}"


def values_of(arguments: list[str], flag: str) -> list[str]:
    if flag not in arguments:
        return []
    rest = arguments[arguments.index(flag) + 1 :]
    ends = [index for index, word in enumerate(rest) if word.startswith("--")]
    return rest[: ends[0]] if ends else rest


def value_of(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def commands_of(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                yield from (Command(part, page.name, True) for part in parts(line))
    for span in INLINE.findall(FENCE.sub("", text)):
        yield from (Command(part, page.name, False) for part in parts(span.replace("\n", " ")))


def parts(line: str) -> list[str]:
    """The commands of a line, without comments."""
    line = re.sub(r"\s+#\s.*$", "", line)
    return [part for text in line.split("&&") if (part := " ".join(text.split())) and not part.startswith("#")]


def all_commands() -> list[Command]:
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in commands_of(page):
            if command.text not in found or command.fenced:
                found[command.text] = command
    return [command for command in found.values() if command.words[0] not in NOT_RUN]


COMMANDS = all_commands()
MAKERS = {logdir: command for command in reversed(COMMANDS) if (logdir := command.logdir)}
# The commands that write logs of trips, beside which lies a table of places, and episodes, by the file or folder.
LOGS = {
    value_of(command.arguments, "--out"): command
    for command in reversed(COMMANDS)
    if command.program in ("-m benchmarks.trips", "record.py") and "--out" in command.arguments
}


def call(module: str, arguments: list[str]) -> None:
    """What a command does, in this process; a status other than 0 fails."""
    try:
        status = importlib.import_module(module).main(arguments)
    except SystemExit as error:
        status = error.code
    assert not status, f"exit status {status}"


def train(command: Command, place: Place) -> None:
    arguments = command.arguments
    if "--logger" in arguments and "wandb" in value_of(arguments, "--logger"):
        pytest.importorskip("wandb")
    if "sac_halfcheetah" in arguments:
        pytest.importorskip("mujoco")
    names = [value_of(arguments, "--task")] if "--task" in arguments else values_of(arguments, "--configs")
    for name in names:
        require_packages(name if "_" in name else f"{name}_")
    if "dmc_vision" in arguments:
        require_drawing()
    if "--collect" in arguments:
        # Nobody is there to collect for.
        parts_of(value_of(arguments, "--collect"))
        return
    if "drive_dreamer" in names:
        pytest.importorskip("libsumo")
        fill_cache(place)
    if command.logdir is not None:
        # Where two commands would share a folder, the second has another one.
        logdir = command.logdir if MAKERS[command.logdir] == command else f"again/{COMMANDS.index(command)}"
        small = SHORT_WITH_WEIGHTS if "--init" in arguments else ("--configs", "debug", *SHORT)
        arguments += [*small, "--logdir", logdir]
        if {"--trips", "--replay"} & set(arguments):
            arguments += ["--updates", "20"]
        if "--curriculum" in arguments:
            arguments += ["--nodes", "20", "--prefill", "84", "--steps", "120"]
    call(command.program.removesuffix(".py"), arguments)


def solve(command: Command, place: Place) -> None:
    arguments = command.arguments
    for name in arguments:
        example = FOREIGN_FILE.get(Path(name).suffix)
        if example and not (place.folder / name).exists():
            text = (ROOT / "examples" / example).read_text(encoding="utf-8")
            (place.folder / name).write_text(re.sub("(?m)^NAME:.*$", f"NAME: {Path(name).stem}", text))
    # Runs here have seen so few nodes that every file is large to them, which takes its time.
    quick = ("--decode", "greedy") if "tsp_attn" in arguments[0] and "--decode" not in arguments else ()
    call("solve", [*arguments, *quick, *(("--random", "4") if "--random" in arguments else ())])


def record(command: Command, place: Place) -> None:
    """Few episodes; a run has its own config."""
    small = () if "--policy" in command.arguments else ("--configs", "debug")
    call("record", [*command.arguments, *small, "--episodes", "8"])


def sweep_first(command: Command, place: Place) -> None:
    """The first run alone, small, where the sweep has it; all others are checked."""
    if "--search" in command.arguments:
        pytest.importorskip("optuna")
    sweep = importlib.import_module("sweep")
    request = sweep.read_request(command.arguments)
    folder = Path(request.flags["logdir"]).absolute()
    sweep.require_commands(request, folder)
    folder.mkdir(parents=True, exist_ok=True)
    trial = sweep.make_plan(request, folder).next()
    program = request.flags["program"].removesuffix(".py")
    call(program, [*trial.runs[0].arguments, "--configs", "debug", *SHORT])


def train_by_one(command: Command, place: Place) -> None:
    """What each rank would do, small, by one process: torchrun is there to start more of them."""
    assert importlib.metadata.entry_points(group="console_scripts", name="torchrun")
    words = command.arguments
    program = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(program) + 1 :]
    logdir = f"again/{COMMANDS.index(command)}"
    call(program.removesuffix(".py"), [*arguments, "--configs", "debug", *SHORT, "--logdir", logdir])


def check_tests(command: Command, place: Place) -> None:
    """Tests are not run by a test: what is asked for is there."""
    paths = [word for word in command.arguments if word.startswith("tests")]
    assert all((ROOT / path).exists() for path in paths)
    if "-m" in command.arguments:
        registered = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        markers = {*value_of(command.arguments, "-m").split()} - {"and", "not"}
        assert all(f'"{marker}:' in registered for marker in markers)


def show_curves(command: Command, place: Place) -> None:
    """The server is not started: it is installed, and there are files for it to read."""
    assert importlib.metadata.entry_points(group="console_scripts", name="tensorboard")
    place.make("logdir/tsp_attn-seed0")
    assert [*Path(value_of(command.arguments, "--logdir")).rglob("events.*")]


def fetch_streets(command: Command, place: Place) -> None:
    """Nothing is downloaded by a test: the program is there."""
    call("streets.helsinki", [*command.arguments, "--help"])


def write_crossing(place: Place) -> None:
    """Logs made by hand, where pages have those of simulations."""
    write_logs(place.folder, *(f"crossing-0-{second:05}" for second in (0, 20, 40)), frames=40)


def imitate(command: Command, place: Place) -> None:
    """Few updates on logs made by hand, for which no simulator is needed."""
    write_crossing(place)
    arguments = [*command.arguments, "--logs.path", "logs", "--cache.path", "cache/pages", "--cache.workers", "0"]
    if command.logdir is not None:
        small = ("--configs", "debug", "--split.held_out_maps", "[]", "--updates", "4", "--eval_every", "0")
        arguments += [*small, "--logdir", command.logdir]
    else:
        place.make(f"logdir/{'-'.join(values_of(arguments, '--configs'))}-seed0")
    call("planner", arguments)


def fill_cache(place: Place) -> None:
    """What planner.py has put into cache/drive before."""
    write_crossing(place)
    needs = Needs(tuple(name for part in KNOWN for name in part.arrays), ())
    caching.fill(scenario_settings(place.folder, cache__path="cache/drive"), needs, KNOWN, seed=0)


def foresee_traffic(command: Command, place: Place) -> None:
    pytest.importorskip("libsumo")
    call("benchmarks.traffic_prediction", [*command.arguments, "--logs", "logs", "--sets", "train"])


def read_report(command: Command, place: Place) -> None:
    checkpoint.save(place.folder / "report.pt", REPORT)
    call("guard", command.arguments)


def solve_without_torch(command: Command, place: Place) -> None:
    """By the program that lies beside graphs, which the command before it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.program, *command.arguments])
        runpy.run_path(command.program, run_name="__main__")


def ablate(command: Command, place: Place) -> None:
    """All variants, small, in this process."""
    from benchmarks import ablations

    variants = ablations.SETS["notes" if "notes" in command.arguments else "choices"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "EVALUATIONS", ("--configs", "debug", *SHORT))
        for name in (*variants,)[-1:]:
            ablations.run(name, variants[name], ablations.folder_of(place.folder / command.arguments[0], name, 0))
    assert len([*(place.folder / command.arguments[0]).iterdir()]) == 1


def break_on_purpose(command: Command, place: Place) -> None:
    """Few faults in a short run, or one test of the suite of faults."""
    if command.arguments[0] == "off":
        call("benchmarks.faults", [*command.arguments, "-k", "test_same_faults_twice"])
        return
    from benchmarks import faults

    arguments = list(command.arguments)
    arguments[arguments.index("--faults") + 1] = "25"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "LEAST", 1)
        # A fault in the first update, before there is a good state, leaves nothing to go back to.
        patch.setattr(faults, "FIRST", 0.3)
        call("benchmarks.faults", [*arguments, "--configs", "debug", "--steps", "800"])


def time_agent(command: Command, place: Place) -> None:
    from benchmarks import collecting, speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "ENV_SECONDS", 0.02)
        patch.setattr(speed, "GUARD_SECONDS", 0.0)
        # Episodes of many nodes need more room than the small configuration has.
        room = ["--prefill", "2004", "--replay_capacity", "4004"] if "--nodes" in command.arguments else []
        call("benchmarks.speed", [*command.arguments, "--configs", "debug", "--updates", "4", *room])


def hold_bounds(command: Command, place: Place) -> None:
    """A small run of each folder has too little to know how wrong it is by; so it is made with more of that."""
    flags = [word for word in command.arguments if not word.startswith("logdir/")]
    runs = [word for word in command.arguments if word.startswith("logdir/")]
    for path in runs:
        arguments = MAKERS[path].arguments
        if "--trips" in arguments:
            call(
                "benchmarks.trips", [*LOGS[value_of(arguments, "--trips")].arguments, "--tours", "200", "--nodes", "6"]
            )
            arguments += ["--updates", "20"]
        small = ("--configs", "debug", *SHORT, "--valid_instances", "20", "--logdir", f"bounds/{path}")
        call("dreamer", [*arguments, *small])
    call("benchmarks.intervals", [*(f"bounds/{path}" for path in runs), *flags, "--instances", "4"])


def module(name: str, *small: str, needs: str | None = None) -> Callable[[Command, Place], None]:
    """A program of benchmarks, with flags that make it small; `needs` is a package that may be missing."""

    def run(command: Command, place: Place) -> None:
        if needs is not None:
            pytest.importorskip(needs)
        call(name, [*command.arguments, *small])

    return run


PROGRAMS: dict[str, Callable[[Command, Place], None]] = {
    **dict.fromkeys(AGENTS, train),
    "planner.py": imitate,
    "solve.py": solve,
    "export.py": module("export", "--instances", "4", "--decode", "greedy"),
    "compare.py": module("compare"),
    "record.py": record,
    "sweep.py": sweep_first,
    "torchrun": train_by_one,
    "pytest": check_tests,
    "tensorboard": show_curves,
    "-m guard": read_report,
    "-m streets.helsinki": fetch_streets,
    "-m benchmarks.ablations": ablate,
    "-m benchmarks.closed_loop": module("benchmarks.closed_loop", "--episodes", "1", needs="libsumo"),
    "-m benchmarks.collectors": module("benchmarks.collectors", "--counts", "1", "--steps", "400"),
    "-m benchmarks.cost_fields": module("benchmarks.cost_fields"),
    "-m benchmarks.driving_film": module("benchmarks.driving_film", needs="libsumo"),
    "-m benchmarks.faults": break_on_purpose,
    "-m benchmarks.full_disk": module("benchmarks.full_disk", "--runs", "1"),
    "-m benchmarks.intervals": hold_bounds,
    "-m benchmarks.logit_faults": module(
        "benchmarks.logit_faults", "--updates", "2", "--seeds", "1", needs="transformers"
    ),
    "-m benchmarks.monitors": module(
        "benchmarks.monitors", "--rounds", "1", "--steps", "1", "--width", "32", "--layers", "1", "--small"
    ),
    "-m benchmarks.move_errors": module("benchmarks.move_errors"),
    "-m benchmarks.anytime": module("benchmarks.anytime", "--random", "1", "--nodes", "6", "--seconds", "0.1"),
    "-m benchmarks.onnx_agreement": module("benchmarks.onnx_agreement", "--count", "20", needs="onnxscript"),
    "tsp50-onnx/solve_onnx.py": solve_without_torch,
    "-m benchmarks.operators": module("benchmarks.operators", "--configs", "debug"),
    "-m benchmarks.reference_lines": module(
        "benchmarks.reference_lines", "--made_up", "true", "--batches", "4", "--configs", "debug"
    ),
    "-m benchmarks.ranks": module("benchmarks.ranks", "--configs", "debug", "--counts", "1,2", "--updates", "4"),
    "-m benchmarks.sac_peer": module("benchmarks.sac_peer", "--configs", "debug", *SHORT, needs="stable_baselines3"),
    "-m benchmarks.sac_speed": module("benchmarks.sac_speed", "--rounds", "1", needs="stable_baselines3"),
    "-m benchmarks.scenario_cache": module(
        "benchmarks.scenario_cache", "--maps", "ingolstadt", "--seconds", "20", "--kills", "1", needs="libsumo"
    ),
    "-m benchmarks.speed": time_agent,
    "-m benchmarks.street_tours": module("benchmarks.street_tours", "--nodes", "6"),
    "-m benchmarks.traffic_prediction": foresee_traffic,
    "-m benchmarks.training_picture": module("benchmarks.training_picture"),
    "-m benchmarks.trip_plans": module("benchmarks.trip_plans", "--instances", "4", "--nodes", "6"),
    "-m benchmarks.trips": module("benchmarks.trips", "--tours", "30", "--nodes", "6"),
    "-m benchmarks.zoo": module("benchmarks.zoo", "ZooOneStep"),
    "-m benchmarks.worlds": module("benchmarks.worlds", "--instances", "4", "--nodes", "6"),
}


class Place:
    """A folder in which commands are run, and which of them have been."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: set[str] = set()
        for name in ("examples", "checkpoints"):
            shutil.copytree(ROOT / name, folder / name)
        write_town(folder)
        write_log(folder)
        for page in PAGES:
            for name, snippet in saved_snippets(page):
                (folder / name).write_text(snippet, encoding="utf-8")

    def run(self, command: Command) -> None:
        """Run a command that has not been run, and before it those that make what it reads."""
        if command.text in self._done:
            return
        self._done.add(command.text)
        for word in command.arguments:
            path = word.rpartition("=")[2]
            if path.startswith("logdir/") and path != command.logdir and not (self.folder / path).exists():
                self.make(path)
            if path in LOGS and command != LOGS[path] and not (self.folder / path).exists():
                self.run(LOGS[path])
        PROGRAMS[command.program](command, self)

    def make(self, pattern: str) -> None:
        """Make the first of the runs whose folders are called so, by the command of a page that makes it."""
        # Some programs write folders below logdir/, too: those are not read by others.
        makers = [command for logdir, command in MAKERS.items() if fnmatch.fnmatch(logdir, pattern)]
        if makers:
            self.run(makers[0])


def saved_snippets(page: Path) -> Iterator[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    for match in SAVED_AS.finditer(text):
        yield match[1], next(code for language, code in FENCE.findall(text[match.end() :]) if language == "python")


@functools.cache
def is_slow(command: Command) -> bool:
    return not command.fenced or command.text.startswith(SLOW)


def cases() -> list[Any]:
    return [
        pytest.param(command, id=command.text, marks=[pytest.mark.slow] if is_slow(command) else [])
        for command in COMMANDS
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.mark.run
@pytest.mark.parametrize("command", cases())
def test_command_of_a_page_runs(command: Command, place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place.folder)
    monkeypatch.syspath_prepend(place.folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command.program in PROGRAMS, f"{command.page} has a command that tests/test_docs.py does not know"
    place.run(command)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.logdir], ids=lambda each: each.text)
def test_settings_of_a_command_exist(command: Command):
    """Those of long runs, too, which are slow to make."""
    names = values_of(command.arguments, "--configs")
    pairs = zip(command.arguments, command.arguments[1:], strict=False)
    flags = {flag.removeprefix("--"): value for flag, value in pairs if flag.startswith("--")}
    entry = {"configs", "mode", *launch.ENTRY_KEYS}
    settings = {key: value for key, value in flags.items() if key not in entry}
    loaded = config.load(ROOT / "configs.yaml", names, settings)
    assert loaded.flat().keys() >= settings.keys()


def test_commands_of_pages_are_found():
    texts = {command.text: command.fenced for command in COMMANDS}
    assert texts["python dreamer.py --configs tsp_attn"] and texts["python compare.py logdir/*"]
    assert not texts["python -m benchmarks.worlds --instances 100"]
    assert [command.program for command in COMMANDS if command.program not in PROGRAMS] == []


def test_first_commands_are_where_ci_looks_for_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"(?m)^pip install .* && pytest$", readme)


def python_blocks() -> list[Any]:
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if language == "python" and code not in dict(saved_snippets(page)).values()
    ]


@pytest.mark.run
@pytest.mark.parametrize("code", python_blocks())
def test_snippet_of_a_page_runs(code: str, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if runs := re.findall(r'"(logdir/[^"]+)"', code):
        monkeypatch.chdir(place.folder)
        for run in runs:
            place.make(run)
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    # A snippet that shows nothing is none.
    assert names.keys() > {"__builtins__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_index_names_every_page_of_docs():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - set(LINK.findall(index)) == {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_tells_of_is_there(page: Path):
    named = CODE_PATH.findall(page.read_text(encoding="utf-8"))
    # Beside files of the house there are those that the page has its reader save.
    known = {name for name, _ in saved_snippets(page)}
    assert [name for name in named if name not in known and not (ROOT / name).exists()] == []


def test_tree_of_the_readme_names_rooms_that_are_there():
    rows = re.findall(r"(?m)^\| (`.*?`) \|", (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where")[2])
    names = re.findall(r"`(.*?)`", " ".join(rows))
    assert len(names) > 10 and [name for name in names if not (ROOT / name).exists()] == []


def test_functions_of_the_tour_are_where_it_says():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stops = TOUR_STOP.findall(contributing.partition("## A tour")[2].partition("\n## ")[0])
    missing = []
    for stop in stops:
        words = re.findall(r"`([^`]+)`", stop)
        sources = "".join((ROOT / word).read_text(encoding="utf-8") for word in words if word.endswith(".py"))
        missing += [word for word in words if not word.endswith(".py") and f"def {word}(" not in sources]
    assert len(stops) == 15 and missing == []
