"""The device that a run works on, its threads and its random numbers."""

from __future__ import annotations

import textwrap

import numpy as np
import torch

from config import Config, ConfigError

ROLES = ("environment", "acting", "replay", "model", "imagination")


def prepare_torch(config: Config) -> torch.device:
    """Threads, arithmetic and the seed of everything that has no generator of its own; the device to work on."""
    torch.set_num_threads(config.threads)
    # Denormal numbers are many times slower on a CPU, and nothing here needs them.
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    return choose_device(config.device)


def choose_device(name: str) -> torch.device:
    """The device that the config names; `auto` is CUDA where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # A device that exists but draws no numbers (meta) cannot be learnt on.
        torch.Generator(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch's own message fills a screen.
        cause = textwrap.shorten(str(error), 80, placeholder=" ...")
        if name.startswith("cuda") and not torch.cuda.is_available():
            cause = "PyTorch finds no CUDA"
        raise ConfigError(f"device {name!r} cannot be used here ({cause}); give --device cpu, or auto") from error
    return device


def make_generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
    """One random generator per role, so that what one of them draws changes nothing for the others."""
    children = np.random.SeedSequence(seed).spawn(len(ROLES))
    return {
        role: torch.Generator(device).manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
        for role, child in zip(ROLES, children, strict=True)
    }
