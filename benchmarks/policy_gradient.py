"""The model-free yardstick: policy gradient on real tours, with Dreamer's actor, rules, optimiser and evaluation.

    python -m benchmarks.policy_gradient --configs tsp_attn --steps 24000 --logdir logdir/policy_gradient
    python -m benchmarks.policy_gradient --configs tsp_attn --minutes 30 --logdir logdir/policy_gradient_30m

REINFORCE with the baseline of Kool et al. (2019), "Buy 4 REINFORCE samples, get a baseline for free!": K tours of each
instance, every one compared with the mean of the others. The tours are real, so that costs are the true ones and each
decision is an env step. Everything else is what `dreamer.py` does with the same settings, without world model, latent,
replay and critic.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import trainer
from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer, make_task
from envs.instances import TEST_SEED, VALIDATION_SEED, uniform_coords
from envs.routing import TSPInstance
from guard import Guard
from imagination import expand_instance
from logger import Logger, MetricAverages, ProgressBar, save_run_facts
from networks import RoutingView, TSPPointerActor
from tools import ReturnScale, leave_one_out, uniform

CONFIGS = Path(__file__).parents[1] / "configs.yaml"
EVALUATIONS = 20
ENTRY_KEYS = {
    "minutes": "train for this long instead of until --steps; schedules then follow the share of the time",
    "instances": "instances per update (default 8)",
    "tours": "real tours of each instance (default 8)",
}


class Rollout(NamedTuple):
    """Whole tours of B instances, K of each, and what the policy saw before each of its T decisions."""

    view: RoutingView
    action: Tensor
    tour_length: Tensor


@torch.no_grad()
def roll_out(agent: Dreamer, instance: TSPInstance, *, tours: int, first: str, generator: torch.Generator) -> Rollout:
    """Sample tours by the rules.

    Args:
        agent: its pointer actor chooses.
        instance: B instances.
        tours: how many of each.
        first: as `imag_first`: "any" begins the tours of an instance at nodes spread over it, "stored" all at node 0.
        generator: draws the actions.
    """
    rules, actor = agent.task.rules, agent.behavior.actor
    assert rules is not None and isinstance(actor, TSPPointerActor)
    size, num_nodes = instance.coords.shape[:2]
    shape = torch.Size((size, tours))
    begins = None
    if first == "any":
        begins = (torch.arange(tours, device=agent.device) * num_nodes // tours).expand(shape)
    expanded = expand_instance(instance, shape)
    tables = actor.encode(rules.node_features(instance))
    state = rules.reset(expanded, begins)
    states, masks, actions = [], [], []
    tour_length = torch.zeros(shape, device=agent.device)
    for _ in range(rules.episode_steps(num_nodes)):
        mask = rules.action_mask(state)
        dist = actor(None, tables, RoutingView(first=state.first, current=state.current, action_mask=mask))
        action = dist.sample(uniform(shape, generator))
        states.append(state)
        masks.append(mask)
        actions.append(action)
        tour_length += rules.cost(expanded, state, action)
        state, _ = rules.step(state, action)
    view = RoutingView(
        first=states[0].first[..., None],
        current=torch.stack([state.current for state in states], 2),
        action_mask=torch.stack(masks, 2),
    )
    return Rollout(view=view, action=torch.stack(actions, 2), tour_length=tour_length)


def update(
    agent: Dreamer, config: Config, scale: ReturnScale, instance: TSPInstance, rollout: Rollout, progress: float
) -> dict[str, Tensor]:
    """Improve the actor once. The roll-out had no graph: here all its decisions are scored in one pass."""
    rules, actor, settings = agent.task.rules, agent.behavior.actor, config.actor
    assert rules is not None and isinstance(actor, TSPPointerActor)
    returns = -rollout.tour_length
    scale.update(returns)
    advantage = (returns - leave_one_out(returns)) / scale.scale()
    dist = actor(None, actor.encode(rules.node_features(instance)), rollout.view)
    entropy = dist.entropy()
    coefficient = settings.entropy + (settings.entropy_final - settings.entropy) * progress
    loss = -(dist.log_prob(rollout.action) * advantage[..., None] + coefficient * entropy).mean()
    _, metrics = agent.behavior.actor_optimizer.step(loss, progress=progress)
    return metrics | {"actor_entropy": entropy.detach().mean(), "train_return": returns.mean()}


def train(config: Config, logger: Logger, *, instances: int, tours: int, minutes: float | None) -> None:
    """Train for `config.steps` env steps, or for some minutes; evaluate on the way, and on the test set at the end."""
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    device = trainer.choose_device(config.device)
    generators, guard = trainer.make_generators(config.seed, device), Guard(device)
    # The whole agent, so that acting and evaluation are Dreamer's own; of its parts only the actor is trained and used.
    agent = Dreamer(make_task(config), config, device=device, generators=generators, guard=guard)
    scale = ReturnScale(config.actor.advantage_scale, floor=config.actor.advantage_floor).to(device)
    validation = trainer.make_evaluation(config.nodes, config.valid_instances, seed=VALIDATION_SEED)
    test = trainer.make_evaluation(config.nodes, config.eval_instances, seed=TEST_SEED)
    averages, bar = MetricAverages(), ProgressBar(config.steps)
    begin = time.monotonic()
    step, evaluations, progress = 0, 0, 0.0
    while True:
        if progress >= evaluations / EVALUATIONS:
            evaluations += 1
            values = averages.fetch()
            finding = guard.report()
            if finding is not None:
                raise trainer.NonFinite(f"{finding}; stopped at step {step}")
            values["valid_gap"] = trainer.evaluate(agent, agent.task, validation, device=device).gap
            logger.scalars(step, time.monotonic() - begin, values)
            bar.update(step, {"gap %": values["valid_gap"]})
        if progress >= 1:
            break
        instance = TSPInstance(
            coords=uniform_coords(instances, config.nodes, generator=generators["environment"], device=device)
        )
        rollout = roll_out(agent, instance, tours=tours, first=config.imag_first, generator=generators["acting"])
        averages.add(update(agent, config, scale, instance, rollout, progress))
        guard.update += 1
        step += rollout.action.numel()
        share = step / config.steps if minutes is None else (time.monotonic() - begin) / (60 * minutes)
        progress = min(1.0, share)
    result = trainer.evaluate(agent, agent.task, test, device=device)
    logger.scalars(step, time.monotonic() - begin, {"eval_gap": result.gap, "eval_return": -float(result.lengths.mean())})
    bar.say(f"test set: gap {result.gap:.2f} % after {step} env steps")
    bar.close()


def number(text: str | None, name: str, *, default: int) -> int:
    """A whole number of at least 1 from the command line.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return default
    if not (text.isdigit() and int(text) > 0):
        raise ConfigError(f"--{name} is {text!r}; it takes a whole number, at least 1")
    return int(text)


