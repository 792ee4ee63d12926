"""The house's own rules: imports run one way, every tensor names its device, and the static checkers are content."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# A module imports from the layers above its own line. The ground layer's modules may use one another.
GROUND = frozenset(
    {"tools", "sets", "config", "guard", "optimizer", "recovery", "diagnosis", "logger", "checkpoint", "replay", "envs"}
    | {"acting", "agent", "layers", "learner", "memory", "moves", "records", "resuming", "runs", "safe_files"}
    | {"terminal", "views"}
)
LAYERS = (
    GROUND,
    frozenset({"actors", "critics", "evaluation", "summary", "dynamics_map"}),
    frozenset({"networks"}),
    frozenset({"observations", "trainer", "curves", "sac_networks", "worlds"}),
    frozenset({"imagining", "launch", "sac_losses"}),
    frozenset({"models", "sac"}),
    frozenset({"pictures"}),
    frozenset({"dreamer", "decoding"}),
    frozenset({"answers"}),
    frozenset({"solve", "compare"}),
    frozenset({"export"}),
)
AGENTS = frozenset({"dreamer", "sac"})

# Here callers of functions and of gymnasium environments are refused, who are programs.
PLAIN_VALUE_ERRORS = frozenset(
    {f"envs.{name}" for name in ("cvrp", "examples", "longitudinal", "pickup", "routing", "rules", "vector")}
    | {"replay", "dynamics_map"}
)

TENSOR_MAKERS = frozenset(
    {"Tensor", "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"}
    | {"randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"}
)
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E)\b")


def library_sources() -> dict[str, str]:
    """The text of every top-level module and of every package's modules, by module name."""
    paths = [*ROOT.glob("*.py")]
    for package in ROOT.glob("*/__init__.py"):
        paths += package.parent.rglob("*.py")
    sources = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def imported_modules(name: str, sources: Mapping[str, str]) -> set[str]:
    """Modules among `sources` that module `name` imports, anywhere in its text."""
    candidates = []
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            candidates += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[0] if node.level else ""
            origin = ".".join(filter(None, (package, node.module)))
            # `from envs import routing` imports a module, `from tools import OneHotDist` a name in one.
            candidates += [
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in sources else origin for alias in node.names
            ]
    return {candidate for candidate in candidates if candidate in sources}


def direction_faults(sources: Mapping[str, str]) -> list[str]:
    """One line for each module without a layer, import against the direction, and circle of imports."""
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    graph = {name: imported_modules(name, sources) for name in sources}
    faults = []
    for name, imported in sorted(graph.items()):
        room = name.split(".")[0]
        if room not in layer_of:
            faults.append(f"{name} has no place yet: add it to LAYERS in tests/test_house.py")
            continue
        for other in sorted(module.split(".")[0] for module in imported):
            if room in AGENTS and other in AGENTS - {room}:
                faults.append(f"{name} imports {other}: an agent never imports another")
            elif layer_of.get(other, -1) >= layer_of[room] and room != other and not {room, other} <= GROUND:
                faults.append(f"{name} imports {other}: against the direction of LAYERS")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        faults.append("imports run in a circle: " + " <- ".join(error.args[1]))
    return faults


