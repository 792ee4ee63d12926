"""What faults in a language model's logits do to its training: NaN, infinity and +-150 in every tenth update.

    python -m benchmarks.logit_faults --updates 1000 --seeds 3 --out logdir/logit_faults

trains `grpo_words` without faults and with them, and prints how both end; and how far the first fault lets a trainer
come that draws tokens from the softmax of the logits as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import grpo
from groups.texts import TextSampler
from system.terminal import Parser
from tools import OneHotDist

# Faults come in each update whose number this divides, into the last tokens of every row.
EVERY = 10
FAULTS = (float("nan"), float("inf"), -float("inf"), 150.0, -150.0)
PROMPTS, SAMPLES = 16, 8


@contextmanager
def faulty(every: int) -> Iterator[None]:
    """Within, logits of every `every`-th update are broken, while it draws and while it learns."""
    practise, forward = grpo.GRPO.practise, TextSampler._forward
    broken = False

    def counting(agent: grpo.GRPO, *, progress: float) -> Any:
        nonlocal broken
        broken = (agent.learner.updates + 1) % every == 0
        try:
            return practise(agent, progress=progress)
        finally:
            broken = False

    def breaking(sampler: TextSampler, *args: Any, **options: Any) -> Any:
        output = forward(sampler, *args, **options)
        if broken:
            faults = torch.tensor(FAULTS, device=output.logits.device)
            sound = output.logits[..., : -len(FAULTS)]
            output.logits = torch.cat((sound, faults.expand(*sound.shape[:-1], -1)), -1)
        return output

    with patch.object(grpo.GRPO, "practise", counting), patch.object(TextSampler, "_forward", breaking):
        yield


class Unprotected(OneHotDist):
    """Tokens as `torch.multinomial` draws them from the softmax of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self._plain = torch.softmax(logits, -1)

    def sample(self, noise: Tensor) -> Tensor:
        return torch.multinomial(self._plain, 1)[..., 0]


def train(logdir: Path, *, seed: int, updates: int) -> dict[str, Any]:
    """Train on letters; the last row of the log."""
    grpo.main(
        [
            *("--configs", "grpo_words", "--logdir", str(logdir), "--seed", str(seed), "--eval_every", "0"),
            *("--groups.prompts", str(PROMPTS), "--groups.samples", str(SAMPLES)),
            *("--steps", str(updates * PROMPTS * SAMPLES)),
        ]
    )
    return json.loads((logdir / "metrics.jsonl").read_text().splitlines()[-1])


def first_error(run: Callable[[], object]) -> str:
    """What a run ends with."""
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("logit_faults", description=__doc__)
    parser.add_argument("--updates", type=int, default=1000, help="of each run (1000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--out", type=Path, required=True, help="where the runs will be")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train, and print the table."""
    given = parse(argv)
    print("| seed | reward without faults | with faults |\n|---|---|---|")
    totals = [0.0, 0.0]
    for seed in range(given.seeds):
        clean = train(given.out / f"clean-seed{seed}", seed=seed, updates=given.updates)["eval_reward"]
        with faulty(EVERY):
            hurt = train(given.out / f"faulty-seed{seed}", seed=seed, updates=given.updates)["eval_reward"]
        totals = [totals[0] + clean / given.seeds, totals[1] + hurt / given.seeds]
        print(f"| {seed} | {clean:.4f} | {hurt:.4f} |", flush=True)
    print(f"| mean | {totals[0]:.4f} | {totals[1]:.4f} |")

    def unprotected() -> None:
        plain = patch.object(TextSampler, "distribution", lambda _sampler, logits: Unprotected(logits.float()))
        with plain, faulty(EVERY):
            train(given.out / "unprotected", seed=0, updates=given.updates)

    print(f"tokens drawn from the softmax of the logits as they are: {first_error(unprotected)}")


if __name__ == "__main__":
    main(sys.argv[1:])
