"""Where the time of a piece of work goes, by function."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Iterator
from contextlib import contextmanager

from system.terminal import tell

# Functions that are listed.
LINES = 30


@contextmanager
def profiled(*, wanted: bool) -> Iterator[None]:
    """Tell at the block's end in which functions of this process the most time was spent, where that is wanted."""
    if not wanted:
        yield
        return
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(LINES)
        tell(text.getvalue().strip())
