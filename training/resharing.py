"""What each rank takes of a checkpoint: what it saved itself, or its share where there were more ranks or fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from system.ranks import Ranks, here
from training.collecting import replay_folder
from training.replay import Replay

RANKS = "ranks"
# What is counted over all environments of a rank, rather than the same on all ranks.
COUNTS = ("decisions",)


def of_rank(state: Mapping[str, Any], ranks: Ranks, generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """A checkpoint as if this rank alone had saved it.

    Where there were as many ranks, all is as it was. Where there were others, environments are shared out anew, with
    all that is stored of them, and what they had not finished goes on wherever it can be taken up.

    Args:
        state: of all ranks.
        ranks: this one among those that go on.
        generators: of this rank, as they begin; those that it has saved go on.
    """
    saved: list[Mapping[str, Any]] = [state, *state.get(RANKS, [])]
    if len(saved) == ranks.count:
        return {**state, **saved[ranks.index]}
    own = {**state}
    if ranks.index >= len(saved):
        own |= {"generators": checkpoint.generator_state(generators), "averages": {"values": {}, "counts": {}}}
    else:
        own |= {name: saved[ranks.index][name] for name in ("generators", "averages")}
    if "replay" in state:
        envs = sum(each["replay"]["num_envs"] for each in saved)
        rows = slice(ranks.index * envs // ranks.count, (ranks.index + 1) * envs // ranks.count)
        for name in ("row", "acting", "episode_return", "env"):
            own[name] = _shared([each[name] for each in saved], rows)
        own["any_first"] = any(each["any_first"] for each in saved)
        own["replay"] = state["replay"]
        if "num_envs" in own["env"]:
            own["env"]["num_envs"] = rows.stop - rows.start
        for name in COUNTS:
            if name in own["env"]:
                own["env"][name] = sum(each["env"][name] for each in saved) // ranks.count
    return own


def take_replay(replay: Replay, logdir: Path, state: Mapping[str, Any]) -> None:
    """Take in what this rank has stored, or its share of what all have.

    Args:
        replay: of this rank, empty.
        logdir: of the run.
        state: the checkpoint of all ranks.

    Raises:
        CheckpointError: it does not fit.
    """
    ranks = here()
    saved = [state["replay"], *(each["replay"] for each in state.get(RANKS, []))]
    if len(saved) == ranks.count:
        replay.load_chunks(replay_folder(logdir, ranks.index), saved[ranks.index])
        return
    if sum(manifest["num_envs"] for manifest in saved) != replay.num_envs * ranks.count:
        have = sum(manifest["num_envs"] for manifest in saved)
        raise CheckpointError(
            f"replay was saved with {have} environments, this run has {replay.num_envs * ranks.count}; give the same"
            " envs, or take the weights only, with --init"
        )
    shares = [(replay_folder(logdir, rank), manifest) for rank, manifest in enumerate(saved)]
    replay.load_shares(shares, first=ranks.index * replay.num_envs)


def _shared(parts: Sequence[Any], rows: slice) -> Any:
    """Rows of what several ranks have: of tensors and lists that have an entry for each of their environments."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _shared([part[name] for part in parts if name in part], rows) for name in first}
    if isinstance(first, Tensor) and first.dim():
        return torch.cat(list(parts))[rows]
    if isinstance(first, list):
        return [entry for part in parts for entry in part][rows]
    return first
