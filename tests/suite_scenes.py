"""What the tests of suites share: skipping where one is not installed."""

from typing import Any

import pytest

from envs.suites import dmc
from envs.suites.registry import suite_of


def require_packages(task: str) -> None:
    """Skip where the task is of a suite that is not installed."""
    if (found := suite_of(task)) is not None:
        for package in found[0].PACKAGES:
            pytest.importorskip(package, reason=f'pip install -e ".[{found[0].EXTRA}]" brings {package}')


def require_drawing() -> None:
    """Skip where nothing draws images of MuJoCo without a screen."""
    if dmc.choose_gl() is None:
        pytest.skip("neither EGL nor OSMesa is installed, which draw without a screen")


def marked(name: str, *others: Any, marks: Any = ()) -> Any:
    """Parameters of a test, a section or a task first; under dmc, programs are started to look for EGL."""
    of_dmc = name.startswith("dmc")
    return pytest.param(name, *others, marks=[*marks, *([pytest.mark.run(shapes=True)] if of_dmc else [])], id=name)
