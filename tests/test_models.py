from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import config
from config import Config
from dreamer import imagination_settings
from envs.routing import TSPInstance, TSPRules
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from guard import Guard
from imagination import Noise, imagine
from models import ImagBehavior, WorldModel, make_actor
from networks import MaskedActor, NodeHead, TSPPointerActor
from optimizer import Optimizer
from replay import Replay
from tools import uniform

CPU = torch.device("cpu")
NODES = 6
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")

# What each action of the scripted task earns in the row after it.
WORTH = torch.tensor([-1.0, 0.5, 2.0])
# Rows of a scripted episode, its final observation included.
EPISODE_ROWS = 5

ROUTING = Task(rules=TSPRules, num_actions=NODES, vectors={})
SCRIPTED = Task(rules=None, num_actions=len(WORTH), vectors={"clock": 1, "ending": 2})


def debug_config(**changes: Any) -> Config:
    return config.load(CONFIG_PATH, ["debug"], {}).replace(**changes)


def world_model(task: Task, **changes: Any) -> WorldModel:
    return WorldModel(task, debug_config(**{f"model.{key}": value for key, value in changes.items()}).model)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_zero_outputs(module: nn.Module) -> None:
    """Undo outputs that start at zero, behind which no gradient passes before the first update."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


class Learner:
    """A world model with its optimiser, taught from replay."""

    def __init__(self, model: WorldModel, *, lr: float = 5e-3) -> None:
        self.model = model
        self.optimizer = Optimizer("model", {"model": model}, guard=Guard("cpu"), lr=lr, clip=10.0)
        self.noise = generator(1)

    def learn(self, batch: dict[str, Tensor]) -> float:
        losses, _ = self.model.loss(batch, self.draw(batch))
        total = sum((self.model.loss_scales[name] * loss for name, loss in losses.items()), torch.zeros(()))
        self.optimizer.step(total, progress=0.0)
        return float(total.detach())

    def draw(self, batch: dict[str, Tensor]) -> Tensor:
        return uniform((*batch["reward"].shape, self.model.rssm.stoch_size), self.noise)

    @torch.no_grad()
    def feat(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.observe(batch, self.draw(batch))[0].feat()


def scripted_replay() -> Replay:
    """Random actions in a task whose reward names the action that caused it; the observation tells nothing of it.

    Episodes end alternately by termination and by truncation, and the last observation says by which.
    """
    num_envs, draws = 8, generator()
    spaces = {"clock": ((1,), torch.float32), "ending": ((2,), torch.float32), "action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=num_envs, capacity=num_envs * 200, device=CPU)
    action = torch.zeros(num_envs, dtype=torch.int64)
    for column in range(200):
        episode, row = divmod(column, EPISODE_ROWS)
        is_first, is_last = row == 0, row == EPISODE_ROWS - 1
        is_terminal = is_last and episode % 2 == 0
        ending = [float(is_terminal), float(is_last and not is_terminal)]
        reward = torch.zeros(num_envs) if is_first else WORTH[action]
        action = torch.randint(len(WORTH), (num_envs,), generator=draws)
        replay.add(
            {
                "clock": torch.full((num_envs, 1), row / EPISODE_ROWS),
                "ending": torch.tensor([ending]).repeat(num_envs, 1),
                "action": action,
                "reward": reward,
                "is_first": torch.full((num_envs,), is_first),
                "is_last": torch.full((num_envs,), is_last),
                "is_terminal": torch.full((num_envs,), is_terminal),
            }
        )
    return replay


def routing_replay(*, reward_is_target: bool = False, num_envs: int = 8, columns: int = 84) -> Replay:
    """Random legal tours; with `reward_is_target` a move earns the x coordinate of the node that it goes to."""
    draws = generator()
    env = RoutingVectorEnv(TSPRules, num_envs=num_envs, num_nodes=NODES, device=CPU, generator=draws)
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    replay = Replay({**spaces, "action": ((), torch.int64)}, num_envs=num_envs, capacity=num_envs * columns, device=CPU)
    reward, ended = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
    for _ in range(columns):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **flags, "action": action, "reward": reward})
        earned = obs["coords"][torch.arange(num_envs), action, 0] * ~ended
        obs, reward, ended, _, info = env.step(action)
        if reward_is_target:
            reward = earned
    return replay


class Taught(NamedTuple):
    """A learner that has seen its task, and rows that it is asked about."""

    learner: Learner
    batch: dict[str, Tensor]
    feat: Tensor


@pytest.fixture(scope="module")
def scripted() -> Taught:
    torch.manual_seed(0)
    replay, draws = scripted_replay(), generator(2)
    learner = Learner(world_model(SCRIPTED))
    for _ in range(250):
        learner.learn(replay.sample_windows(16, 12, generator=draws))
    batch = replay.sample_windows(64, 12, generator=draws)
    return Taught(learner, batch, learner.feat(batch))


def mean_error(predicted: Tensor, actual: Tensor) -> float:
    return float((predicted - actual).abs().mean().detach())


def test_reward_head_predicts_the_reward_of_the_action_before_the_row(scripted: Taught):
    reward, predicted = scripted.batch["reward"], scripted.learner.model.predict_reward(scripted.feat)
    # The first row of a window is left out: the action before it is not in the window.
    assert mean_error(predicted[:, 1:], reward[:, 1:]) < 0.1
    assert mean_error(predicted[:, 1:-1], reward[:, 2:]) > 0.7
    assert mean_error(predicted[:, 2:], reward[:, 1:-1]) > 0.7


def test_reward_head_carries_nothing_over_an_episodes_end(scripted: Taught):
    first = scripted.batch["is_first"]
    assert first[:, 1:].any(1).all()
    assert (scripted.batch["reward"][first] == 0).all()
    assert scripted.learner.model.predict_reward(scripted.feat)[first].abs().mean() < 0.1


def test_cont_head_tells_termination_from_truncation(scripted: Taught):
    cont = scripted.learner.model.predict_cont(scripted.feat)
    terminated = scripted.batch["is_terminal"]
    truncated = scripted.batch["is_last"] & ~terminated
    assert terminated.any() and truncated.any()
    assert cont[terminated].mean() < 0.1
    assert cont[truncated].mean() > 0.9
    assert cont[~scripted.batch["is_last"]].mean() > 0.9


def test_cont_loss_takes_the_terminal_row_for_the_only_end(scripted: Taught):
    model, batch = scripted.learner.model, scripted.batch
    noise = scripted.learner.draw(batch)
    with torch.no_grad():
        right = model.loss(batch, noise)[0]["cont"]
        wrong = model.loss({**batch, "is_terminal": batch["is_last"]}, noise)[0]["cont"]
        same = model.loss({**batch, "is_last": torch.zeros_like(batch["is_last"])}, noise)[0]["cont"]
    assert right < 0.1 < wrong
    assert same == right


def test_imagined_reward_is_that_of_the_imagined_action(scripted: Taught):
    model = scripted.learner.model
    changes = {"imag_horizon": "3", "imag_start": "replay", "imag_first": "stored", "baseline": "critic"}
    settings = debug_config(imag_tours=1, **{"actor.type": "mlp"}, **changes)
    behavior = ImagBehavior(
        SCRIPTED,
        model,
        imagination=imagination_settings(settings),
        actor=settings.actor,
        critic=settings.critic,
        schedule=settings.schedule,
        guard=Guard("cpu"),
    )
    start = behavior.start(model, scripted.batch, generator(3))
    noise = Noise(latent=torch.rand(2, *start.weight.shape, model.rssm.stoch_size), action=torch.rand(2, 64, 12))
    trajectory = imagine(model, behavior.actor, start=start, tables=None, noise=noise, horizon=2)
    # Two moves further the episode still goes on; what follows its end answers no action.
    inner = scripted.batch["clock"][..., 0] < 0.3
    reward, worth = behavior.reward(model, trajectory, start)[inner], WORTH[trajectory.action][inner]
    assert len(worth.unique()) == len(WORTH)
    assert mean_error(reward, worth) < 0.15
    assert mean_error(reward[:, 0], worth[:, 1]) > 0.5


@pytest.mark.parametrize("reward_latent", [False, True])
def test_move_head_predicts_the_next_rows_reward_of_the_rows_own_move(reward_latent: bool):
    replay, draws = routing_replay(reward_is_target=True), generator(2)
    learner = Learner(world_model(ROUTING, reward_latent=reward_latent))
    for _ in range(100):
        learner.learn(replay.sample_episodes(16, NODES + 1, generator=draws))
    batch = replay.sample_episodes(64, NODES + 1, generator=draws)
    feat, rows, reward = learner.feat(batch), torch.arange(64)[:, None], batch["reward"]
    origin = batch["coords"][:, 0][rows, batch["current_node"]]
    target = batch["coords"][:, 0][rows, batch["action"]]
    with torch.no_grad():
        predicted = learner.model.predict_move(origin, target, feat)
    assert mean_error(predicted[:, :-1], reward[:, 1:]) < 0.1
    assert mean_error(predicted[:, :-2], reward[:, 2:]) > 0.2
    assert mean_error(predicted[:, 1:-1], reward[:, 1:-1]) > 0.2


def test_move_loss_reads_the_latent_before_each_move():
    model = world_model(ROUTING, reward_latent=True)
    without_zero_outputs(model)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    feat = torch.randn(4, NODES + 1, model.rssm.feat_size, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.move_loss(batch, TSPInstance(batch["coords"][:, 0]), feat), feat)
    assert (gradient[:, :-1].abs().sum((0, 2)) > 0).all()
    assert (gradient[:, -1] == 0).all()


def test_move_loss_is_the_mean_squared_reward_while_the_head_is_zero():
    batch = routing_replay().sample_episodes(8, NODES + 1, generator=generator())
    loss = world_model(ROUTING).move_loss(batch, TSPInstance(batch["coords"][:, 0]), None)
    torch.testing.assert_close(loss, batch["reward"][:, 1:].square().mean())


def every_scale(value: float) -> dict[str, Any]:
    scales = ("dyn", "rep", "decoder", *WorldModel.HEADS)
    return {f"loss_scales.{name}": value for name in scales}


@pytest.mark.parametrize("current_pos", ["coords", "node"])
def test_every_routing_head_has_a_finite_loss(current_pos: str):
    model = world_model(ROUTING, current_pos=current_pos, **every_scale(1.0))
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    losses, metrics = model.loss(batch, torch.rand(4, NODES + 1, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", *WorldModel.HEADS} == set(model.loss_scales)
    assert set(model.heads) == set(WorldModel.HEADS)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(f"{name}_loss" in metrics for name in losses)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("name", WorldModel.HEADS)
def test_head_with_scale_0_is_not_built(name: str):
    model = world_model(ROUTING, **every_scale(1.0) | {f"loss_scales.{name}": 0.0})
    assert set(model.heads) == set(WorldModel.HEADS) - {name}
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    losses, _ = model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", *WorldModel.HEADS} - {name}


@pytest.mark.parametrize("name", WorldModel.HEADS)
def test_single_head_trains_alone(name: str):
    model = world_model(ROUTING, **every_scale(0.0) | {f"loss_scales.{key}": 1.0 for key in ("dyn", "rep", name)})
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    assert set(model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))[0]) == {"dyn", "rep", name}


def test_task_without_rules_has_reward_cont_and_decoder():
    model = world_model(SCRIPTED, **every_scale(1.0))
    batch = scripted_replay().sample_windows(4, 12, generator=generator())
    losses, _ = model.loss(batch, torch.rand(4, 12, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", "reward", "cont", "decoder"} == set(model.loss_scales)
    assert set(model.heads) == {"reward", "cont", "decoder"}
    assert all(loss.isfinite() for loss in losses.values())


def test_rewards_start_at_zero():
    routing, plain = world_model(ROUTING), world_model(SCRIPTED)
    assert (routing.predict_move(torch.rand(9, 2), torch.rand(9, 2), None) == 0).all()
    assert (plain.predict_reward(torch.randn(9, plain.rssm.feat_size)) == 0).all()


def test_current_position_is_learnt_as_coordinates_or_as_the_node():
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    noise = torch.rand(4, NODES + 1, 4)
    scales = every_scale(0.0) | {"loss_scales.dyn": 1.0, "loss_scales.rep": 1.0, "loss_scales.current_pos": 1.0}
    for current_pos, target in (
        ("coords", batch["coords"][:, 0][torch.arange(4)[:, None], batch["current_node"]]),
        ("node", batch["current_node"][..., None].float()),
    ):
        model = world_model(ROUTING, current_pos=current_pos, **scales)
        for parameter in model.heads["current_pos"].parameters():
            nn.init.zeros_(parameter)
        # Half the squared symlog of the target is what a prediction of 0 costs.
        expected = 0.5 * torch.log1p(target).square().sum(-1).mean()
        torch.testing.assert_close(model.loss(batch, noise)[0]["current_pos"], expected)


@pytest.mark.parametrize("task", [ROUTING, SCRIPTED], ids=["routing", "vectors"])
def test_gradient_reaches_every_parameter(task: Task):
    model = world_model(task, reward_latent=True, free_nats=0.0, **every_scale(1.0))
    without_zero_outputs(model)
    if task.rules is None:
        batch = scripted_replay().sample_windows(8, 12, generator=generator())
    else:
        batch = routing_replay().sample_episodes(8, NODES + 1, generator=generator())
    losses, _ = model.loss(batch, torch.rand(*batch["reward"].shape, model.rssm.stoch_size))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses.values(), torch.zeros(())), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        # A softmax cancels what is added to all of its logits, and SetNorm what is added to all members of a set.
        if name.endswith(("current_node.bias", "hidden_out.bias")):
            continue
        assert gradient is not None, f"{name} is no part of the losses"
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-7, name


@pytest.mark.parametrize("task", [ROUTING, SCRIPTED], ids=["routing", "vectors"])
def test_model_overfits_one_batch(task: Task):
    learner = Learner(world_model(task, free_nats=0.0), lr=1e-2)
    if task.rules is None:
        batch = scripted_replay().sample_windows(4, 8, generator=generator())
    else:
        batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    totals = [learner.learn(batch) for _ in range(80)]
    assert sum(totals[-5:]) / 5 < totals[0] / 3


def test_rows_beyond_the_first_episode_carry_no_weight():
    model = world_model(ROUTING, reward_latent=True, **every_scale(1.0))
    without_zero_outputs(model)
    batch = routing_replay().sample_episodes(4, NODES + 4, generator=generator())
    assert batch["is_first"][:, NODES + 1].all()
    noise = torch.rand(4, NODES + 4, model.rssm.stoch_size)
    episode = {key: value[:, : NODES + 1] for key, value in batch.items()}
    longer, _ = model.loss(batch, noise)
    alone, _ = model.loss(episode, noise[:, : NODES + 1])
    assert longer.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(longer[name], alone[name], msg=f"{name} counts rows beyond the episode")


def test_kl_is_free_below_the_free_nats():
    model = world_model(ROUTING, free_nats=1e6)
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    losses, _ = model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))
    assert losses["dyn"] == losses["rep"] == 1e6


def test_kl_terms_pull_one_side_each():
    model = world_model(ROUTING, free_nats=0.0)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    losses, _ = model.loss(batch, torch.rand(4, NODES + 1, model.rssm.stoch_size))
    prior, posterior = list(model.rssm.prior.parameters()), list(model.rssm.posterior.parameters())
    assert torch.autograd.grad(losses["dyn"], prior, retain_graph=True)[0].abs().max() > 0
    assert all(
        gradient is None for gradient in torch.autograd.grad(losses["rep"], prior, retain_graph=True, allow_unused=True)
    )
    assert torch.autograd.grad(losses["rep"], posterior)[0].abs().max() > 0


class EverythingClosed(NodeHead):
    """A mask head that holds no node for open."""

    def forward(self, feat: Tensor, nodes: Tensor) -> Tensor:
        return super().forward(feat, nodes) - 100


def test_predicted_mask_keeps_its_best_node_open():
    model = world_model(ROUTING)
    context = model.context(TSPInstance(torch.rand(3, NODES, 2)))
    model.heads["mask"] = EverythingClosed(model.rssm.feat_size, context.nodes.shape[-1], units=8)
    mask = model.predict_mask(torch.randn(3, 5, model.rssm.feat_size), context)
    assert (mask.sum(-1) == 1).all()


def test_begin_equals_observing_the_first_row():
    model = world_model(ROUTING)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    noise = torch.rand(4, NODES + 1, model.rssm.stoch_size)
    latents, _, _, context = model.observe(batch, noise)
    assert context is not None
    state = TSPRules.reset(TSPInstance(batch["coords"][:, :1]))
    begun = model.begin(context, state, noise[:, :1])
    for mine, theirs in zip(begun, latents, strict=True):
        torch.testing.assert_close(mine, theirs[:, :1])


def test_observe_carries_nothing_over_an_episodes_end():
    model = world_model(SCRIPTED)
    batch = scripted_replay().sample_windows(4, 2 * EPISODE_ROWS, generator=generator())
    noise = torch.rand(4, 2 * EPISODE_ROWS, model.rssm.stoch_size)
    other = {**batch, "clock": batch["clock"].clone(), "prev_action": batch["prev_action"].clone()}
    begins, other_noise = batch["is_first"].int().argmax(1), noise.clone()
    for row, begin in enumerate(begins.tolist()):
        other_noise[row, :begin] = 1 - noise[row, :begin]
        other["clock"][row, :begin] += 1.0
        other["prev_action"][row, : begin + 1] = 1
    latents, others = model.observe(batch, noise)[0].feat(), model.observe(other, other_noise)[0].feat()
    assert (begins > 0).any()
    for row, begin in enumerate(begins.tolist()):
        assert torch.equal(latents[row, begin:], others[row, begin:])
        assert begin == 0 or not torch.equal(latents[row, :begin], others[row, :begin])


@pytest.mark.parametrize(
    ("actor_type", "expected"), [("tsp_pointer", TSPPointerActor), ("masked", MaskedActor), ("mlp", MaskedActor)]
)
def test_make_actor_builds_every_type(actor_type: str, expected: type):
    assert type(make_actor(ROUTING, 12, debug_config(**{"actor.type": actor_type}).actor)) is expected


def test_make_actor_refuses_an_unknown_type():
    with pytest.raises(ValueError, match="actor.type is 'transformer'; choose tsp_pointer, masked or mlp"):
        make_actor(ROUTING, 12, debug_config(**{"actor.type": "transformer"}).actor)


def test_make_actor_refuses_a_pointer_where_there_are_no_nodes():
    with pytest.raises(ValueError, match="this task has none; choose mlp or masked"):
        make_actor(SCRIPTED, 12, debug_config().actor)
