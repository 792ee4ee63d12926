"""The world model of a car among others: candidates in latents, and everybody's motion carried along beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from config import UserError
from driving.features import FEATURES
from envs.tasks import ObservationTask
from imagining.candidate_model import CandidateModel
from imagining.traffic import MotionHead, Traffic, motion_error, observed, observed_before
from imagining.world_model import Losses, Metrics, Observed, RowMean
from networks import Latent
from settings.dreamer import ModelSettings

# What traffic is read from.
KEYS = ("ego", "agents", "agents_valid")
# Chooses the action after so many steps, in a latent and in traffic.
Choose = Callable[[int, Latent, Traffic], Int[Tensor, " B"]]


class TrafficModel(CandidateModel):
    """A world model with a head that says how everybody moves on.

    Where everybody is stands in no latent: it is stepped from what was observed, as routing steps its states, and the
    head's answer is what has to be learnt.
    """

    def __init__(self, task: ObservationTask, settings: ModelSettings, *, discount: float) -> None:
        """Build what `CandidateModel` does, and the head.

        Raises:
            UserError: the settings do not fit the task.
        """
        super().__init__(task, settings, discount=discount)
        for name in KEYS:
            size = torch.Size(FEATURES[name].shape).numel()
            if name not in task.observations or task.observations[name].shape != (size,):
                raise UserError(
                    f"model.loss_scales.motion is about traffic, and {name} of this task is none: set it to 0"
                )
        self.loss_scales["motion"] = settings.loss_scales.motion
        self.motion = MotionHead(self.rssm.feat_size, task.actions.embed_size, units=settings.units)
        self._finish(settings)

    def _head_losses(
        self, batch: dict[str, Tensor], observed: Observed, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Losses, Metrics]:
        losses, metrics = super()._head_losses(batch, observed, feat, mean)
        error, still = self._motion_errors(batch, feat)
        losses["motion"] = mean(error)
        return losses, metrics | {"motion_constant_velocity": mean(still).detach()}

    def _motion_errors(
        self, batch: dict[str, Tensor], feat: Float[Tensor, "B T F"]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """How far everybody was foreseen from where they are, and by constant velocity; 0 in first rows."""
        before, now = observed_before(batch), observed(batch)
        action = self.embed_action(batch["prev_action"], None)
        # The row before the first of a sequence is not there.
        known = ~batch["is_first"]
        known[:, 0] = False
        counts = before.valid & now.valid & known[..., None]
        change = self.motion(before, feat.roll(1, 1), action)
        foreseen, still = before.after(change), before.after(torch.zeros_like(change))
        return motion_error(foreseen, now, counts), motion_error(still, now, counts)

    @torch.no_grad()
    def foresee(
        self, sequence: dict[str, Tensor], *, steps: int, choose: Choose, noise: Float[Tensor, "B L S"]
    ) -> list[Traffic]:
        """The traffic after each of some steps from the last row of sequences [B, T], in the ego's frame of that row.

        Args:
            sequence: what was observed.
            steps: to imagine.
            choose: the ego's action.
            noise: uniform in [0, 1), for the latents of all rows and steps.
        """
        rows = sequence["is_first"].shape[1]
        latents = self.observe(sequence, noise[:, :rows]).latents
        latent = Latent(*(part[:, -1] for part in latents))
        traffic = observed({name: sequence[name][:, -1] for name in KEYS})
        foreseen = []
        for step in range(steps):
            action = self.embed_action(choose(step, latent, traffic)[:, None], None)[:, 0]
            traffic = traffic.after(self.motion(traffic, latent.feat(), action))
            foreseen.append(traffic)
            latent = self.rssm.imagine_step(latent, action, noise[:, rows + step])
        return foreseen
