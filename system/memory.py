"""How much memory there is for a piece of work, asked before the work begins, and how freed memory is kept."""

from __future__ import annotations

import ctypes
import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

from system.errors import UserError

# Options of mallopt, by their numbers in glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


class NotEnoughMemory(UserError):
    """Work needs more memory than there is. The message is one line: how much, and what would do."""


def require_memory(needed: int | float, *, device: torch.device, work: str, remedy: str) -> None:
    """Check that there are so many bytes.

    Args:
        needed: by an estimate.
        device: where.
        work: what needs them, with its verb.
        remedy: what would do instead.

    Raises:
        NotEnoughMemory: there are fewer.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{work} about {readable_bytes(needed)} of memory, and {readable_bytes(free)} are free; {remedy}"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take of a device's memory; None where nothing says so."""
    if device.type != "cuda":
        return memory_at_hand()
    # PyTorch keeps what it has freed, and uses it again.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left."""
    # Without a GPU, PyTorch raises a plain RuntimeError, and another for a size that no address reaches.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate memory", "overflowed"))
    )


def readable_bytes(count: float | int) -> str:
    """Such as 12.3 kB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def memory_at_hand(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take of the machine's memory, or of what it, its container or job is allowed.

    Args:
        root: where `proc` and `sys` are. None comes of a system that has none.
    """
    found = []
    with suppress(OSError):
        found += re.findall(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    left = [1024 * int(kilobytes) for kilobytes in found]
    groups = [root / "sys/fs/cgroup"]
    with suppress(OSError, IndexError):
        own = re.findall(r"^0::/(.+)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)[0]
        groups += [groups[0] / part for part in (own, *map(str, Path(own).parents))]
    for group in groups:
        # A group without a limit says "max", or has no such file.
        with suppress(OSError, ValueError):
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = re.findall(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            left.append(max(0, limit - used + sum(map(int, cached))))
    # `ulimit -v` limits all memory of the process; what is taken already is subtracted.
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError, IndexError):
            pages = int((root / "proc/self/statm").read_text().split()[0])
            left.append(max(0, most - pages * resource.getpagesize()))
    return min(left, default=None)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next array, instead of handing it back to the system.

    An update allocates and frees the same arrays of some megabytes again and again. By default each of them is mapped
    anew, and the system fills it with zeros page by page: a tenth of an update on a CPU. The largest threshold that
    glibc takes is 32 MiB. Another C library is left as it is.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((TRIM_THRESHOLD, 2**30), (TOP_PAD, 2**26), (MMAP_THRESHOLD, 2**25)):
            mallopt(option, value)
