"""How a car among others is imagined: traffic is stepped beside the latents, and who touches somebody is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from config import UserError
from driving.reward import CONTACT
from imagining.candidate_imagination import CandidateImagination, Offer
from imagining.contacts import own_fault
from imagining.imagination import Look, Moment, Start, Trajectory
from imagining.traffic import FEATURES, Traffic, features, observed
from imagining.traffic_model import KEYS, TrafficModel
from imagining.world_model import Metrics, Observed
from parts.acting import Sight
from parts.actors import Actor
from parts.candidates import Agents, Candidates
from parts.latents import Feat
from settings.imagination import ImaginationSettings


class Ride(NamedTuple):
    """What is known of a state: its candidates, where everybody is, and whether the ego has just run into somebody."""

    offer: Offer
    traffic: Traffic
    contact: Bool[Tensor, "B Q"]


class TrafficImagination(CandidateImagination):
    """Imagination in which actors see where everybody is, in acting and beyond: as observed, or carried on from there.

    On request it also sees contacts. A log of careful drivers has hardly one, so that no head can learn from it what
    runs into whom; but whether footprints touch is geometry. A contact by own fault then costs what it costs in
    `Drive-v0`, and ends the episode.
    """

    model: TrafficModel
    agent_features = FEATURES
    # The head of motion reads one-hot vectors.
    reads_classes = False

    def __init__(self, model: TrafficModel, settings: ImaginationSettings) -> None:
        """Take the model and the settings.

        Raises:
            UserError: the settings do not fit the task or the model.
        """
        if settings.contacts and settings.gradient != "reinforce":
            raise UserError(
                "imag_contacts are seen, and have no gradient through the dynamics: they need imag_gradient: reinforce,"
                f" got {settings.gradient}"
            )
        super().__init__(model, settings)

    @torch.no_grad()
    def start(
        self, batch: dict[str, Tensor], latents: Observed | None, *, needs_latent: bool, generator: torch.Generator
    ) -> Start:
        start = super().start(batch, latents, needs_latent=needs_latent, generator=generator)
        rows = observed({name: batch[name].repeat_interleave(self.settings.tours, 1) for name in KEYS})
        nobody = torch.zeros(start.weight.shape, dtype=torch.bool, device=start.weight.device)
        return start._replace(state=Ride(start.state, rows, nobody))

    def view(self, feat: Feat | None, state: Any, context: None) -> Moment:
        moment = super().view(feat, state.offer, context)
        return moment._replace(view=_shown(moment.view, state.traffic), state=state.contact)

    def step(self, state: Any, action: Shaped[Tensor, "B Q *A"], feat: Feat | None) -> tuple[Any, None]:
        offer, finished = super().step(state.offer, action, feat)
        assert isinstance(feat, Tensor), "motion is foreseen from latents as numbers"
        before = state.traffic
        traffic = before.after(self.model.motion(before, feat, self.model.embed_action(action, None)))
        contact = own_fault(before, traffic) if self.settings.contacts else state.contact
        return Ride(offer, traffic, contact), finished

    def cont(self, moments: Moment, finished: Any) -> Float[Tensor, "B Q H"]:
        return super().cont(moments, finished) * ~moments.state[:, :, 1:]

    def reward(self, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What the reward head expects with each latent, less what the contacts cost that it cannot know of."""
        return super().reward(trajectory, start) - CONTACT * trajectory.moments.state[:, :, 1:]

    def metrics(self, trajectory: Trajectory) -> Metrics:
        """How many imagined rides end by contact, beside what was legal."""
        metrics = super().metrics(trajectory)
        if self.settings.contacts:
            metrics["contact_rate"] = trajectory.moments.state.any(-1).float().mean()
        return metrics

    def replayed(self, batch: dict[str, Tensor]) -> Candidates:
        return _shown(super().replayed(batch), observed(batch))

    def look(self, sight: Sight, notes: Mapping[str, Any], actor: Actor) -> Look:
        look = super().look(sight, notes, actor)
        return look._replace(view=_shown(look.view, observed({name: sight.obs[name][:, None] for name in KEYS})))


def _shown(view: Candidates, traffic: Traffic) -> Candidates:
    """Candidates, and who is around."""
    return view._replace(agents=Agents(features(traffic), traffic.valid))
