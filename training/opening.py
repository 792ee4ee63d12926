"""What a run says of itself before it begins."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from settings.run import RunSettings
from system.ranks import here
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
    machine = settings.machine
    threads = f", {machine.threads} thread{'s' if machine.threads > 1 else ''}" if device.type == "cpu" else ""
    begins = "a new run" if step is None else f"goes on from its checkpoint at step {step:,}"
    ranks = f", {here().count} ranks with a share of all" if here().count > 1 else ""
    facts = {
        "logdir": [f"{logdir} ({begins}, {source.ends(settings)})"],
        "device": [f"{device}{threads}{ranks}"],
        **source.facts(settings, device),
        "curves": [settings.loop.logger or "metrics.jsonl"],
    }
    if "tensorboard" in settings.loop.logger:
        facts["curves"] = [f"tensorboard --logdir {shlex.quote(str(logdir.parent))}"]
    if warnings := source.warnings(settings):
        facts["warning"] = warnings
    return [
        f"{name if index == 0 else '':<8}{line}" for name, lines in facts.items() for index, line in enumerate(lines)
    ]
