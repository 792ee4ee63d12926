"""What every test starts from: the shapes in the library's signatures are executed, wherever it is imported."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch

from tests.library import ROOMS

if TYPE_CHECKING:
    from driving.scene import Log
    from tests.run_scenes import Reference

# What of the library is imported before the hook is not checked, hence fixtures import inside.
# Sections of settings have no tensors, and check their own values, in words for users.
jaxtyping.install_import_hook([room for room in ROOMS if room != "settings"], "beartype.beartype")

# Fixtures that train.
TRAINED = {"cvrp_run", "reference", "routing_run", "run", "run_of", "runner", "scripted"}

# One thread each: the tests' tensors are small, and test processes run side by side.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark as `run` what asks for a trained run, before options select by marker."""
    for item in items:
        if TRAINED.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.run)


@contextmanager
def shapes_executed(yes: bool) -> Iterator[None]:
    """Whether the shapes in signatures are executed, which takes a third of a short run's time."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", not yes)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def only_marked_tests_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that trains or starts a program has the marker `run`, by which developers leave it out.

    Shapes are executed in the runs that tests share and under `run(shapes=True)`, where a run takes a way of its own,
    and not once more in each run that repeats another under some disturbance.
    """
    markers = [marker for marker in request.node.iter_markers() if marker.name in ("run", "slow")]
    if markers:
        with shapes_executed(any(marker.kwargs.get("shapes") for marker in markers)):
            yield
        return

    def refuse(*_arguments: Any, **_named: Any) -> None:
        pytest.fail("this test trains or starts a program, and lacks the marker `run`")

    from training.loop import Loop

    monkeypatch.setattr(Loop, "run", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """A run flushes denormal numbers to zero, for the whole process; nothing that comes after a test inherits that."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the streets of a small town."""
    from tests.street_scenes import write_town

    return write_town(tmp_path_factory.mktemp("town"))


@pytest.fixture(autouse=True)
def helsinki_is_a_town(town: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`streets: helsinki` is a small town, so that no test needs what is fetched."""
    monkeypatch.setattr("streets.travel.stored_extract", lambda: town)


@pytest.fixture(scope="session")
def ingolstadt() -> Log:
    """Half a minute of SUMO's traffic; what needs it is left out where SUMO is not installed."""
    pytest.importorskip("libsumo")
    from driving.simulator import record

    return record("ingolstadt", 1, 30.0, start=100.0)


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
