"""The house's own rules: imports run one way, every tensor names its device, and the static checkers are content."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping

import jaxtyping
import pytest
import torch

import tools
from tests.library import ROOT, library_paths

# The rooms, top-level modules and packages, from the ground up: each imports from those before it alone.
ORDER = (
    *("system", "settings", "config", "checkpoint", "tools", "logits", "guard", "monitors", "streets", "language"),
    *("driving", "routing", "envs", "parts", "networks", "updates", "comparing", "training", "imagining", "planning"),
    *("scenarios", "soft", "groups", "models", "solving", "imitation"),
    *("dreamer", "sac", "grpo", "planner", "exporting", "solve", "compare", "export", "record"),
    *("sweeping", "sweep"),
)
AGENTS = frozenset({"dreamer", "sac", "grpo", "planner"})

# These modules refuse what programs pass to functions and to gymnasium environments, not what a user types.
PLAIN_VALUE_ERRORS = frozenset(
    {
        f"envs.{name}"
        for name in (
            "deep_sea",
            "driving",
            "dynamics_map",
            "examples",
            "longitudinal",
            "routing_env",
            "tours",
            "vehicles",
            "vector",
        )
    }
    | {f"routing.{name}" for name in ("cvrp", "pickup", "rules")}
    | {"training.ring"}
)

TENSOR_MAKERS = frozenset(
    {"Tensor", "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"}
    | {"randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"}
)
# Rooms that the Dreamer's update runs through, in which functions are short.
UPDATE_ROOMS = frozenset({"imagining", "updates", "parts", "tools", "networks", "models", "dreamer"})
LONGEST_FUNCTION = 60

# Questions of kind: whether a task is routing or observed, asked outside the modules of the two kinds.
KIND_MODULES = ("envs", "routing", "imagining.routing_", "imagining.observation_")
# Classes of one kind, names that are None or empty for one kind, and names that tell a kind by a string.
KIND_CLASSES = re.compile(r"(Routing|Observation|Gym|TSPPointer)[A-Za-z]*")
KIND_VALUES = frozenset({"rules", "context"})
KIND_NAMES = frozenset({"RULES"})
# Things that `hasattr` may be asked about: they are code by name, and sections of settings.
NO_KINDS = frozenset({"module", ""})
KIND_PREFIXES = frozenset({"GYM_PREFIX", "SUITE_PREFIXES", "TASK_PREFIX", "TASK_PREFIXES"})
MOST_KIND_QUESTIONS = 13

UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E)\b")


def library_sources() -> dict[str, str]:
    """The text of every top-level module and of every package's modules, by module name."""
    sources = {}
    for path in library_paths():
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
    """One line for each room without a place, import against the direction, and circle of imports."""
    place = {room: number for number, room in enumerate(ORDER)}
    graph = {name: imported_modules(name, sources) for name in sources}
    faults = []
    for name, imported in sorted(graph.items()):
        room = name.split(".")[0]
        if room not in place:
            faults.append(f"{name} has no place yet: add {room} to ORDER in tests/test_house.py")
            continue
        for other in sorted({module.split(".")[0] for module in imported} - {room}):
            if room in AGENTS and other in AGENTS:
                faults.append(f"{name} imports {other}: an agent never imports another")
            elif place.get(other, len(ORDER)) > place[room]:
                faults.append(f"{name} imports {other}: against the direction of ORDER")
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


