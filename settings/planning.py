"""How plans are made in the learnt model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from settings.sections import Between, Section, Weight
from system.errors import ConfigError


@dataclass(frozen=True)
class PlanSettings(Section):
    """What a planner plans by.

    Attributes:
        optimism: standard deviations of the ensemble that moves are taken to be cheaper by, while collecting.
        thompson: collect by a member of the ensemble, drawn for each plan.
        pessimism: standard deviations that moves are taken to be dearer by, in evaluations and answers.
        processes: that plan side by side.
    """

    PLACE = "plan"

    optimism: Weight = 0.0
    thompson: bool = False
    pessimism: Weight = 0.0
    processes: Annotated[int, Between(1, 4096)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thompson and self.optimism:
            raise ConfigError(
                f"plan.thompson draws a member of the ensemble, plan.optimism {self.optimism:g} takes the mean of all"
                " less their spread: set one of them alone"
            )
