"""The model-free yardsticks, policy gradient and PPO: real tours, and Dreamer's actor, rules, optimiser and evaluation.

    python -m benchmarks.policy_gradient --configs tsp_attn --steps 24000 --logdir logdir/policy_gradient
    python -m benchmarks.policy_gradient --configs tsp_attn --minutes 30 --logdir logdir/policy_gradient_30m
    python -m benchmarks.policy_gradient --configs tsp_few_steps tsp_lanes --steps 1e6 --epochs 4 --logdir logdir/ppo

REINFORCE with the baseline of Kool et al. (2019), "Buy 4 REINFORCE samples, get a baseline for free!": K tours of each
instance, every one compared with the mean of the others. The tours are real, so that costs are the true ones and each
decision is an env step. Everything else is what `dreamer.py` does with the same settings, without world model, latent,
replay and critic. With `--epochs` above 1 each batch of tours is learnt from that often, by PPO's clipped surrogate
and the same baseline.

The defaults did best on TSP-20's validation set, seeds 0 and 1. Up to 50,000 env steps: 2 instances out of 1 to 8, with
8 to 20 tours, learning rates of 3e-4 to 1e-3 and warm-ups of 5 to 50 updates; all of these ended within 8 points of one
another. In one minute: 32 instances out of 32 to 128.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from envs.tasks import RoutingTask
from guard import Guard, NonFinite
from imagining.routing_starts import expand_instance
from parts.actors import TSPPointerActor
from parts.views import View
from routing.instances import TEST_SEED, VALIDATION_SEED
from routing.rules import Instance
from settings.run import RunSettings
from tools import leave_one_out, uniform
from training import devices, launch, logdirs, setup, tours
from training.logger import Logger, MetricAverages, ProgressBar, save_run_facts

CONFIGS = Path(__file__).parents[1] / "configs.yaml"
EVALUATIONS = 20
# How far PPO's ratios may be from 1.
CLIP = 0.2
ENTRY_KEYS = {
    "minutes": "train for this long instead of until --steps; schedules then follow the share of the time",
    "instances": "instances per update (default 2; with --minutes 32)",
    "tours": "real tours of each instance (default 16)",
    "epochs": "times that each batch of tours is learnt from; more than 1 is PPO (default 1)",
}


class Rollout(NamedTuple):
    """Whole tours of B instances, K of each, and what the policy saw before each of its T decisions.

    `running` is 0 for those that came after a tour's end, which are no env steps.
    """

    view: View
    action: Int[Tensor, "B K T"]
    running: Float[Tensor, "B K T"]
    tour_length: Float[Tensor, "B K"]


@torch.no_grad()
def roll_out(agent: Dreamer, instance: Instance, *, tours: int, first: str, generator: torch.Generator) -> Rollout:
    """Sample tours by the rules.

    Args:
        agent: its pointer actor chooses.
        instance: B instances.
        tours: how many of each.
        first: as `imag_first`: "any" begins the tours of an instance at nodes spread over it, "stored" all at node 0.
        generator: draws the actions.
    """
    actor = agent.behavior.actor
    assert isinstance(agent.task, RoutingTask) and isinstance(actor, TSPPointerActor)
    rules = agent.task.rules
    size, num_nodes = instance.coords.shape[:2]
    shape = torch.Size((size, tours))
    begins = None
    if first == "any":
        begins = (torch.arange(tours, device=agent.device) * num_nodes // tours).expand(shape)
    expanded = expand_instance(instance, shape)
    factors = rules.costs.draw(size, generator=generator, device=agent.device)
    if factors is not None:
        factors = factors[:, None].expand(*shape, -1)
    tables = actor.encode(rules.node_features(instance))
    state = rules.reset(expanded, begins)

    def noise(wanted: torch.Size) -> Tensor:
        return torch.randn(wanted, generator=generator, device=agent.device)

    views, actions, running = [], [], [torch.ones(shape, device=agent.device)]
    tour_length = torch.zeros(shape, device=agent.device)
    for _ in range(rules.episode_steps(num_nodes)):
        mask = rules.action_mask(state)
        view = View.of(rules, state, mask)
        dist = actor(None, tables, view)
        action = dist.sample(uniform(shape, generator))
        views.append(view)
        actions.append(action)
        tour_length += rules.cost(expanded, state, action, factors)
        if factors is not None:
            factors = rules.costs.drifted(factors, noise)
        state, finished = rules.step(state, action)
        running.append((~finished).float())
    features = [view.features for view in views if view.features is not None]
    view = View(
        torch.stack([view.action_mask for view in views if view.action_mask is not None], 2),
        first=state.first[..., None],
        current=torch.stack([view.current for view in views if view.current is not None], 2),
        features=torch.stack(features, 2) if features else None,
    )
    return Rollout(view, torch.stack(actions, 2), running=torch.stack(running[:-1], 2), tour_length=tour_length)


def clipped_gain(
    log_ratio: Float[Tensor, "*B"], advantage: Float[Tensor, "*#B"], *, clip: float = CLIP
) -> Float[Tensor, "*B"]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7); its gradient is REINFORCE's where the ratio is 1."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def update(
    agent: Dreamer, instance: Instance, rollout: Rollout, *, progress: float, epochs: int = 1
) -> dict[str, Tensor]:
    """Improve the actor `epochs` times. The roll-out had no graph: here all its decisions are scored in one pass."""
    behavior = agent.behavior
    assert isinstance(agent.task, RoutingTask) and isinstance(behavior.actor, TSPPointerActor)
    rules = agent.task.rules
    returns = -rollout.tour_length
    behavior.scale.update(returns)
    advantage = (returns - leave_one_out(returns)) / behavior.scale.scale()
    coefficient = behavior.entropy + (behavior.entropy_final - behavior.entropy) * progress
    before: Tensor | None = None

    def mean(values: Float[Tensor, "B K T"]) -> Float[Tensor, ""]:
        return (values * rollout.running).sum() / rollout.running.sum()

    for _ in range(epochs):
        dist = behavior.actor(None, behavior.actor.encode(rules.node_features(instance)), rollout.view)
        log_prob, entropy = dist.log_prob(rollout.action), dist.entropy()
        before = log_prob.detach() if before is None else before
        gain = clipped_gain(log_prob - before, advantage[..., None])
        objective = mean(gain + coefficient * entropy)
        _, metrics = agent.learner.optimizers["actor"].step(-objective, progress=progress)
    return metrics | {"actor_entropy": mean(entropy.detach()), "train_return": returns.mean()}


class Batches(NamedTuple):
    """How many real tours an update learns from, and how often."""

    instances: int
    tours: int
    epochs: int


def train(agent: Dreamer, config: Config, *, logger: Logger, batches: Batches, minutes: float | None) -> None:
    """Train for `config.steps` env steps, or for some minutes; evaluate on the way, and on the test set at the end.

    Raises:
        NonFinite: a loss or a gradient was not finite.
    """
    assert isinstance(agent.task, RoutingTask)
    rules = agent.task.rules
    validation = setup.make_evaluation(config.nodes, config.valid_instances, seed=VALIDATION_SEED, rules=rules)
    test = setup.make_evaluation(config.nodes, config.eval_instances, seed=TEST_SEED, rules=rules)
    averages, bar = MetricAverages(), ProgressBar(config.steps)
    begin = time.monotonic()
    step, evaluations, progress = 0, 0, 0.0
    while True:
        if progress >= evaluations / EVALUATIONS:
            evaluations += 1
            values = averages.fetch()
            for finding in agent.guard.findings():
                raise NonFinite(f"{finding.kind} {finding.name!r} is not finite; stopped at step {step}")
            values["valid_gap"] = tours.evaluate(agent, agent.task, validation, device=agent.device).gap
            logger.scalars(step, time.monotonic() - begin, values)
            bar.update(step, {"gap %": values["valid_gap"]})
        if progress >= 1:
            break
        draws = agent.generators["environment"]
        instance = rules.random(batches.instances, config.nodes, generator=draws, device=agent.device)
        generator = agent.generators["acting"]
        rollout = roll_out(agent, instance, tours=batches.tours, first=config.imag_first, generator=generator)
        averages.add(update(agent, instance, rollout, progress=progress, epochs=batches.epochs))
        agent.guard.update += 1
        step += int(rollout.running.sum())
        share = step / config.steps if minutes is None else (time.monotonic() - begin) / (60 * minutes)
        progress = min(1.0, share)
    result = tours.evaluate(agent, agent.task, test, device=agent.device)
    values = {"eval_gap": result.gap, "eval_return": -float(result.lengths.mean())}
    logger.scalars(step, time.monotonic() - begin, values)
    bar.say(f"test set: gap {result.gap:.2f} % after {step} env steps")
    bar.close()


def number(text: str, name: str, *, least: float) -> float:
    """A finite number from the command line.

    Raises:
        ConfigError: it is none, or below `least`.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ConfigError(f"--{name} is {text!r}; it takes a number, at least {least:g}")
    return value