def long_functions(name: str, source: str) -> list[str]:
    """One line for each function of more than `LONGEST_FUNCTION` lines."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    return [f"{name}.{node.name}: {lines} lines" for node, lines in lengths.items() if lines > LONGEST_FUNCTION]


def last_name(node: ast.AST) -> str:
    """`rules` of `rules` and of `self.task.rules`; empty for anything but names."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def conditions(node: ast.AST) -> list[ast.expr]:
    """What a node asks for the truth of."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.comprehension):
        return node.ifs
    return [node.operand] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else []


def asks_kind(node: ast.AST) -> bool:
    """Whether a node is a question of kind."""
    if isinstance(node, ast.Compare):
        operator, operands = node.ops[0], {last_name(node.left), last_name(node.comparators[0])}
        if isinstance(operator, (ast.In, ast.NotIn)):
            return bool(operands & KIND_NAMES)
        return isinstance(operator, (ast.Is, ast.IsNot)) and bool(operands & KIND_VALUES)
    if isinstance(node, ast.Call) and last_name(node.func) == "isinstance":
        return any(KIND_CLASSES.fullmatch(last_name(part)) for part in ast.walk(node.args[1]))
    if isinstance(node, ast.Call) and last_name(node.func) == "startswith":
        return bool({last_name(argument) for argument in node.args} & KIND_PREFIXES)
    if isinstance(node, ast.Call) and last_name(node.func) == "hasattr":
        return last_name(node.args[0]) not in NO_KINDS
    return any(last_name(condition) in KIND_VALUES for condition in conditions(node))


def kind_questions(name: str, source: str) -> list[str]:
    """One line for each question of kind in a module; an assert only narrows a type, and asks nothing."""
    found: list[str] = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.Assert):
            return
        if asks_kind(node):
            found.append(f"{name}:{getattr(node, 'lineno', 0)}")
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(source))
    return found


def test_imports_run_one_way():
    assert direction_faults(library_sources()) == []


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"networks": "", "tools": "from networks import RSSM"}, "tools imports networks"),
        ({"training.trainer": "", "networks": "from training import trainer"}, "networks imports training"),
        ({"dreamer": "", "models": "def late():\n    import dreamer"}, "models imports dreamer"),
        ({"sac": "", "dreamer": "from sac import SAC"}, "an agent never imports another"),
        ({"networks": "", "envs.routing": "import networks"}, "envs.routing imports networks"),
        ({"novelty": ""}, "novelty has no place yet"),
        ({"training.a": "from training import b", "training.b": "from training import a"}, "imports run in a circle"),
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


def test_functions_of_an_update_are_short():
    rooms = {name: source for name, source in library_sources().items() if name.split(".")[0] in UPDATE_ROOMS}
    assert {name.split(".")[0] for name in rooms} == UPDATE_ROOMS
    assert [fault for name, source in rooms.items() for fault in long_functions(name, source)] == []


def test_long_functions_finds_a_planted_one():
    def lines(count: int) -> str:
        return "class A:\n    def f(self):\n" + "        pass\n" * (count - 1)

    assert long_functions("planted", lines(LONGEST_FUNCTION + 1)) == [f"planted.f: {LONGEST_FUNCTION + 1} lines"]
    assert long_functions("planted", lines(LONGEST_FUNCTION)) == []


def test_no_function_is_exempt_from_the_limit_of_complexity():
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8").count("C901") == 1
    assert [name for name, source in library_sources().items() if "C901" in source] == []


def test_few_questions_of_kind_are_asked_outside_the_kinds():
    others = {name: source for name, source in library_sources().items() if not name.startswith(KIND_MODULES)}
    questions = [line for name, source in others.items() for line in kind_questions(name, source)]
    assert len(questions) <= MOST_KIND_QUESTIONS, "\n".join(questions)
    assert [line for line in questions if line.startswith("imagining.")] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("if self.rules is None: pass", 1),
        ("x = 1 if context is not None else 2", 1),
        ("if task.rules: pass", 1),
        ("while not rules: pass", 1),
        ("a = [x for x in y if rules]", 1),
        ("if rules and context: pass", 1),
        ("if isinstance(task, (Odd, RoutingTask)): pass", 1),
        ("if hasattr(env, 'rules'): pass", 1),
        ("if config.task in RULES: pass", 1),
        ("if config.task.startswith(GYM_PREFIX): pass", 1),
        ("assert isinstance(task, RoutingTask)", 0),
        ("if isinstance(value, (str, Mapping)) or rules.fixed_length: pass", 0),
        ("if hasattr(module, name): pass", 0),
    ],
)
def test_kind_questions_counts_planted_ones(source, count):
    assert len(kind_questions("planted", source)) == count


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


def test_shapes_in_signatures_are_executed():
    with pytest.raises(jaxtyping.TypeCheckError):
        tools.lambda_return(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), lambda_=1.0)


@pytest.mark.parametrize("name", ["training.trainer", "routing.rules", "solving.decoding"])
def test_modules_of_packages_are_loaded_with_their_shapes(name: str):
    assert type(importlib.import_module(name).__loader__).__module__.startswith("jaxtyping")


@pytest.mark.run
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
    folders = (ROOT / name for name in (*ORDER, "tests", "benchmarks", "docs"))
    paths = [path for folder in folders for path in folder.rglob("*")] + [*ROOT.glob("*"), ROOT / ".ci" / "run"]
    texts = [path for path in paths if path.suffix in {".py", ".md", ".toml", ".yaml"} or path.name == "run"]
    assert [str(path) for path in texts if UNFINISHED.search(path.read_text(encoding="utf-8"))] == []
