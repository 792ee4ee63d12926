"""What the choices cost: TSP-20 from 24,000 env steps with one choice changed at a time.

    python -m benchmarks.ablations logdir/ablations
    python -m benchmarks.ablations logdir/notes --set notes --seeds 3

runs every variant that has not ended yet, one after the other, and prints the table. All of a set have the same env
steps; those of `choices` the same updates, too. `leak` spreads the uniform share over illegal actions, which no setting
can do. The set `notes` asks what is often tried first: other heads and losses of the world model (with a latent that
the actor reads, since they would change nothing otherwise), another gradient, a curriculum, other entropies, prefills.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import dreamer
import grpo
from parts import actors
from routing.rules import Instance, State
from system.terminal import Parser
from tools import OneHotDist

FEW_STEPS = ("--configs", "tsp_few_steps", "--train_ratio", "33.6")
CRITIC = ("--configs", "tsp_critic", "--steps", "24000")
WITH_LATENT = ("--actor.pointer.latent", "8", "--model_every", "4")
EVALUATIONS = ("--eval_every", "0")


class Variant(NamedTuple):
    """One run: its options over those of its base, and the program that makes it."""

    options: tuple[str, ...] = ()
    base: tuple[str, ...] = FEW_STEPS
    program: str = "dreamer"


def scales(**values: float) -> tuple[str, ...]:
    """Options that set how much losses of the world model count, for an actor that reads its latent."""
    return WITH_LATENT + tuple(
        part for name, value in values.items() for part in (f"--model.loss_scales.{name}", str(value))
    )


LEAK = "leak"
CHOICES = {
    "base": Variant(),
    "latent in the actor": Variant(WITH_LATENT),
    "simulated cost": Variant(("--imag_reward", "simulated")),
    "mean_abs scaling": Variant(("--actor.advantage_scale", "mean_abs")),
    "critic": Variant(("--baseline", "critic")),
    "unimix": Variant(("--actor.unimix", "0.01")),
    LEAK: Variant(("--actor.unimix", "0.01")),
    "dynamics gradient": Variant(("--imag_gradient", "dynamics")),
    "predicted mask": Variant((*WITH_LATENT, "--imag_mask", "predicted")),
    "predicted mask, penalty 2": Variant((*WITH_LATENT, "--imag_mask", "predicted", "--imag_penalty", "2.0")),
}
NOTES = {
    "as it is": Variant(),
    "latent in the actor": Variant(WITH_LATENT),
    "current position predicted as a node": Variant((*scales(current_pos=1.0), "--model.current_pos", "node")),
    "current position predicted as coordinates": Variant(scales(current_pos=1.0)),
    "gradient through the dynamics": Variant(("--imag_gradient", "dynamics")),
    "curriculum of 5, 10 and 20 nodes": Variant(("--curriculum", "[[5, 4000], [10, 8000], [20, null]]")),
    "own reward function": Variant(("--imag_reward", "benchmarks.ablations:own_reward")),
    "PPO with a pointer, no model": Variant(
        ("--steps", "24000", "--groups.prompts", "2", "--log_every", "2000"), ("--configs", "ppo_tsp"), "grpo"
    ),
    "coordinates predicted, too": Variant(scales(coords=1.0)),
    "current node not predicted": Variant(scales(current_node=0.0)),
    "mask's loss times 2": Variant(scales(mask=2.0)),
    "4 environments, batches of 32": Variant(("--envs", "4", "--batch_size", "32")),
    "32 environments": Variant(("--envs", "32")),
    "32 environments, prefill of 1,000": Variant(("--envs", "32", "--prefill", "1000")),
    "prefill by the nearest node": Variant(("--prefill_policy", "nearest")),
    "critic": Variant((), CRITIC),
    "critic, entropy 1e-2, gradients up to 10": Variant(("--actor.entropy", "1e-2", "--actor.grad_clip", "10"), CRITIC),
    "critic, entropy 3e-2, gradients up to 10": Variant(("--actor.entropy", "3e-2", "--actor.grad_clip", "10"), CRITIC),
}
SETS = {"choices": CHOICES, "notes": NOTES}


def own_reward(instance: Instance, state: State, action: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Minus the straight distance that a move covers: what any reward function of a user's looks like."""
    ends = [torch.take_along_dim(instance.coords, node[..., None, None], -2) for node in (action, state.current)]
    return -(ends[0] - ends[1]).norm(dim=-1)[..., 0]


