"""What a run reads whatever its agent: its task, its environments, its loop, its evaluations and its machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from settings.environment import TASK_PREFIXES, WrapperSettings
from settings.sections import Between, Count, NotNegative, Section, Weight
from system.errors import ConfigError

# The cost of a move where nothing else is asked for.
PLAIN_COST = "euclidean"
# The field's test sets have 10,000.
Instances = Annotated[int, Between(1, 1_000_000)]


@dataclass(frozen=True)
class MachineSettings(Section):
    """Where a run is computed, and from which seed."""

    logdir: str | None
    seed: Annotated[int, Between(0, 2**63 - 1)]
    device: str
    replay_device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Between(1, 4096)]
    deterministic: bool


@dataclass(frozen=True)
class TaskSettings(Section):
    """What is to be solved."""

    RENAMED: ClassVar = {"imports": "import"}

    task: str
    imports: str
    context: Literal["none", "dynamics_map"]
    nodes: int
    layout: str
    curriculum: tuple[tuple[int, int | None], ...]
    cost: str
    cost_shown: str
    streets: str
    trips: str
    places: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trips and self.curriculum:
            raise ConfigError("curriculum is for instances that are walked; a log of trips needs none")
        if self.places and not self.trips:
            raise ConfigError("places says where the places of a log lie: add --trips FILE")

    @property
    def is_gym(self) -> bool:
        """Whether the task is a gymnasium environment, those of suites among them."""
        return self.task.startswith(TASK_PREFIXES)

    @property
    def knows_costs(self) -> bool:
        """Whether the config names what moves cost; otherwise a log is all that is known of it."""
        return not self.trips or self.cost != PLAIN_COST


@dataclass(frozen=True)
class EnvironmentSettings(Section):
    """The environments that are stepped together."""

    RENAMED: ClassVar = {"processes": "env_processes", "timeout": "env_timeout", "restarts": "env_restarts"}

    envs: Count
    processes: bool
    timeout: Weight
    restarts: NotNegative


@dataclass(frozen=True)
class EvaluationSettings(Section):
    """On what the agent is evaluated."""

    valid_instances: Instances
    eval_instances: Instances
    valid_episodes: Count
    eval_episodes: NotNegative
    eval_env: Literal["own", "training"]
    eval_by: Literal["policy", "plan", "both"]
    plan_instances: Instances

    @property
    def players(self) -> tuple[str, ...]:
        """The ways of playing that are evaluated, by the names that agents give them."""
        return ("policy", "plan") if self.eval_by == "both" else (self.eval_by,)

    def require_episodes(self) -> None:
        """Raise a ConfigError where the final evaluation is of nothing."""
        Between(1).require("eval_episodes", self.eval_episodes)


@dataclass(frozen=True)
class ObservationSettings(Section):
    """How gymnasium observations are read.

    Attributes:
        encode_keys: a regular expression: keys that the world model sees.
        decode_keys: likewise: keys that it predicts.
        zero_keys: likewise: keys whose entries that are not finite are set to 0.
        drop_keys: likewise: keys with which such entries end the episode.
    """

    RENAMED: ClassVar = {
        **{name: f"model.{name}" for name in ("encode_keys", "decode_keys")},
        **{name: f"guard.{name}" for name in ("zero_keys", "drop_keys")},
    }

    encode_keys: str
    decode_keys: str
    zero_keys: str
    drop_keys: str


@dataclass(frozen=True)
class LoopSettings(Section):
    """What the training loop itself obeys."""

    steps: NotNegative
    updates: NotNegative
    replay: str
    prefill: NotNegative
    prefill_policy: Literal["random", "nearest"]
    act: Literal["policy", "plan"]
    train_ratio: Weight
    reward_scale: Annotated[float, Between(1e-12, 1e12)]
    logger: str
    log_every: Count
    log_regret: bool
    eval_every: NotNegative
    checkpoint_every: Count
    checkpoint_numbered: bool
    replay_capacity: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps and not self.replay:
            raise ConfigError("steps is 0; it must be at least 1, or add --replay FOLDER to learn from episodes alone")
        if self.replay and not self.steps + self.updates:
            raise ConfigError("steps and updates are both 0, and nothing would be done; give one of them")

    @property
    def offline(self) -> int:
        """Updates on recorded episodes alone, before any env step."""
        return self.updates if self.replay else 0


@dataclass(frozen=True)
class GuardSettings(Section):
    """What happens to values that are not finite.

    Attributes:
        enabled: whether non-finite updates are skipped and rolled back at all; off only to show what happens then.
        max_skips: skipped updates in a row after which the last good state is taken up again.
        snapshot_every: updates between two looks at parameters and moments, and between two good states kept.
        max_rollbacks: returns to the same good state after which training stops.
        recovery: updates at half the learning rate after each return.
    """

    PLACE = "guard"

    enabled: bool = True
    max_skips: Count = 10
    snapshot_every: Count = 100
    max_rollbacks: NotNegative = 5
    recovery: NotNegative = 200


@dataclass(frozen=True)
class RunSettings(Section):
    """All that a run reads whatever its agent."""

    machine: MachineSettings
    task: TaskSettings
    environments: EnvironmentSettings
    wrappers: WrapperSettings
    evaluation: EvaluationSettings
    observations: ObservationSettings
    loop: LoopSettings
    guard: GuardSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrappers.reward_clip and self.evaluation.eval_env != "own":
            raise ConfigError("env.reward_clip is for training alone, and needs eval_env: own")
        if self.task.trips and self.loop.replay:
            raise ConfigError("trips and replay are two things to learn from; give one of them")
        if self.task.trips and not self.loop.updates:
            raise ConfigError("updates is 0; a log of trips is learnt from by 1 at least")
        if self.task.trips and self.loop.reward_scale != 1:
            scale = self.loop.reward_scale
            raise ConfigError(f"reward_scale is {scale:g}; a log of trips is learnt as it is, and needs it at 1")
