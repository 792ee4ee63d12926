"""What a run says of itself before it begins."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from envs.tasks import ObservationTask, Task
from parts.observations import readings
from settings.run import RunSettings
from system.memory import readable_bytes
from training.replay import REWARD_AND_ENDS, Replay
from training.replay_room import rows_when_full


def opening(
    settings: RunSettings, task: Task, replay: Replay, *, logdir: Path, device: torch.device, step: int | None
) -> list[str]:
    """What a run says of itself before it begins: where it stands, what it reads, what it will take.

    Args:
        settings: the run's.
        task: what is to be solved.
        replay: what has been lived through.
        logdir: the run's folder.
        device: where it learns.
        step: of the checkpoint that the run goes on from; None for a new run.
    """
    machine, observations, loop = settings.machine, settings.observations, settings.loop
    if isinstance(task, ObservationTask):
        seen = readings(task, encode_keys=observations.encode_keys, decode_keys=observations.decode_keys)
    else:
        shown = sorted({*replay.rows} - {*REWARD_AND_ENDS})
        seen = [f"{settings.task.task} of {settings.task.nodes} nodes: {', '.join(shown)}"]
    # Only a CPU gives memory as it is written to.
    rows, taken = rows_when_full(settings), "when full, taken as it fills"
    if replay.device != device:
        taken += ", in the host's memory"
    if replay.device.type != "cpu":
        rows, taken = replay.length * replay.num_envs, "taken at once"
    held = f", of which {len(replay):,} are there" if len(replay) else ""
    size = f"{readable_bytes(rows * replay.row_bytes)} {taken}"
    threads = f", {machine.threads} thread{'s' if machine.threads > 1 else ''}" if device.type == "cpu" else ""
    begins = "a new run" if step is None else f"goes on from its checkpoint at step {step:,}"
    facts = {
        "logdir": [f"{logdir} ({begins}, to step {loop.steps:,})"],
        "device": [f"{device}{threads}"],
        "sees": seen,
        "replay": [f"{rows:,} rows of {readable_bytes(replay.row_bytes)}{held}; {size}"],
        "curves": [f"tensorboard --logdir {shlex.quote(str(logdir.parent))}"],
    }
    if loop.prefill >= loop.steps:
        facts["warning"] = [f"prefill ({loop.prefill:,}) lasts to the end: nothing is learnt; give more --steps"]
    return [
        f"{name if index == 0 else '':<8}{line}" for name, lines in facts.items() for index, line in enumerate(lines)
    ]
