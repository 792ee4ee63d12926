"""What tests of groups of samples share: a trainer too small to learn anything."""

from typing import Any

import torch

from benchmarks.flags import CONFIGS
from config import load
from groups.tours import TourSampler
from grpo import GRPO
from guard import Guard
from training.devices import make_generators
from training.setup import make_setup

CPU = torch.device("cpu")


def trainer(*sections: str, **changes: Any) -> GRPO:
    """A trainer of the section `grpo` and more, made small by `debug`."""
    names = ["grpo", *sections, "debug"]
    settings = load(CONFIGS, names, {key: str(value) for key, value in changes.items()})
    generators = make_generators(settings.seed, CPU)
    return GRPO.of(make_setup(settings, CPU).task, settings, device=CPU, generators=generators, guard=Guard(CPU))


def tour_sampler(**changes: Any) -> TourSampler:
    """Its policy that plays tours."""
    sampler = trainer(**changes).sampler
    assert isinstance(sampler, TourSampler)
    return sampler
