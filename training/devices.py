"""The device that a run works on, its threads and its random numbers."""

from __future__ import annotations

import os
import textwrap
import warnings

import numpy as np
import torch

from config import Config, ConfigError
from system.memory import keep_freed_memory
from system.ranks import here

ROLES = ("environment", "acting", "replay", "model", "imagination")


def prepare_torch(config: Config) -> torch.device:
    """Threads, arithmetic and the seed of everything that has no generator of its own; the device to work on."""
    device = choose_device(config.device)
    if device.type == "cuda":
        _prepare_cuda(deterministic=config.deterministic)
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    # Denormal numbers are many times slower on a CPU, and nothing here needs them.
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    return device


def _prepare_cuda(*, deterministic: bool) -> None:
    """The arithmetic of a GPU: matrix products in TF32, and kernels that give the same numbers twice, if wanted."""
    torch.set_float32_matmul_precision("high")
    if deterministic:
        # Read by cuBLAS when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # PyTorch promises nothing of cumulative sums of floats, without which no action is drawn, so it may only warn.
        warnings.filterwarnings("ignore", message="cumsum_cuda_kernel does not have a deterministic implementation")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Where it only warns, it still takes fused kernels of attention, whose gradients differ each time.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def choose_device(name: str) -> torch.device:
    """The device that the config names; `auto` is CUDA where there is one. A CUDA device becomes the current one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None and torch.cuda.is_available():
            # Before anything else is done on a GPU: what does not say where it goes, such as an event or a library's
            # workspace, goes to the current device.
            torch.cuda.set_device(device)
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
    return {role: make_generator(seed, role, device) for role in ROLES}


def make_generator(seed: int, role: str, device: torch.device) -> torch.Generator:
    """The random generator of one role. Each rank has its own."""
    rank = here().index
    source = np.random.SeedSequence(seed, spawn_key=(len(ROLES) + rank,) if rank else ())
    child = source.spawn(len(ROLES))[ROLES.index(role)]
    return torch.Generator(device).manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
