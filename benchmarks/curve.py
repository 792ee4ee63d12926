"""The curve of some runs as a table: gap against env steps or minutes, mean and range over the seeds.

    python -m benchmarks.curve steps 8000 16000 24000 -- logdir/few/*
    python -m benchmarks.curve minutes 1 5 15 30 -- logdir/attn/*

Each cell is the last validation gap at or before the mark, or up to 1 % behind it, since environments step together.
The final line gives the test set's gap of each run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path


def read(logdir: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def gap_at(rows: Sequence[dict[str, float]], axis: str, mark: float) -> float | None:
    """The last validation gap at or before `mark` env steps or minutes; None if the run ended well before it."""
    position = {"steps": lambda row: row["step"], "minutes": lambda row: row["seconds"] / 60}[axis]
    if position(rows[-1]) < 0.98 * mark:
        return None
    gaps = [row["valid_gap"] for row in rows if "valid_gap" in row and position(row) <= 1.01 * mark]
    return gaps[-1] if gaps else None


def cell(gaps: Sequence[float]) -> str:
    """Mean and range."""
    if not gaps:
        return "-"
    mean = f"{statistics.mean(gaps):.2f}"
    return mean if len(gaps) == 1 else f"{mean} ({min(gaps):.2f} to {max(gaps):.2f})"


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    split = argv.index("--")
    axis, marks, logdirs = argv[0], [float(mark) for mark in argv[1:split]], [Path(path) for path in argv[split + 1 :]]
    runs = [read(logdir) for logdir in logdirs]
    print(f"| {axis} | validation gap, %, {len(runs)} seeds |")
    print("|---|---|")
    for mark in marks:
        print(f"| {mark:g} | {cell([gap for run in runs if (gap := gap_at(run, axis, mark)) is not None])} |")
    finals = [run[-1]["eval_gap"] for run in runs if "eval_gap" in run[-1]]
    each = ", ".join(f"{gap:.2f}" for gap in finals)
    print(f"\nTest set: {cell(finals)} % ({each})")


if __name__ == "__main__":
    main(sys.argv[1:])
