"""How plans are made in the learnt model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from settings.sections import Between, Count, Section, Share, Weight
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

    def require_spread(self, members: int) -> None:
        """Check that what plans go by is there: a lone move head agrees with itself about everything.

        Args:
            members: of the ensemble of move heads.

        Raises:
            ConfigError: plans go by the spread of an ensemble, or by one of its members, and there is one head.
        """
        if members > 1:
            return
        deviations = {"plan.optimism": self.optimism, "plan.pessimism": self.pessimism}
        wanted = {key: (f"{value:g}", "0") for key, value in deviations.items() if value}
        if self.thompson:
            wanted["plan.thompson"] = ("true", "false")
        if wanted:
            given = " and ".join(f"{key} is {value}" for key, (value, _) in wanted.items())
            off = " and ".join(f"{key}: {value}" for key, (_, value) in wanted.items())
            raise ConfigError(
                f"{given}, and one move head (model.move_heads: 1) has no spread to plan by: give it 2 heads or more,"
                f" or set {off}"
            )


@dataclass(frozen=True)
class TeacherSettings(Section):
    """How the policy imitates planned tours.

    Attributes:
        scale: what imitation counts beside the policy gradient, when a run begins; 0: nothing is taught.
        final: the share of that which is left when it ends.
        plans: tours that are planned with every update.
        stock: the latest plans, so many, are taught from.
        batch: instances of a lesson.
        tours: ways through each of them, where tours may be told from several first nodes.
        dreamt: share of plans that are made of maps which nobody has walked, where nothing is hidden.
    """

    PLACE = "teacher"
    RENAMED: ClassVar = {"scale": "imag_teacher"}

    scale: Weight = 0.0
    final: Share = 1.0
    plans: Count = 16
    stock: Count = 8192
    batch: Count = 64
    tours: Count = 8
    dreamt: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stock < max(self.plans, self.batch):
            raise ConfigError(
                f"teacher.stock is {self.stock}; it must hold the first lesson, so give at least"
                f" {max(self.plans, self.batch)}, the larger of teacher.plans and teacher.batch"
            )
