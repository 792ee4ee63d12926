"""The planner's network as a whole: from the features of rows to plans."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from imitation.decoder import PlanningDecoder, Plans
from imitation.scene_encoder import SceneEncoder


class PlanningNetwork(nn.Module):
    """Reads what stands around an ego, and answers with plans."""

    def __init__(self, *, scene: SceneEncoder, decoder: PlanningDecoder) -> None:
        super().__init__()
        self.scene, self.decoder = scene, decoder

    def forward(self, features: Mapping[str, Tensor]) -> Plans:
        """Plans of B rows, of their features by name; `candidates` [B, C, T, 3] are among those."""
        return self.decoder(self.scene(features), features["candidates"], features["action_mask"])
