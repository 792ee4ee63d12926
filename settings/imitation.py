"""What a planner that imitates reads: the sizes of its network, its losses, and how it is optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from settings.learning import OptimizerSettings, ScheduleSettings
from settings.scenarios import SCENARIO_SECTIONS
from settings.sections import Count, GradientLimit, Layers, LearningRate, NotNegative, Section, Weight
from system.errors import ConfigError

# Sections of keys that only this planner and the way to its samples read.
PLANNER_KEYS = ("planner", *SCENARIO_SECTIONS)


@dataclass(frozen=True)
class NetworkSettings(Section):
    """The sizes of the network.

    Attributes:
        width: of every vector.
        layers: rounds of attention in the scene, and as many in which candidates are decoded.
        point_layers: rounds among the points of one line, agent or road; 0: points are read one by one.
        heads: of attention.
        hidden: units of hidden layers.
    """

    PLACE = "planner"

    width: Count
    layers: Layers
    point_layers: NotNegative
    heads: Count
    hidden: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(
                f"planner.width is {self.width}; planner.heads, {self.heads}, has to divide it without a rest"
            )


@dataclass(frozen=True)
class ImitationScales(Section):
    """Weights of the losses.

    Attributes:
        trajectory: of the candidate that was driven.
        free: of the candidate without a line.
        choice: of the candidate that was driven among all.
    """

    PLACE = "planner.loss_scales"

    trajectory: Weight
    free: Weight
    choice: Weight


@dataclass(frozen=True)
class ImitationSettings(Section):
    """All that the planner's trainer reads.

    Attributes:
        batch_size: rows of an update.
        lr: learning rate.
        weight_decay: times lr, the share of every matrix that an update takes away.
        grad_clip: the largest norm of the gradient.
        valid_rows: of the logs that validate, spread over them; 0: all.
    """

    RENAMED: ClassVar = {name: f"planner.{name}" for name in ("lr", "weight_decay", "grad_clip", "valid_rows")}

    batch_size: Count
    lr: LearningRate
    weight_decay: Weight
    grad_clip: GradientLimit
    valid_rows: NotNegative
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    network: NetworkSettings
    scales: ImitationScales
