"""What memory there is, and what is said where there is too little."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from system.memory import NotEnoughMemory, is_exhausted, keep_freed_memory, memory_at_hand, require_memory

CPU = torch.device("cpu")
GROUP = "sys/fs/cgroup/jobs/mine"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing_known"),
        pytest.param({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2 kB\n"}, 2048, id="machine"),
        pytest.param(
            {
                "proc/meminfo": "MemAvailable: 2 kB\n",
                "sys/fs/cgroup/memory.max": "1500\n",
                "sys/fs/cgroup/memory.current": "1000\n",
                "sys/fs/cgroup/memory.stat": "file 300\ninactive_file 200\n",
            },
            700,
            id="container",
        ),
        pytest.param(
            {
                "proc/meminfo": "MemAvailable: 2 kB\n",
                "proc/self/cgroup": "0::/jobs/mine\n",
                f"{GROUP}/memory.max": "max\n",
                "sys/fs/cgroup/jobs/memory.max": "1500\n",
                "sys/fs/cgroup/jobs/memory.current": "1200\n",
                "sys/fs/cgroup/jobs/memory.stat": "inactive_file 0\n",
            },
            300,
            id="job_below_another",
        ),
    ],
)
def test_memory_at_hand_is_the_least_that_machine_and_groups_leave(
    files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_at_hand(tmp_path) == expected


def test_memory_at_hand_is_less_under_a_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_at_hand()
    assert before is not None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 10**8
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    after = memory_at_hand()
    assert after is not None and after <= min(before, 10**8 + 10**7)


def test_require_memory_says_how_much_is_needed_and_free() -> None:
    require_memory(1e6, device=CPU, work="this takes", remedy="take less")
    with pytest.raises(NotEnoughMemory, match=r"this takes about 1,000,000.0 GB .* are free; take less"):
        require_memory(1e15, device=CPU, work="this takes", remedy="take less")


def test_is_exhausted_knows_how_pytorch_and_python_say_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**17, device=CPU)
    assert is_exhausted(caught.value) and is_exhausted(MemoryError()) and is_exhausted(torch.OutOfMemoryError())
    assert not is_exhausted(RuntimeError("something else")) and not is_exhausted(ValueError())


def test_freed_memory_is_kept_by_a_library_that_can_and_left_alone_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, int] = {}
    library = SimpleNamespace(mallopt=lambda option, value: told.update({option: value}))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    # By glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD; it refuses more than 32 MiB for the last.
    assert told == {-1: 2**30, -2: 2**26, -3: 2**25}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_freed_memory()
