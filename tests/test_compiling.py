"""Compiled parts: each is one graph, gives what the code as written gives, and is compiled once."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.operators import CPU
from guard import Guard, GuardSettings
from tests.compiled import KINDS, MORE_KINDS
from updates import compiling
from updates.compiling import Part, compile_parts, compiled_parts, missing
from updates.learner import Computed, Learner
from updates.optimizer import Optimizer


def compared(backend: str, *names: str) -> list[str]:
    """The kinds whose compiled updates are those of the code as written, of those named."""
    command = [sys.executable, "-m", "tests.compiled", backend, *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.run
def test_compiled_updates_are_those_of_the_code_as_written() -> None:
    assert compared("aot_eager", "tsp_attn") == ["tsp_attn"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*KINDS, *MORE_KINDS} - {"tsp_attn"}))
def test_compiled_updates_of_more_kinds(name: str) -> None:
    assert compared("aot_eager", name) == [name]


@pytest.mark.slow
@pytest.mark.skipif(missing(CPU) is not None, reason="no compiler is installed")
@pytest.mark.parametrize("name", ["tsp_attn", "cartpole", "half"])
def test_kernels_compute_what_the_code_as_written_does(name: str) -> None:
    assert compared("inductor", name) == [name]


class Doubler(nn.Module):
    def twice(self, x: Tensor) -> Tensor:
        return 2 * x


def test_without_a_compiler_one_line_says_so_and_the_code_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    lines: list[str] = []
    module = Doubler()
    assert not compile_parts([Part(module, "twice")], mode="kernels", device=CPU, tell=lines.append)
    assert len(lines) == 1 and "C++ compiler" in lines[0]
    assert float(module.twice(torch.ones(()))) == 2 and "twice" not in vars(module)


def test_a_compiler_that_fails_is_named_once_and_the_code_runs_as_written() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such header")

    lines: list[str] = []
    module = Doubler()
    assert compile_parts([Part(module, "twice")], mode="kernels", device=CPU, tell=lines.append, backend=broken)
    with compiled_parts("kernels", learning=True):
        assert [float(module.twice(torch.ones(()))) for _ in range(2)] == [2, 2]
    assert len(lines) == 2 and "no such header" in lines[1]


def test_only_updates_use_compiled_kernels() -> None:
    calls = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal calls
        calls += 1
        return graph

    module = Doubler()
    assert compile_parts([Part(module, "twice")], mode="kernels", device=CPU, tell=print, backend=counting)
    module.twice(torch.ones(()))
    with compiled_parts("kernels", learning=False):
        module.twice(torch.ones(()))
    assert calls == 0
    with compiled_parts("kernels", learning=True):
        module.twice(torch.ones(()))
    module.twice(torch.ones(2))
    assert calls == 1


class Roots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)

    def loss(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).abs().sqrt().mean()


# The root of 0 is finite, and its gradient is not.
@pytest.mark.parametrize(
    ("layer", "value", "finding"),
    [
        ("second", 0.0, ("gradient of", "roots.first.weight")),
        ("first", math.nan, ("output of", "roots.first")),
    ],
)
def test_failed_update_is_explained_by_the_code_as_written(layer: str, value: float, finding: tuple[str, str]) -> None:
    module, guard = Roots(), Guard("cpu", GuardSettings())
    assert compile_parts([Part(module, "loss")], mode="kernels", device=CPU, tell=print, backend="aot_eager")
    learner = Learner(
        lambda: {"roots": Optimizer("roots", {"roots": module}, guard=guard, lr=0.1, clip=1.0)},
        modules={"roots": module},
        watched={"roots": module},
        follow=lambda applied: None,
        generators={"replay": torch.Generator()},
        guard=guard,
    )
    flags = torch.zeros(4, 1, dtype=torch.bool)
    batch = {"inputs": torch.ones(4, 1, 3), "is_first": flags, "env": flags.long(), "column": flags.long()}

    def update() -> None:
        with compiled_parts("kernels", learning=True):
            learner.update(
                lambda: Computed([(module.loss(batch["inputs"]), ("roots",))], {}), batch=batch, progress=0.0
            )

    update()
    for parameter in module.get_submodule(layer).parameters():
        parameter.data.fill_(value)
    update()
    first = guard.reports[0]["findings"][0]
    assert (first["kind"], first["name"]) == finding


def test_more_shapes_than_are_worth_compiling_run_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_VERSIONS", 2)
    lines: list[str] = []
    module = Doubler()
    parts = [Part(module, "twice")]
    assert compile_parts(parts, mode="kernels", device=CPU, tell=lines.append, backend=lambda graph, _: graph)
    with compiled_parts("kernels", learning=True):
        assert [len(module.twice(torch.ones(size))) for size in range(2, 6)] == [2, 3, 4, 5]
    assert len(lines) == 2 and "runs as it is written" in lines[1]
