"""Which keys only one family of tasks reads: routing, or gymnasium environments."""

from __future__ import annotations

from collections.abc import Mapping

from settings.environment import TASK_PREFIXES
from settings.language import TEXT
from system.errors import ConfigError

# Keys, and sections of keys. Those that a section for both families may set are no mistake in either.
ROUTING_KEYS = (
    *("nodes", "layout", "curriculum", "cost", "cost_shown", "streets", "trips", "places", "log_regret"),
    *("valid_instances", "eval_instances", "plan_instances", "reward_updates", "plan", "teacher", "prefill_policy"),
    *("imag_teacher", "imag_start", "imag_generated", "imag_nodes", "imag_first", "imag_penalty", "imag_augment"),
    *("model.encoder", "model.move_units", "model.move_layers", "model.move_heads", "model.move_waves"),
    *("model.move_error", "model.place_units", "model.belief", "model.show_moves", "model.reward_latent"),
    *("model.current_pos", "model.loss_scales.current_node", "model.loss_scales.current_pos"),
    *("model.loss_scales.coords", "actor.pointer", "critic.latent", "critic.share"),
)
GYM_KEYS = (
    *("import", "context", "env", "env_processes", "env_timeout", "env_restarts", "valid_episodes", "eval_episodes"),
    *("eval_env", "model.encode_keys", "model.decode_keys"),
    *(
        "model.loss_scales.decoder",
        "model.loss_scales.motion",
        "model.decoder_scales",
        "replay_online",
        "imag_imitation",
        "imag_contacts",
    ),
)


def require_read(task: str, given: Mapping[str, str]) -> None:
    """Check that a task reads the keys that are given for it.

    Args:
        task: the key `task`; prompts (`text`) have a program of their own, which refuses keys itself.
        given: where each key comes from, such as `command line`.

    Raises:
        ConfigError: a key is for another family of tasks.
    """
    if task == TEXT:
        return
    others, family = (
        (ROUTING_KEYS, "routing") if task.startswith(TASK_PREFIXES) else (GYM_KEYS, "gymnasium environments")
    )
    for key, place in given.items():
        if any(key == other or key.startswith(f"{other}.") for other in others):
            raise ConfigError(f"{place}: {key} is for {family}, and {task} does not read it: leave it out")