class LeakingDist(OneHotDist):
    """The ancestor's mistake: the uniform share goes to all actions, after the mask."""

    def __init__(self, logits: Tensor, *, mask: Tensor | None = None, unimix: float = 0.0) -> None:
        masked = OneHotDist(logits, mask=mask)
        leaked = (1 - unimix) * masked.probs + unimix / logits.shape[-1]
        super().__init__(leaked.log())


def run(name: str, variant: Variant, logdir: Path, *, seed: int = 0) -> None:
    """Train one variant."""
    if name == LEAK:
        actors.OneHotDist = LeakingDist  # type: ignore[misc]
    main_of = {"dreamer": dreamer.main, "grpo": grpo.main}[variant.program]
    main_of([*variant.base, *variant.options, *EVALUATIONS, "--seed", str(seed), "--logdir", str(logdir)])


def main(root: Path, *, chosen: str, seeds: int) -> None:
    """Train what is missing, and print the table."""
    print("| variant | gap on the test set, % | illegal imagined actions, % | entropy | minutes |")
    print("|---|---|---|---|---|")
    for name in SETS[chosen]:
        logdirs = [folder_of(root, name, seed) for seed in range(seeds)]
        for seed, logdir in enumerate(logdirs):
            if not _ended(logdir):
                command = [sys.executable, "-m", "benchmarks.ablations", str(root), "--set", chosen]
                command += ["--variant", name, "--seed", str(seed)]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        print(_row(name, logdirs), flush=True)


def folder_of(root: Path, name: str, seed: int) -> Path:
    """Where a variant's run is."""
    return root / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}"


def _row(name: str, logdirs: list[Path]) -> str:
    """A line of the table: means over seeds."""
    runs = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in logdirs]
    gaps = [rows[-1]["eval_gap"] for rows in runs]
    misses = [row["miss_rate"] for rows in runs for row in rows if "miss_rate" in row]
    entropies = [next(row["actor_entropy"] for row in reversed(rows) if "actor_entropy" in row) for rows in runs]
    minutes = statistics.mean(rows[-1]["seconds"] / 60 for rows in runs)
    each = "" if len(gaps) == 1 else f" ({', '.join(f'{gap:.2f}' for gap in gaps)})"
    illegal = f"{100 * statistics.mean(misses):.3f}" if misses else "-"
    return (
        f"| {name} | {statistics.mean(gaps):.2f}{each} | {illegal} | {statistics.mean(entropies):.3f} | {minutes:.1f} |"
    )


def _ended(logdir: Path) -> bool:
    metrics = logdir / "metrics.jsonl"
    return metrics.exists() and '"eval_gap"' in metrics.read_text()


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("ablations", description=__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="where the runs are, or shall be")
    parser.add_argument("--set", choices=SETS, default="choices", help="of variants (choices)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant (1)")
    parser.add_argument("--variant", help="train this one alone, with --seed")
    parser.add_argument("--seed", type=int, default=0, help="of that (0)")
    asked = parser.parse_args(argv)
    if asked.seeds < 1:
        parser.error(f"--seeds is {asked.seeds}; give at least 1")
    if asked.variant is not None and asked.variant not in SETS[asked.set]:
        parser.error(f"--variant is {asked.variant!r}; the set {asked.set} has {', '.join(SETS[asked.set])}")
    return asked


if __name__ == "__main__":
    asked = parse(sys.argv[1:])
    torch.set_num_threads(1)
    if asked.variant is not None:
        alone = SETS[asked.set][asked.variant]
        run(asked.variant, alone, folder_of(asked.root, asked.variant, asked.seed), seed=asked.seed)
    else:
        main(asked.root, chosen=asked.set, seeds=asked.seeds)
