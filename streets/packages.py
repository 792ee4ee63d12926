"""The packages that only streets need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from system.errors import UserError


def import_extra(name: str) -> Any:
    """A module of one of them.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'streets need the package {package} ({error}): pip install -e ".[streets]"') from error
