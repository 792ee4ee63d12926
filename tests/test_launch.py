"""What is looked at, and said, before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

import launch
from tests.run_scenes import COMMAND, STEPS
from tests.scenes import debug_config, refusal


def test_replay_that_memory_cannot_hold_is_refused_before_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "memory_at_hand", lambda: 20_000)
    line = refusal(capsys, *COMMAND, "--logdir", str(tmp_path / "run"))
    assert f"{STEPS} rows" in line and "20 kB" in line and "--replay_capacity" in line
    assert not (tmp_path / "run").exists()


def test_replay_holds_no_more_rows_than_a_run_has_steps_and_memory_is_asked_for_those() -> None:
    config = debug_config(steps=500, replay_capacity=10**6)
    assert launch.rows_when_full(config) == 500
    assert launch.rows_when_full(config.replace(replay_capacity=400)) == 400


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
    assert launch.memory_at_hand(tmp_path) == expected
