"""What the benchmarks' tests share: an agent too small to learn anything."""

import torch

from benchmarks.flags import CONFIGS
from config import load
from dreamer import Dreamer
from guard import Guard
from training.devices import make_generators
from training.setup import make_task

CPU = torch.device("cpu")


def small_agent() -> Dreamer:
    settings = load(CONFIGS, ["debug"], {"actor.pointer.latent": "0"})
    return Dreamer.of(make_task(settings), settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
