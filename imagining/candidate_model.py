"""The world model of a task with candidates: observations in latents, and what there is to choose among decoded."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from envs.candidates import LINES, LINES_VALID
from envs.tasks import ObservationTask
from imagining.observation_model import ObservationModel
from parts.candidates import read_lines
from parts.latents import Feat
from parts.observations import select
from settings.dreamer import ModelSettings


def foresees_candidates(task: ObservationTask, settings: ModelSettings) -> bool:
    """Whether a task has candidates, and a model with these settings predicts their lines and their mask."""
    if task.candidates is None or not settings.loss_scales.decoder:
        return False
    return {LINES, LINES_VALID} <= set(select(task.observations, settings.decode_keys))


class CandidateModel(ObservationModel):
    """A world model that also says which candidates a latent stands for."""

    def __init__(self, task: ObservationTask, settings: ModelSettings, *, discount: float) -> None:
        """Build what `ObservationModel` does.

        Raises:
            UserError: the settings do not fit the task.
        """
        super().__init__(task, settings, discount=discount)
        assert task.candidates is not None and self.decoder is not None
        self.candidates = task.candidates

    def predict_mask(self, feat: Feat, context: None) -> Bool[Tensor, "B *Q A"]:
        """The mask that the mask head decodes; the candidate without a line is always legal."""
        mask = self.heads["mask"](feat) > 0
        return torch.cat((mask[..., :-1], torch.ones_like(mask[..., -1:])), -1)

    def predict_lines(self, feat: Feat) -> Float[Tensor, "B *Q R L"]:
        """The lines that the decoder expects, as an actor reads them."""
        assert self.decoder is not None
        predicted = self.decoder.predict(feat, only=(LINES, LINES_VALID))
        return self.observed_lines(predicted)

    def observed_lines(self, obs: dict[str, Tensor]) -> Float[Tensor, "B *Q R L"]:
        """The lines of observations, as an actor reads them."""
        return read_lines(obs[LINES], obs[LINES_VALID], self.candidates)
