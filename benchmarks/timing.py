"""Time by two clocks, the floating-point operations of a piece of work, and how many of them a device can make."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Rows of the square matrices that are multiplied to find a device's peak.
PEAK_ROWS = {"cpu": 2048, "cuda": 8192}
PEAK_PRODUCTS = 5


@dataclass(frozen=True)
class Seconds:
    """Time that has passed: on the wall, and of the processor on all threads of this process.

    Where other programs share the cores, the latter says more of the work. It says nothing of a GPU's work.
    """

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.processor - other.processor)

    def __truediv__(self, times: float) -> Seconds:
        return Seconds(self.wall / times, self.processor / times)

    def of_work(self, device: torch.device) -> float:
        """What the device has worked for, as well as this process can tell."""
        return self.wall if device.type == "cuda" else self.processor


def now(device: torch.device) -> Seconds:
    """Both clocks, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


class PhaseTimer:
    """How long the phases of a piece of work take. A phase within another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, Seconds] = {}
        # For each phase that has begun, what the phases within it have taken.
        self._within: list[Seconds] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is that phase's."""
        self.seconds.setdefault(phase, Seconds())

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = now(self.device)
            self._within.append(Seconds())
            try:
                return function(*args, **kwargs)
            finally:
                whole = now(self.device) - begin
                self.seconds[phase] += whole - self._within.pop()
                if self._within:
                    self._within[-1] += whole

        return call


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention in a piece of work, as it is written."""
    # PyTorch does not count a CPU's fused attention.
    cpu_attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    # Kernels that were compiled show no operators. Where nothing was, its compiler need not be imported.
    compiled = "torch._dynamo" in sys.modules
    with (
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter,
    ):
        work()
    return counter.get_total_flops()


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of large matrix products of that type: the best of a few."""
    rows = PEAK_ROWS["cuda" if device.type == "cuda" else "cpu"]
    left, right = torch.randn(2, rows, rows, device=device).to(dtype)
    seconds = []
    for _ in range(1 + PEAK_PRODUCTS):
        begin = now(device)
        left @ right
        seconds.append((now(device) - begin).of_work(device))
    # The first one prepares.
    return 2 * rows**3 / min(seconds[1:])


def most_memory(device: torch.device) -> dict[str, float]:
    """The most megabytes that this process has had at once: of the host, and on a GPU of the device."""
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) / 1e6
    return found


def name_of(device: torch.device) -> str:
    """What the device is sold as."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
