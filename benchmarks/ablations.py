"""What the choices cost: TSP-20 from 24,000 env steps with one choice changed at a time.

    python -m benchmarks.ablations logdir/ablations

runs every variant that has not ended yet, one after the other, and prints the table. All have the same env steps,
updates and seed; `leak` spreads the uniform share over illegal actions too, which no setting can do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import dreamer
from parts import actors
from system.terminal import Parser
from tools import OneHotDist

BASE = ["--configs", "tsp_few_steps", "--train_ratio", "33.6"]
WITH_LATENT = ["--actor.pointer.latent", "8", "--model_every", "4"]
VARIANTS = {
    "base": [],
    "latent in the actor": WITH_LATENT,
    "simulated cost": ["--imag_reward", "simulated"],
    "mean_abs scaling": ["--actor.advantage_scale", "mean_abs"],
    "critic": ["--baseline", "critic"],
    "unimix": ["--actor.unimix", "0.01"],
    "leak": ["--actor.unimix", "0.01"],
    "dynamics gradient": ["--imag_gradient", "dynamics"],
    "predicted mask": [*WITH_LATENT, "--imag_mask", "predicted"],
    "predicted mask, penalty 2": [*WITH_LATENT, "--imag_mask", "predicted", "--imag_penalty", "2.0"],
}


class LeakingDist(OneHotDist):
    """The ancestor's mistake: the uniform share goes to all actions, after the mask."""

    def __init__(self, logits: Tensor, *, mask: Tensor | None = None, unimix: float = 0.0) -> None:
        masked = OneHotDist(logits, mask=mask)
        leaked = (1 - unimix) * masked.probs + unimix / logits.shape[-1]
        super().__init__(leaked.log())


def run(name: str, logdir: Path) -> None:
    """Train one variant."""
    if name == "leak":
        actors.OneHotDist = LeakingDist  # type: ignore[misc]
    dreamer.main([*BASE, *VARIANTS[name], "--logdir", str(logdir)])


def main(root: Path) -> None:
    """Train what is missing, and print the table."""
    print("| variant | gap on the test set, % | illegal imagined actions, % | entropy | minutes |")
    print("|---|---|---|---|---|")
    for name in VARIANTS:
        logdir = root / name.replace(" ", "_").replace(",", "")
        if not _ended(logdir):
            command = [sys.executable, "-m", "benchmarks.ablations", str(logdir), name]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
        trained = next(row for row in reversed(rows) if "miss_rate" in row)
        misses = [row["miss_rate"] for row in rows if "miss_rate" in row]
        print(
            f"| {name} | {rows[-1]['eval_gap']:.2f} | {100 * sum(misses) / len(misses):.3f} |"
            f" {trained['actor_entropy']:.3f} | {rows[-1]['seconds'] / 60:.1f} |",
            flush=True,
        )


def _ended(logdir: Path) -> bool:
    metrics = logdir / "metrics.jsonl"
    return metrics.exists() and '"eval_gap"' in metrics.read_text()


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("ablations", description=__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="where the runs are, or shall be")
    parser.add_argument("variant", nargs="?", choices=VARIANTS, help="train this one alone, into DIR itself")
    return parser.parse_args(argv)


if __name__ == "__main__":
    asked = parse(sys.argv[1:])
    torch.set_num_threads(1)
    if asked.variant is not None:
        run(asked.variant, asked.root)
    else:
        main(asked.root)
