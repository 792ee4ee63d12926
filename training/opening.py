"""What a run says of itself before it begins."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from settings.run import RunSettings
from training.sources import Source


def opening(
    settings: RunSettings, source: Source, *, logdir: Path, device: torch.device, step: int | None
) -> list[str]:
    """What a run says of itself before it begins: where it stands, what it learns from, what it will take.

    Args:
        settings: the run's.
        source: what it learns from.
        logdir: the run's folder.
        device: where it learns.
        step: of the checkpoint that the run goes on from; None for a new run.
    """
    machine, loop = settings.machine, settings.loop
    threads = f", {machine.threads} thread{'s' if machine.threads > 1 else ''}" if device.type == "cpu" else ""
    begins = "a new run" if step is None else f"goes on from its checkpoint at step {step:,}"
    collects = not settings.task.trips
    ends = f"to step {loop.steps:,}" if collects else f"to update {loop.updates:,}"
    facts = {
        "logdir": [f"{logdir} ({begins}, {ends})"],
        "device": [f"{device}{threads}"],
        **source.facts(settings, device),
        "curves": [f"tensorboard --logdir {shlex.quote(str(logdir.parent))}"],
    }
    if collects and loop.prefill >= loop.steps:
        facts["warning"] = [f"prefill ({loop.prefill:,}) lasts to the end: nothing is learnt; give more --steps"]
    return [
        f"{name if index == 0 else '':<8}{line}" for name, lines in facts.items() for index, line in enumerate(lines)
    ]
