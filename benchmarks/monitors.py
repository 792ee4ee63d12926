"""What the monitors of gradients and activations cost a step, and what stable logits cost a token.

    python -m benchmarks.monitors

A small GPT-2 and the pointer of `grpo_tsp` are trained without monitors and with them. All take turns, step by step, so
that a machine that is not always as fast is fair to all. Monitors are as they are by default: a summary in 10 steps of
gradients, activations in 1 of 100. Times are the processor's, per step over whole rounds of `--steps`; shown are the
median of the rounds and the ratio to the same round without monitors, with the range of the rounds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.flags import CONFIGS
from benchmarks.timing import name_of, now
from config import load
from grpo import GRPO
from guard import Guard
from logits import StableLogitsProcessor
from monitors import ActivationMonitor, GradientMonitor, trainer_callback
from system.terminal import Parser, one_line_errors, show
from training.devices import make_generators
from training.setup import make_setup

CPU = torch.device("cpu")
# Rows and tokens of the scores: of GPT-2's kind, and of a large vocabulary of today.
SHAPES = ((8, 50_000), (8, 151_936))
VOCABULARY, BATCH, LENGTH = 1000, 8, 32
KINDS = ("none", "gradients", "gradients, halting", "activations", "both")

Step = Callable[[], None]


def gpt2(width: int, layers: int) -> nn.Module:
    """A GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = width // 32
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=layers, n_head=heads)
    )


def monitors(kind: str, model: nn.Module) -> tuple[GradientMonitor | None, ActivationMonitor | None]:
    """The monitors that a kind has."""
    gradients = GradientMonitor(model, halt_on_nan="halting" in kind) if "gradients" in kind or kind == "both" else None
    return gradients, ActivationMonitor(model) if kind in ("activations", "both") else None


def language_step(kind: str, *, width: int, layers: int) -> Step:
    """What makes one step of a trainer of one's own."""
    model = gpt2(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gradients, activations = monitors(kind, model)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device=CPU)

    def step() -> None:
        with ExitStack() as stack:
            if activations is not None:
                stack.enter_context(activations.step())
            model(input_ids=ids, labels=ids).loss.backward()
        if gradients is not None:
            gradients.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def callback_step(*, width: int, layers: int) -> Step:
    """The same with the callback, called as transformers' Trainer does."""
    model = gpt2(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    callback = trainer_callback(gradients=GradientMonitor(model), activations=ActivationMonitor(model))
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device=CPU)
    told = (None, SimpleNamespace(log_history=[], global_step=0), None)
    callback.on_train_begin(*told)

    def step() -> None:
        callback.on_step_begin(*told)
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        callback.on_pre_optimizer_step(*told)
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step_end(*told)

    return step


def routing_step(kind: str, *, small: bool) -> Step:
    """What makes one step of `grpo_tsp`: drawing tours, and learning from them."""
    config = load(CONFIGS, ["grpo", "grpo_tsp", *(["debug"] if small else [])], {})
    generators = make_generators(0, CPU)
    agent = GRPO.of(make_setup(config, CPU).task, config, device=CPU, generators=generators, guard=Guard(CPU))
    gradients, activations = monitors(kind, agent.sampler.policy)
    if gradients is not None:
        agent.learner.optimizers["policy"].observers.append(gradients.observe)

    def step() -> None:
        with ExitStack() as stack:
            if activations is not None:
                stack.enter_context(activations.step())
            agent.practise(progress=0.5)

    return step


def absolute_clipping(scores: Float[Tensor, "B N"], *, clip: float = 30.0, floor: float = 1e-8) -> Float[Tensor, "B N"]:
    """What is often done, for comparison: scores clipped where they stand, and a floor under all probabilities."""
    clipped = scores.nan_to_num(nan=-clip, posinf=clip, neginf=-clip).clamp(-clip, clip)
    probs = torch.softmax(clipped, -1).clamp(min=floor)
    return (probs / probs.sum(-1, keepdim=True)).log()


def take_turns(contestants: dict[str, Step], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Processor seconds per step of each, round by round."""
    # The first steps prepare.
    for step in contestants.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        seconds = dict.fromkeys(contestants, 0.0)
        for _ in range(steps):
            for name, step in contestants.items():
                begin = now(CPU)
                step()
                seconds[name] += (now(CPU) - begin).processor
        for name, whole in seconds.items():
            found[name].append(whole / steps)
    return found


def show_steps(title: str, contestants: dict[str, Step], *, rounds: int, steps: int) -> None:
    """A row for each kind of monitor."""
    found = take_turns(contestants, rounds=rounds, steps=steps)
    for name, seconds in found.items():
        ratios = [ours / without for ours, without in zip(seconds, found["none"], strict=True)]
        print(
            f"| {title} | {name} | {1e3 * statistics.median(seconds):.2f} | {statistics.median(ratios):.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f}) |",
            flush=True,
        )


def show_processor(shape: tuple[int, int], *, rounds: int) -> None:
    """A row for the processor, and what sampling takes anyway."""
    scores = 10 * torch.randn(shape, device=CPU)
    ids: Any = torch.zeros(len(scores), 1, dtype=torch.int64, device=CPU)
    probs = torch.softmax(scores, -1)
    stable = StableLogitsProcessor()
    contestants = {
        "stable": partial(stable, ids, scores),
        "absolute": partial(absolute_clipping, scores),
        "softmax": partial(torch.softmax, scores, -1),
        "multinomial": partial(torch.multinomial, probs, 1),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            begin = now(CPU)
            work()
            milliseconds[name].append(1e3 * (now(CPU) - begin).processor)
    cells = [f"{statistics.median(each):.2f}" for each in milliseconds.values()]
    print(f"| {shape[0]} x {shape[1]:,} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str]) -> None:
    """Read the command line, and print two tables."""
    parser = Parser("monitors", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a round (default 100)")
    parser.add_argument("--width", type=int, default=128, help="of the GPT-2 (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="of the GPT-2 (default 4)")
    parser.add_argument("--small", action="store_true", help="the pointer of section debug, and small scores")
    given = parser.parse_args(argv)
    if min(given.rounds, given.steps, given.layers) < 1 or given.width % 32 or given.width < 32:
        parser.error("--rounds, --steps and --layers are at least 1, and --width is a multiple of 32")
    with one_line_errors("monitors"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        show(f"{name_of(CPU)}, one thread, torch {torch.__version__}\n")
        size = {"width": given.width, "layers": given.layers}
        language = {kind: language_step(kind, **size) for kind in KINDS}
        language["both, as a callback"] = callback_step(**size)
        routing = {kind: routing_step(kind, small=given.small) for kind in KINDS}
        print("| trainer | monitors | ms per step | ratio |\n|---|---|---|---|")
        show_steps("GPT-2", language, rounds=given.rounds, steps=given.steps)
        show_steps("pointer", routing, rounds=given.rounds, steps=given.steps)
        print("\n| scores | StableLogitsProcessor, ms | absolute clipping, ms | softmax, ms | multinomial, ms |")
        print("|---|---|---|---|---|")
        with torch.no_grad():
            for rows, tokens in SHAPES:
                show_processor((rows, 100 if given.small else tokens), rounds=20 * given.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