def main(argv: list[str]) -> None:
    """Read the command line and train."""
    with one_line_errors("policy_gradient", *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        # A belief is a part of the model, and there is no model here.
        config = command.config.replace(**{"actor.pointer.latent": 0, "model.belief": False})
        if config.actor.type != "tsp_pointer":
            raise ConfigError(f"actor.type is {config.actor.type!r}; the yardstick is of tsp_pointer")
        RunSettings.of(config)
        logdir = logdirs.unused_logdir(config)
        entry = command.entry
        minutes = None if entry["minutes"] is None else number(entry["minutes"], "minutes", least=0.01)
        batches = Batches(
            instances=int(number(entry["instances"] or ("2" if minutes is None else "32"), "instances", least=1)),
            tours=int(number(entry["tours"] or "16", "tours", least=2)),
            epochs=int(number(entry["epochs"] or "1", "epochs", least=1)),
        )
        torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)
        torch.manual_seed(config.seed)
        device = devices.choose_device(config.device)
        # The whole agent, so that acting and evaluating are Dreamer's own; only its actor is trained and used.
        agent = Dreamer.of(
            setup.make_task(config),
            config,
            device=device,
            generators=devices.make_generators(config.seed, device),
            guard=Guard(device),
        )
        with logdirs.writing_to(logdir):
            logdir.mkdir(parents=True, exist_ok=True)
        logger = Logger(logdir)
        try:
            facts = save_run_facts(
                logdir,
                config,
                ["benchmarks/policy_gradient.py", *argv],
                defaults=command.defaults,
                flags={**entry, **{name: str(value) for name, value in batches._asdict().items()}},
            )
            logger.text("config", facts)
            train(agent, config, logger=logger, batches=batches, minutes=minutes)
        finally:
            logger.close()


if __name__ == "__main__":
    main(sys.argv[1:])
