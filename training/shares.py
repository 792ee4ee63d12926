"""What each of several ranks has of a run: its share of environments, replay and batch."""

from __future__ import annotations

from config import Config, ConfigError
from system.ranks import Ranks
from training.sources import Collected, Gathered, Logged, Recorded, Source

# What the ranks of a run share, each of them the same part; and what one process alone can do, with its other value.
SHARED_KEYS = ("envs", "replay_capacity", "batch_size")
ALONE = {"compile": "none", "imag_teacher": 0.0, "curriculum": (), "log_regret": False}


def share_of(config: Config, ranks: Ranks) -> Config:
    """The config of one rank's share: of environments, replay and batch, which a run's config gives for all together.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if ranks.count == 1:
        return config
    return config.replace(**{key: ranks.share(config[key], key) for key in SHARED_KEYS})


def require_for_ranks(config: Config, source: Source, ranks: Ranks) -> None:
    """Check that a run of several ranks asks for nothing that one process alone can do.

    Raises:
        ConfigError: it does.
    """
    if ranks.count == 1:
        return
    if not isinstance(source, (Collected, Logged)) or isinstance(source, (Recorded, Gathered)):
        raise ConfigError("several ranks learn from environments or from a log of trips; start this without torchrun")
    for key, value in ALONE.items():
        if config[key] != value:
            raise ConfigError(
                f"{key} is {config[key]}; several ranks need it at {value}, or start this without torchrun"
            )
