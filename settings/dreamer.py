"""What the Dreamer reads: world model, actor, critic, imagination, and how it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from settings.imagination import ImaginationSettings
from settings.learning import Compilation, OptimizerSettings, PointerSettings, Precision, ScheduleSettings
from settings.planning import PlanSettings, TeacherSettings
from settings.sections import (
    Between,
    Bins,
    Count,
    GradientLimit,
    Layers,
    LearningRate,
    NotNegative,
    Section,
    Share,
    Weight,
)
from system.errors import ConfigError


@dataclass(frozen=True)
class RSSMSettings(Section):
    """The recurrent state-space model."""

    PLACE = "model.rssm"

    cell: Literal["block", "joint", "dense"]
    deter: Count
    stoch: Count
    classes: Count
    hidden: Count
    blocks: Count
    unimix: Share


@dataclass(frozen=True)
class EncoderSettings(Section):
    """The world model's encoder of nodes."""

    PLACE = "model.encoder"

    width: Count
    layers: Layers
    heads: Count


@dataclass(frozen=True)
class LossScales(Section):
    """How much each loss of the world model counts; a head whose scale is 0 is not built."""

    PLACE = "model.loss_scales"

    dyn: float
    rep: float
    reward: float
    cont: float
    mask: float
    current_node: float
    current_pos: float
    coords: float
    decoder: float
    motion: float


@dataclass(frozen=True)
class DecoderScales(Section):
    """How much the decoder's loss of a key counts in `loss_scales.decoder`, by the kind of the key."""

    PLACE = "model.decoder_scales"

    vector: Weight
    set: Weight
    image: Weight
    classes: Weight
    validity: Weight


@dataclass(frozen=True)
class ModelSettings(Section):
    """The world model."""

    PLACE = "model"

    norm: Literal["rms", "layer"]
    initialisation: Literal["torch", "published"]
    rssm: RSSMSettings
    encoder: EncoderSettings
    encode_keys: str
    decode_keys: str
    depth: Count
    units: Count
    layers: Layers
    move_units: Count
    move_layers: Layers
    move_heads: Annotated[int, Between(1, 100)]
    move_waves: Annotated[int, Between(0, 20)]
    place_units: Count
    move_error: Literal["squared", "absolute"]
    belief: bool
    show_moves: bool
    reward_latent: bool
    bins: Bins
    free_nats: Weight
    current_pos: Literal["coords", "node"]
    loss_scales: LossScales
    decoder_scales: DecoderScales
    lr: LearningRate
    weight_decay: Weight
    grad_clip: GradientLimit


@dataclass(frozen=True)
class ActorSettings(Section):
    """The actor, and what its loss adds to advantages."""

    PLACE = "actor"

    type: Literal["tsp_pointer", "masked", "candidates"]
    pointer: PointerSettings
    units: Count
    layers: Layers
    unimix: Share
    entropy: Weight
    entropy_final: Weight
    advantage_scale: Literal["percentile", "mean_abs", "none"]
    advantage_floor: Annotated[float, Between(1e-8)]
    lr: LearningRate
    grad_clip: GradientLimit


@dataclass(frozen=True)
class CriticSettings(Section):
    """The critic, and what it learns from."""

    PLACE = "critic"

    latent: bool
    units: Count
    layers: Layers
    bins: Bins
    share: Share
    slow_rate: Share
    slow_scale: Weight
    replay_scale: Weight
    lr: LearningRate
    grad_clip: GradientLimit


@dataclass(frozen=True)
class ExploreSettings(Section):
    """What is not known yet as a reward in imagination."""

    PLACE = "explore"

    scale: Weight
    members: Annotated[int, Between(2, 100)]
    units: Count
    layers: Layers
    lr: LearningRate


@dataclass(frozen=True)
class DreamerSettings(Section):
    """All that the Dreamer reads."""

    batch_size: Count
    batch_length: Annotated[int, Between(2)]
    model_every: Count
    reward_updates: NotNegative
    reward_scale: float
    replay_context: bool
    replay_online: bool
    precision: Precision
    compile: Compilation
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    imagination: ImaginationSettings
    plan: PlanSettings
    teacher: TeacherSettings
    model: ModelSettings
    actor: ActorSettings
    critic: CriticSettings
    explore: ExploreSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.imagination.reward != "head" and self.reward_scale != 1:
            reward = self.imagination.reward
            raise ConfigError(f"reward_scale is {self.reward_scale:g}; imag_reward {reward} needs it at 1")
        if self.imagination.reward == "head" and not self.model.loss_scales.reward:
            raise ConfigError("imag_reward: head needs the reward head: set model.loss_scales.reward above 0")
        if self.imagination.contacts and self.reward_scale != 1:
            raise ConfigError(
                f"reward_scale is {self.reward_scale:g}; imag_contacts cost what they cost in Drive-v0, and need it"
                " at 1"
            )
        if self.imagination.nodes and self.compile != "none":
            raise ConfigError(
                f"compile is {self.compile}, which wants maps of one size; with imag_nodes it needs compile: none"
            )
        self.plan.require_spread(self.model.move_heads)
