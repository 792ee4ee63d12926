"""The packages that only streets need, imported where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from system.errors import UserError


def import_osmium() -> Any:
    """The package that reads files of OpenStreetMap.

    Raises:
        UserError: it is not installed.
    """
    with _telling_what_to_install("osmium"):
        import osmium
    return osmium


def import_sparse() -> Any:
    """The part of scipy that knows sparse matrices, and graphs as such.

    Raises:
        UserError: it is not installed.
    """
    with _telling_what_to_install("scipy"):
        import scipy.sparse.csgraph
    return scipy.sparse


@contextmanager
def _telling_what_to_install(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f'streets need the package {package} ({error}): pip install -e ".[streets]"') from error
