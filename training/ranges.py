"""What the keys of a run may be, whoever learns."""

from __future__ import annotations

import math

from envs.dynamics_map import CONTEXTS
from training.setup import TRAINING_ENV

CHOICES = {"prefill_policy": ("random", "nearest"), "context": CONTEXTS, "eval_env": ("own", TRAINING_ENV)}
RANGES = {
    **dict.fromkeys(("steps", "log_every", "checkpoint_every"), (1, math.inf)),
    "envs": (1, math.inf),
    "threads": (1, 4096),
    # The field's test sets have 10,000.
    **dict.fromkeys(("valid_instances", "eval_instances"), (1, 1_000_000)),
    "valid_episodes": (1, math.inf),
    **dict.fromkeys(("eval_every", "eval_episodes", "env_timeout", "env_restarts"), (0, math.inf)),
    **dict.fromkeys(("prefill", "train_ratio", "guard.max_rollbacks", "guard.recovery"), (0, math.inf)),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("guard.max_skips", "guard.snapshot_every"), (1, math.inf)),
    "reward_scale": (1e-12, 1e12),
}
