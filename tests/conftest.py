"""What every test starts from.

Fixtures import inside: the shapes of modules that are imported before the tests are collected are not executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.run_scenes import Reference

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
