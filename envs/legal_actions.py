"""The action space of environments that know which of their actions are legal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gymnasium import spaces


class LegalActions(spaces.Discrete):
    """The nodes of an environment, whose plain `sample()` draws among those that are legal now.

    Nodes that are not legal in the first state, such as node 0, where a tour ends and a vehicle is loaded, are drawn
    only where no other is: gymnasium's environment checker takes what it drew in mid-episode for a first action.
    `sample(mask=...)` and `sample(probability=...)` work as in `Discrete`.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        action_masks: Callable[[], np.ndarray],
        first_masks: Callable[[], np.ndarray],
        seed: int | None = None,
    ):
        super().__init__(num_nodes, seed=seed)
        self._action_masks, self._first_masks = action_masks, first_masks

    def sample(self, mask: np.ndarray | None = None, probability: np.ndarray | None = None) -> np.int64:
        if mask is None and probability is None:
            legal = self._action_masks()
            preferred = legal & self._first_masks()
            mask = (preferred if preferred.any() else legal).astype(np.int8)
        return super().sample(mask, probability)
