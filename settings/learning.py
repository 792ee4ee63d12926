"""What agents have in common: how parameters are optimised, and the sizes of a pointer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from settings.sections import Between, Count, Layers, NotNegative, Section, Share, Weight

Precision = Literal["float32", "bfloat16"]
Compilation = Literal["none", "kernels", "graphs"]


@dataclass(frozen=True)
class ScheduleSettings(Section):
    """The learning rate in the course of a run."""

    PLACE = "schedule"

    warmup: NotNegative
    decay_from: Share
    final_lr: Share


@dataclass(frozen=True)
class OptimizerSettings(Section):
    """The algorithm by which parameters are updated."""

    PLACE = "optimizer"

    algorithm: Literal["adam", "laprop"]
    agc: Weight


@dataclass(frozen=True)
class PointerSettings(Section):
    """The sizes of the actor that points at nodes."""

    PLACE = "actor.pointer"

    width: Count
    layers: Layers
    heads: Count
    hidden: Count
    latent: NotNegative
    clip: Annotated[float, Between(1e-3)]
    cost_units: NotNegative
