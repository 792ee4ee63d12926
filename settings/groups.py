"""What a trainer of groups of samples reads: how many there are, what they are compared with, how they are learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from settings.language import LanguageSettings
from settings.learning import OptimizerSettings, PointerSettings, Precision, ScheduleSettings
from settings.sections import Between, Count, GradientLimit, LearningRate, Section, Share, Weight
from system.errors import ConfigError


@dataclass(frozen=True)
class GroupSettings(Section):
    """Groups of samples, one group for each prompt or instance, and the loss on them.

    Attributes:
        prompts: or instances, of an update.
        samples: of each: the size of its group.
        first: the key imag_first. "any": tours of an instance begin at nodes spread over it; "stored": all at node 0.
        baseline: what a sample's reward is compared with: the mean of its group, or of the others in it.
        scale: what that is divided by: the group's standard deviation, the spread of returns over the run, or 1.
        epochs: updates on the same samples.
        clip: how far the ratio of probabilities may go from 1.
        length: how decisions are averaged: over each sample first, over all of them at once, or over the longest
            possible sample.
        kl: weight of the divergence from the policy as it was in the beginning.
    """

    PLACE = "groups"
    RENAMED: ClassVar = {"first": "imag_first"}

    prompts: Count
    samples: Annotated[int, Between(1)]
    first: Literal["any", "stored"]
    baseline: Literal["group", "leave_one_out"]
    scale: Literal["deviation", "percentile", "none"]
    epochs: Count
    clip: Annotated[float, Between(0, above=True)]
    length: Literal["sample", "decision", "longest"]
    kl: Weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise ConfigError(
                "groups.samples is 1; a sample alone has nothing to be compared with (the deviation of one number is"
                " none): give at least 2"
            )


@dataclass(frozen=True)
class PolicySettings(Section):
    """How the policy is optimised, and what its loss adds to advantages."""

    PLACE = "actor"

    unimix: Share
    entropy: Weight
    entropy_final: Weight
    advantage_floor: Annotated[float, Between(1e-8)]
    lr: LearningRate
    grad_clip: GradientLimit


@dataclass(frozen=True)
class SamplingSettings(Section):
    """All that a group-relative trainer reads."""

    task: str
    precision: Precision
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    groups: GroupSettings
    policy: PolicySettings
    pointer: PointerSettings
    language: LanguageSettings
