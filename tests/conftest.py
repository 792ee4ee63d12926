"""What every test starts from."""

from __future__ import annotations

import pytest
import torch

# One thread each: the tests' tensors are small, and test processes run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)
