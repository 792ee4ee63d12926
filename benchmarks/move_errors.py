"""How well routing runs know what moves cost: on the episodes that they learnt from, and on fresh ones.

    python -m benchmarks.move_errors logdir/tsp_few_steps-tsp_stretch-seed0 logdir/blind

The root mean square error of the learned move cost (or, as in training, the mean absolute one), over the moves of 256
episodes each, which are played as the run collected its own; a belief answers for all moves of its episode. What is
far better on replayed episodes than on fresh ones was learnt by heart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import checkpoint
import config
from benchmarks.collecting import act_and_store, make_env
from benchmarks.flags import CONFIGS
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from imagining.routing_model import RoutingModel
from system.terminal import Parser
from training import devices, launch, loading
from training.replay import Replay
from training.ring import REWARD_AND_ENDS

# The seed of the fresh episodes, which no run trains with.
FRESH_SEED = 960_131_877
EPISODES = 256


@torch.no_grad()
def move_error(agent: Dreamer, replay: Replay) -> float:
    """Of the moves of `EPISODES` episodes drawn from replay, in the unit of the costs."""
    assert isinstance(agent.model, RoutingModel)
    batch = replay.sample_episodes(EPISODES, agent.batch_length, generator=agent.generators["replay"])
    loss = agent.model.move_loss(batch, agent.model.first_instance(batch), None)
    return float(loss.sqrt() if agent.model.move_error == "squared" else loss) / agent.reward_scale


def errors(logdir: Path, *, trust: bool = False) -> tuple[float, float]:
    """On replayed and on fresh episodes of a run; `trust` is as in `loading.load_run`.

    Raises:
        ConfigError: there is no such run, or its costs are not learnt from moves alone.
        CheckpointError: its checkpoint or its replay cannot be read.
    """
    defaults = config.load_defaults(CONFIGS)
    device = devices.prepare_torch(defaults)
    run = loading.load_run(
        logdir, make_agent=Dreamer, device=device, defaults=defaults, changes={"seed": FRESH_SEED}, trust=trust
    )
    agent = run.agent
    assert isinstance(agent, Dreamer)
    model = agent.model
    if not isinstance(model, RoutingModel) or not model.separate_reward or model.reward_latent:
        raise ConfigError(f"{logdir} has no head that tells what a move costs from its geometry")
    state = checkpoint.load_latest(logdir, device, to_go_on=False) if logdir.is_dir() else None
    if state is None:
        raise ConfigError(f"{logdir} is no folder of a run, whose replay is needed")
    scaled = run.config.replace(reward_scale=agent.reward_scale)
    _, fresh = act_and_store(agent, make_env(run.config, agent, EPISODES), scaled)
    stored = {name: rows for name, rows in fresh.rows.items() if name not in REWARD_AND_ENDS}
    spaces = {name: (tuple(rows.shape[2:]), rows.dtype) for name, rows in stored.items()}
    lived = Replay(spaces, num_envs=run.config.envs, capacity=run.config.replay_capacity, device=device)
    lived.load_chunks(logdir / "replay", state["replay"])
    return move_error(agent, lived), move_error(agent, fresh)


def main(argv: list[str]) -> None:
    """Read the command line and print a table."""
    parser = Parser("move_errors", description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--trust", action="store_true", help="import and call what the run's config names")
    arguments = parser.parse_args(argv)
    with one_line_errors("move_errors", *launch.USER_ERRORS):
        print("| run | replayed episodes | fresh episodes |\n|---|---|---|")
        for name in arguments.runs:
            replayed, fresh = errors(Path(name), trust=arguments.trust)
            print(f"| {name} | {replayed:.3f} | {fresh:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