def main(argv: list[str]) -> None:
    """Read the command line and train."""
    with one_line_errors("policy_gradient", *trainer.USER_ERRORS):
        command = parse_command_line(
            argv, config_path=CONFIGS, description=__doc__.splitlines()[0], entry_keys=ENTRY_KEYS
        )
        config = command.config.replace(**{"actor.pointer.latent": 0})
        if config.actor.type != "tsp_pointer":
            raise ConfigError(f"actor.type is {config.actor.type!r}; the yardstick is of tsp_pointer")
        if config.logdir is None:
            raise ConfigError("--logdir is missing: where the metrics go")
        instances = number(command.entry["instances"], "instances", default=8)
        tours = number(command.entry["tours"], "tours", default=8)
        if tours < 2:
            raise ConfigError(f"--tours is {tours}; one tour has no others to be compared with, give 2 or more")
        logdir = Path(str(config.logdir))
        logdir.mkdir(parents=True)
        logger = Logger(logdir)
        try:
            logger.text("config", save_run_facts(logdir, config, argv, defaults=command.defaults))
            minutes = None if command.entry["minutes"] is None else float(command.entry["minutes"])
            train(config, logger, instances=instances, tours=tours, minutes=minutes)
        finally:
            logger.close()


if __name__ == "__main__":
    main(sys.argv[1:])
