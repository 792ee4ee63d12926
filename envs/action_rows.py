"""What an agent would have had to do for an action that somebody else has taken: the way back from an action space."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces


def to_row(space: Space, action: Any) -> np.ndarray:
    """The row that `spaces.to_env_action` makes this action of: an index, indices, or numbers between -1 and 1.

    Args:
        space: that the action is of.
        action: within it.

    Raises:
        ValueError, TypeError, LookupError: the action is none of the space.
    """
    if isinstance(space, spaces.Discrete):
        return np.asarray(np.int64(action) - space.start)
    return _flat(space, action)


def _flat(space: Space, action: Any) -> np.ndarray:
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flat(part, action[name]) for name, part in space.items()])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_flat(part, each) for part, each in zip(space.spaces, action, strict=True)])
    value = np.asarray(action)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return (value.astype(np.int64) - space.start).reshape(-1)
    if isinstance(space, spaces.MultiBinary):
        return value.astype(np.int64).reshape(-1)
    assert isinstance(space, spaces.Box), "there are no other actions"
    if not np.issubdtype(space.dtype, np.floating):
        return (value.astype(np.int64) - space.low.astype(np.int64)).reshape(-1)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    scaled = np.isfinite(low) & np.isfinite(high) & (high > low)
    low, high = np.where(scaled, low, -1.0), np.where(scaled, high, 1.0)
    # Halves are taken first, since the difference of the bounds would overflow at the ends of the number range.
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    return ((value.astype(np.float64).reshape(space.shape) - middle) / half).astype(np.float32).reshape(-1)
