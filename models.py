"""From a task and a config to the parts of a Dreamer: a world model of the right kind, who acts in it, optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

from config import UserError
from envs.tasks import ObservationTask, RoutingTask, Task
from guard import Guard
from imagining.behavior import ImagBehavior
from imagining.candidate_imagination import CandidateImagination
from imagining.candidate_model import CandidateModel, foresees_candidates
from imagining.exploration import Explorer
from imagining.imagination import Imagination
from imagining.observation_imagination import ObservationImagination
from imagining.observation_model import ObservationModel
from imagining.routing_imagination import RoutingImagination
from imagining.routing_model import RoutingModel
from imagining.traffic_imagination import TrafficImagination
from imagining.traffic_model import TrafficModel
from imagining.world_model import WorldModel
from parts.actors import Actor
from planning.planner import Planner
from planning.teacher import Teacher
from settings.dreamer import DreamerSettings, ModelSettings
from settings.imagination import ImaginationSettings
from settings.planning import PlanSettings, TeacherSettings
from updates.optimizer import Optimizer

__all__ = [
    "ImagBehavior",
    "WorldModel",
    "make_behavior",
    "make_imagination",
    "make_optimizers",
    "make_planners",
    "make_teacher",
]


def make_imagination(task: Task, settings: ImaginationSettings, *, model: ModelSettings) -> Imagination:
    """A world model for a task, and the way to imagine in it; the one place that chooses between kinds of worlds.

    Args:
        task: what there is to model.
        settings: how to imagine.
        model: the sizes and choices of the model.

    Raises:
        UserError: the settings do not fit the task.
    """
    if isinstance(task, ObservationTask):
        if settings.contacts and not model.loss_scales.motion:
            raise UserError(
                "imag_contacts are of traffic that is carried along: they need model.loss_scales.motion above 0"
            )
        if model.loss_scales.motion and not foresees_candidates(task, model):
            raise UserError(
                f"model.loss_scales.motion is {model.loss_scales.motion:g}, and this task has no decoded candidates"
                " to drive along: set it to 0"
            )
        if foresees_candidates(task, model):
            if not model.loss_scales.motion:
                return CandidateImagination(CandidateModel(task, model, discount=settings.discount), settings)
            return TrafficImagination(TrafficModel(task, model, discount=settings.discount), settings)
        return ObservationImagination(ObservationModel(task, model, discount=settings.discount), settings)
    assert isinstance(task, RoutingTask)
    return RoutingImagination(RoutingModel(task, model), settings)


def make_behavior(task: Task, imagination: Imagination, *, settings: DreamerSettings) -> ImagBehavior:
    """Actor, critic and explorer as the settings describe them.

    Raises:
        UserError: they do not fit the task.
    """
    explorer = None
    if settings.explore.scale:
        if not imagination.can_explore:
            raise UserError(
                f"explore.scale is {settings.explore.scale:g}, which is for gymnasium tasks; routing knows its doubt by"
                " model.move_heads and plan.optimism: set explore.scale: 0"
            )
        rssm = imagination.model.rssm
        explorer = Explorer(rssm.deter_size, rssm.embed_size, settings.explore)
    return ImagBehavior(
        task,
        imagination,
        actor=settings.actor,
        critic=settings.critic,
        explorer=explorer,
        norm=settings.model.norm,
        initialisation=settings.model.initialisation,
    )


def make_planners(imagination: Imagination, settings: PlanSettings, *, reward_scale: float) -> dict[str, Planner]:
    """Who plans in a world model, as `plan`; nobody where there is nothing to plan by.

    Args:
        imagination: of the model.
        settings: how to plan.
        reward_scale: what rewards were multiplied by before the model saw them.
    """
    if not imagination.can_plan:
        return {}
    assert isinstance(imagination, RoutingImagination)
    return {"plan": Planner(imagination, settings, reward_scale=reward_scale)}


def make_teacher(planners: Mapping[str, Planner], settings: TeacherSettings, *, actor: Actor) -> Teacher:
    """Who plans tours for an actor to imitate.

    Raises:
        UserError: nobody plans, or the actor reads latents, which no plan has.
    """
    if "plan" not in planners:
        raise UserError(
            f"imag_teacher is {settings.scale:g}, and nobody plans: it takes task tsp or cvrp,"
            " model.loss_scales.reward above 0 and model.reward_latent: false"
        )
    if actor.latent_size:
        raise UserError(
            f"imag_teacher is {settings.scale:g}, and plans have no latents to read: it needs actor.type: tsp_pointer"
            " and actor.pointer.latent: 0"
        )
    return Teacher(planners["plan"], settings)


def make_optimizers(
    groups: Mapping[str, nn.Module], *, settings: DreamerSettings, guard: Guard
) -> dict[str, Optimizer]:
    """An optimiser for each of `model`, `actor`, `critic` and `explore`, with the rate and limit of its own section."""
    model, actor, critic = settings.model, settings.actor, settings.critic
    rates = {"model": model.lr, "actor": actor.lr, "critic": critic.lr, "explore": settings.explore.lr}
    clips = {"model": model.grad_clip, "actor": actor.grad_clip, "critic": critic.grad_clip, "explore": math.inf}
    decays = {"model": model.weight_decay}
    shared = {**asdict(settings.schedule), **asdict(settings.optimizer), "guard": guard}
    return {
        name: Optimizer(
            name, {name: module}, lr=rates[name], clip=clips[name], weight_decay=decays.get(name, 0.0), **shared
        )
        for name, module in groups.items()
    }
