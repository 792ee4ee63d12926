"""SUMO's packages, imported where they are used: all else here works without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from system.errors import UserError


def import_libsumo() -> Any:
    """The simulation, as a library.

    Raises:
        UserError: it is not installed.
    """
    with _telling_what_to_install("libsumo"):
        import libsumo
    return libsumo


def import_sumolib() -> Any:
    """What reads SUMO's networks.

    Raises:
        UserError: it is not installed.
    """
    with _telling_what_to_install("sumolib"):
        import sumolib
    return sumolib


def maps_folder() -> Path:
    """Where the maps lie that come with SUMO.

    Raises:
        UserError: the package that brings them is not installed.
    """
    with _telling_what_to_install("eclipse-sumo"):
        found = importlib.util.find_spec("sumo")
        if found is None or found.origin is None:
            raise ImportError("No module named 'sumo'")
    return Path(found.origin).parent / "tools" / "game"


@contextmanager
def _telling_what_to_install(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f'driving needs the package {package} ({error}): pip install -e ".[driving]"') from error
