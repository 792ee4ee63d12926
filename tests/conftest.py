"""What every test starts from: the shapes in the library's signatures are executed, wherever it is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch

if TYPE_CHECKING:
    from tests.run_scenes import Reference

ROOT = Path(__file__).resolve().parents[1]
# Every top-level module and package. What is imported before this line is not checked, hence fixtures import inside.
ROOMS = [path.stem for path in ROOT.glob("*.py")] + [path.parent.name for path in ROOT.glob("*/__init__.py")]
jaxtyping.install_import_hook(ROOMS, "beartype.beartype")

# One thread each: the tests' tensors are small, and test processes run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """A run flushes denormal numbers to zero, for the whole process; nothing that comes after a test inherits that."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def vector_env() -> Iterator[Callable[..., Any]]:
    """Makes environments of `GymVectorEnv`, and closes them in the end."""
    from tests.gym_scenes import vector_envs

    with vector_envs() as make:
        yield make


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    from tests.run_scenes import Reference

    return Reference(tmp_path_factory.mktemp("reference") / "run")
