"""How a task with candidates is imagined: those of a replayed row are known, and those beyond it predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from imagining.candidate_model import CandidateModel
from imagining.imagination import Look, Moment, Start
from imagining.observation_imagination import Legality, ObservationImagination
from imagining.world_model import Observed
from parts.acting import Sight
from parts.actors import Actor
from parts.candidates import Candidates
from parts.latents import Feat
from settings.imagination import ImaginationSettings


class Offer(NamedTuple):
    """What is known of a state's candidates: which are legal, and the lines, as an actor reads them.

    The lines are None beyond the replayed row.
    """

    legality: Legality
    lines: Float[Tensor, "B Q R L"] | None = None


class CandidateImagination(ObservationImagination):
    """Imagination in latents, in which actors see the lines that candidates follow.

    In a replayed row these are the observed ones, as in acting; beyond it lines and mask are what the model decodes.
    """

    model: CandidateModel

    def __init__(self, model: CandidateModel, settings: ImaginationSettings) -> None:
        """Take the model and the settings.

        Raises:
            UserError: the settings do not fit the task or the model.
        """
        super().__init__(model, settings)
        self.candidates = model.candidates

    @torch.no_grad()
    def start(
        self, batch: dict[str, Tensor], observed: Observed | None, *, needs_latent: bool, generator: torch.Generator
    ) -> Start:
        start = super().start(batch, observed, needs_latent=needs_latent, generator=generator)
        lines = self.model.observed_lines(batch).repeat_interleave(self.settings.tours, 1)
        return start._replace(state=Offer(start.state, lines))

    def view(self, feat: Feat | None, state: Any, context: None) -> Moment:
        moment = super().view(feat, state.legality, context)
        lines = state.lines
        if lines is None:
            # How lines are seen is no way for an actor's gradient into the model.
            assert feat is not None
            with torch.no_grad():
                lines = self.model.predict_lines(feat)
        return moment._replace(view=Candidates(moment.view.action_mask, lines))

    def step(self, state: Any, action: Shaped[Tensor, "B Q *A"], feat: Feat | None) -> tuple[Any, None]:
        legality, finished = super().step(state.legality, action, feat)
        return Offer(legality), finished

    def replayed(self, batch: dict[str, Tensor]) -> Candidates:
        return Candidates(super().replayed(batch).action_mask, self.model.observed_lines(batch))

    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        look = super().look(sight, notes, actor)
        lines = self.model.observed_lines(sight.obs)[:, None]
        return look._replace(view=Candidates(look.view.action_mask, lines))
