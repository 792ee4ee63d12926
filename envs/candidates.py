"""Which gymnasium tasks have candidates: lines that are observed, each to be followed in some modes."""

from __future__ import annotations

import numpy as np
from gymnasium import Space, spaces

from envs.tasks import ActionSpec, CandidateSpec

# Keys of an observation that has candidates: numbers [R, K, F] of the points of lines, and which points there are.
LINES, LINES_VALID = "lines", "lines_valid"


def candidate_spec(space: Space, actions: ActionSpec) -> CandidateSpec | None:
    """What candidates consist of; None where actions are something else.

    They are where the observation has `lines`, floats [R, K, F], and `lines_valid`, flags [R, K], and there are
    R * M + 1 masked actions.

    Args:
        space: of observations.
        actions: what can be done.
    """
    if not isinstance(space, spaces.Dict) or not actions.masked:
        return None
    lines, valid = space.spaces.get(LINES), space.spaces.get(LINES_VALID)
    if not isinstance(lines, spaces.Box) or not np.issubdtype(lines.dtype, np.floating) or len(lines.shape) != 3:
        return None
    if not isinstance(valid, spaces.MultiBinary) or valid.shape != lines.shape[:2]:
        return None
    modes, rest = divmod(actions.sizes[0] - 1, lines.shape[0])
    return None if rest or not modes else CandidateSpec(*lines.shape, modes=modes)
