"""A small file of settings, and how tests read it."""

from __future__ import annotations

from pathlib import Path

import config
from config import CommandLine

SECTIONS = """\
# Everything that is not overlaid.
defaults:
  seed: 0
  steps: 1000
  logdir: null
  compile: false
  device: auto
  discount: 1
  imag_mask: rules
  layers: [64, 64]
  actor:
    entropy: 3e-4
    grad_clip: 1.0
    schedule: {warmup: 50, final: 0.02}

# TSP with 20 nodes,
# the default.
tsp_attn:
  steps: 2e6
  actor: {entropy: 1e-2}

debug:
  steps: 10
  actor:
    schedule: {warmup: 2}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "configs.yaml"
    path.write_text(text)
    return path


def parse(path: Path, *argv: str) -> CommandLine:
    entry_keys = {"resume": "checkpoint to go on from", "init": "checkpoint to take the weights of"}
    return config.parse_command_line(list(argv), config_path=path, description="A test.", entry_keys=entry_keys)
