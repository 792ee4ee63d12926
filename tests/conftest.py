"""What every test starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

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
    # The shapes of modules that are imported before the tests are collected are not executed.
    from tests.gym_scenes import vector_envs

    with vector_envs() as make:
        yield make