def device_faults(name: str, source: str) -> list[str]:
    """One line for each tensor that module `name` creates without saying on which device."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            names_device = any(keyword.arg == "device" for keyword in node.keywords)
            if of_torch and node.func.attr in TENSOR_MAKERS and not names_device:
                faults.append(f"{name}:{node.lineno}: torch.{node.func.attr} without device=")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            faults += [
                f"{name}:{node.lineno}: call {alias.name} as torch.{alias.name}, so that its device can be checked"
                for alias in node.names
                if alias.name in TENSOR_MAKERS - {"Tensor"}
            ]
    return faults


def test_imports_run_one_way():
    assert direction_faults(library_sources()) == []


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"networks": "", "tools": "from networks import RSSM"}, "tools imports networks"),
        ({"trainer": "", "networks": "import trainer"}, "networks imports trainer"),
        ({"dreamer": "", "models": "def late():\n    import dreamer"}, "models imports dreamer"),
        ({"sac": "", "dreamer": "from sac import SAC"}, "an agent never imports another"),
        ({"networks": "", "envs.routing": "import networks"}, "envs.routing imports networks"),
        ({"novelty": ""}, "novelty has no place yet"),
        ({"replay": "import checkpoint", "checkpoint": "import replay"}, "imports run in a circle"),
        ({"envs.vector": "from . import routing", "envs.routing": "from .vector import Vector"}, "in a circle"),
    ],
)
def test_direction_faults_finds_a_planted_fault(sources, fault):
    (found,) = direction_faults(sources)
    assert fault in found


def test_direction_faults_accepts_the_direction():
    sources = {"tools": "import torch", "envs": "from . import routing", "envs.routing": "import tools"}
    sources |= {"networks": "import tools\nfrom envs.routing import TSPRules", "solve": "from envs import routing"}
    assert direction_faults(sources) == []


def test_every_tensor_names_its_device():
    assert [fault for name, source in library_sources().items() for fault in device_faults(name, source)] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.zeros(3)", 1),
        ("torch.rand(3, generator=generator) + torch.tensor(1.0)", 2),
        ("from torch import Tensor, arange", 1),
        ("torch.zeros(3, device=device) + torch.zeros_like(other) + other.new_zeros(3)", 0),
    ],
)
def test_device_faults_counts_planted_faults(source, count):
    assert len(device_faults("planted", source)) == count


def test_shape_annotations_of_every_module_are_executed():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (hooked,) = (option.partition("=")[2] for option in options if option.startswith("--jaxtyping-packages="))
    assert {name.split(".")[0] for name in library_sources()} <= set(hooked.split(","))


def test_every_file_that_the_readmes_commands_take_is_there():
    # What a command of the README makes itself is not there before.
    made = ("logdir/", "solved", "mine.pt")
    commands = re.findall(r"^python .+$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = [word for command in commands for word in command.split()]
    paths = [word for word in words if re.search(r"\.\w{2,4}$", word) and not word.startswith(made)]
    assert {"examples/town.tsp", "examples/parcels.vrp", "checkpoints/tsp50.pt", "solve.py"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def direct_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return list(map(Requirement, texts))


def pinned_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_constraints_hold_a_version_of_every_dependency_that_its_range_allows():
    pinned = pinned_versions()
    versions = {str(one): pinned.get(canonicalize_name(one.name), "none") for one in direct_dependencies()}
    assert [text for text, version in versions.items() if version not in Requirement(text).specifier] == []


def test_every_dependency_stops_before_the_next_major_version():
    # Pillow counts its major versions by the year, and mends what it breaks a year after it has warned.
    open_ended = [one.name for one in direct_dependencies() if not any(part.operator == "<" for part in one.specifier)]
    assert open_ended == ["pillow"]


@pytest.mark.parametrize("command", [("ruff", "check"), ("mypy",)], ids=lambda command: command[0])
def test_static_checker_is_content(command):
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f'{command[0]} is not installed; pip install -e ".[test]" brings it')
    finished = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_mistakes_of_the_user_have_a_class_of_their_own():
    """A plain ValueError is a defect, and keeps its traceback: what a user reads in one line is a UserError."""
    plain = [name for name, source in library_sources().items() if "raise ValueError(" in source]
    assert set(plain) <= PLAIN_VALUE_ERRORS


def test_nothing_is_left_unfinished():
    folders = (ROOT / name for name in ("envs", "tests", "benchmarks", "docs"))
    paths = [path for folder in folders for path in folder.rglob("*")] + [*ROOT.glob("*"), ROOT / ".ci" / "run"]
    texts = [path for path in paths if path.suffix in {".py", ".md", ".toml", ".yaml"} or path.name == "run"]
    assert [str(path) for path in texts if UNFINISHED.search(path.read_text(encoding="utf-8"))] == []
