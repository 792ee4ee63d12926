"""What SAC reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from settings.learning import OptimizerSettings, PointerSettings, Precision, ScheduleSettings
from settings.sections import Between, Bins, Count, GradientLimit, Layers, LearningRate, Section, Share

Alpha = Annotated[float, Between(1e-6, 1e6)]


@dataclass(frozen=True)
class InitialAlpha(Section):
    """Where the temperature begins, by critic."""

    PLACE = "sac.initial_alpha"

    mse: Alpha
    symlog_disc: Alpha


@dataclass(frozen=True)
class SoftSettings(Section):
    """Policy, Q functions and temperature."""

    PLACE = "sac"

    critic: Literal["mse", "symlog_disc"]
    units: Count
    layers: Layers
    depth: Count
    bins: Bins
    lr: LearningRate
    tau: Share
    initial_alpha: InitialAlpha
    max_grad_norm: GradientLimit
    entropy_share: Share

    @property
    def alpha(self) -> float:
        """Where the temperature begins under the critic that is chosen."""
        return self.initial_alpha.mse if self.critic == "mse" else self.initial_alpha.symlog_disc


@dataclass(frozen=True)
class SACSettings(Section):
    """All that SAC reads."""

    RENAMED: ClassVar = {"encode_keys": "model.encode_keys"}

    task: str
    encode_keys: str
    batch_size: Count
    discount: Share
    precision: Precision
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    sac: SoftSettings
    pointer: PointerSettings
