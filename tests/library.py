"""What the library consists of: every top-level module and package but the tests."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [path.parent for path in sorted(ROOT.glob("*/__init__.py")) if path.parent.name != "tests"]
ROOMS = [path.stem for path in ROOT.glob("*.py")] + [package.name for package in PACKAGES]


def library_paths() -> list[Path]:
    """All of its files."""
    return [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in package.rglob("*.py"))]
