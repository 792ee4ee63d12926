from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import config
import envs.routing
import networks
from config import Config
from dreamer import Dreamer, imagination_settings
from envs.routing import TSPEnv, TSPInstance, TSPRules, TSPState, tour_length
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from guard import Guard
from imagination import Imagination, Noise, Start, Trajectory, expand_instance, imagine
from launch import make_generators
from models import ImagBehavior, WorldModel, load_function
from networks import MoveHead, TSPPointerActor, take_nodes
from optimizer import Optimizer
from replay import Replay
from tools import OneHotDist

CPU = torch.device("cpu")
NODES = 6
ROUTING = Task(rules=TSPRules, num_actions=NODES, vectors={})
CONFIG_PATH = Path(config.__file__).with_name("configs.yaml")

# Six nodes in the unit square; the longest leg is a diagonal.
COORDS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.0]])
DIAGONAL = math.sqrt(2)
RANGE = (torch.tensor(-0.9), torch.tensor(-0.1))

CRITIC: dict[str, Any] = {"baseline": "critic", "imag_start": "replay", "imag_first": "stored"}


def debug_config(**changes: Any) -> Config:
    """The section `debug`; a double underscore reaches into a section."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load(CONFIG_PATH, ["debug"], {}).replace(**dotted)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def episodes(count: int, coords: Tensor | None = None) -> dict[str, Tensor]:
    """Whole random tours, laid out as replay gives them."""
    draws = generator(5)
    coords = torch.rand(count, NODES, 2, generator=draws) if coords is None else coords.expand(count, -1, -1)
    env = RoutingVectorEnv(TSPRules, num_envs=count, num_nodes=NODES, device=CPU, instances=coords)
    obs, _ = env.reset()
    reward, ended = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    prev_action, rows = torch.zeros(count, dtype=torch.int64), []
    for step in range(NODES + 1):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": torch.full_like(ended, step == 0), "is_last": ended, "is_terminal": ended}
        rows.append({**obs, **flags, "action": action, "prev_action": prev_action, "reward": reward})
        if step < NODES:
            obs, reward, ended, _, _ = env.step(action)
            prev_action = action
    return {key: torch.stack([row[key] for row in rows], 1) for key in rows[0]}


class Scene:
    """A world model and a behaviour in it, made from the section `debug` with some keys changed."""

    def __init__(self, task: Task = ROUTING, **changes: Any) -> None:
        torch.manual_seed(0)
        settings = debug_config(**changes)
        self.model = WorldModel(task, settings.model)
        self.guard = Guard("cpu")
        self.behavior = ImagBehavior(
            task,
            self.model,
            imagination=imagination_settings(settings),
            actor=settings.actor,
            critic=settings.critic,
            schedule=settings.schedule,
            guard=self.guard,
        )

    def start(self, batch: dict[str, Tensor], seed: int = 0) -> Start:
        return self.behavior.start(self.model, batch, generator(seed))

    def imagine(
        self, start: Start, *, horizon: int = NODES, seed: int = 1, mask: str = "rules", differentiable: bool = False
    ) -> Trajectory:
        draws, shape = generator(seed), start.weight.shape
        noise = Noise(
            latent=torch.rand(horizon, *shape, self.model.rssm.stoch_size, generator=draws),
            action=torch.rand(horizon, *shape, generator=draws),
        )
        return imagine(
            self.model,
            self.behavior.actor,
            start=start,
            tables=self.behavior._tables(self.model, start.context),
            noise=noise,
            horizon=horizon,
            mask=mask,
            differentiable=differentiable,
        )

    def imagine_from(self, batch: dict[str, Tensor], **choices: Any) -> tuple[Start, Trajectory]:
        start = self.start(batch)
        return start, self.imagine(start, **choices)

    def update(self, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
        return self.behavior.update(self.model, batch, progress=0.0, reward_range=RANGE, generator=generator(seed))


def pointer_of(scene: Scene) -> TSPPointerActor:
    assert isinstance(scene.behavior.actor, TSPPointerActor)
    return scene.behavior.actor


def costly_legs(scene: Scene) -> Scene:
    """Let a move cost its length by the head, which starts at zero."""
    return with_head(scene, times_length=-1.0)


def with_head(scene: Scene, *, times_length: float = 0.0, constant: float = 0.0) -> Scene:
    """Let the head's answer be one number times the length, plus another."""
    head = scene.model.heads["reward"]
    assert isinstance(head, MoveHead)
    nn.init.zeros_(head.output.weight)
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([times_length, constant]))
    return scene


def state_of(trajectory: Trajectory) -> TSPState:
    assert trajectory.state is not None
    return trajectory.state


def instance_of(start: Start) -> TSPInstance:
    assert start.context is not None
    return start.context.instance


def tours_of(trajectory: Trajectory) -> Tensor:
    """Nodes in visiting order, [B, Q, N], beginning with the first one."""
    return torch.cat((state_of(trajectory).first[:, :, :1], trajectory.action[:, :, :-1]), -1)


def lengths(coords: Tensor, tours: Tensor) -> Tensor:
    each = coords[:, None].expand(*tours.shape, 2).flatten(0, 1)
    return tour_length(each, tours.flatten(0, 1)).view(tours.shape[:2])


# Legality


@pytest.mark.parametrize("start", ["episodes", "replay"])
@pytest.mark.parametrize(
    "actor",
    [{"actor__type": "masked"}, {"actor__pointer__latent": 0}, {"actor__unimix": 0.3}],
    ids=["masked", "pointer", "pointer with unimix 0.3"],
)
def test_imagination_never_takes_an_illegal_action(start: str, actor: dict[str, Any]):
    scene = Scene(imag_tours=8, imag_start=start, imag_first="stored", **actor)
    _, trajectory = scene.imagine_from(episodes(64))
    legal = TSPRules.action_mask(TSPState(*(part[:, :, :-1] for part in state_of(trajectory))))
    assert trajectory.action.numel() >= 3000
    assert legal.gather(-1, trajectory.action[..., None]).all()


@pytest.mark.parametrize("choices", [{}, CRITIC, {"imag_reward": "simulated"}, {"imag_gradient": "dynamics"}])
def test_miss_rate_is_exactly_0_under_the_rules(choices: dict[str, Any]):
    metrics = Scene(**choices).update(episodes(16))
    assert metrics["miss_rate"] == 0
    assert metrics["imag_mask_step_0"] == 1


@pytest.mark.parametrize("first", ["any", "stored"])
def test_imagined_tours_are_permutations_that_close(first: str):
    _, trajectory = Scene(imag_tours=NODES, imag_first=first).imagine_from(episodes(32))
    tours = tours_of(trajectory)
    assert (tours.sort(-1).values == torch.arange(NODES)).all()
    assert torch.equal(trajectory.action[:, :, -1], state_of(trajectory).first[:, :, 0])
    assert torch.equal(trajectory.cont, torch.tensor([1.0] * (NODES - 1) + [0.0]).expand_as(trajectory.cont))


def test_predicted_mask_at_initialisation_takes_illegal_actions():
    scene = Scene(imag_mask="predicted")
    metrics = scene.update(episodes(32))
    assert metrics["miss_rate"] > 0.05
    assert {f"imag_mask_step_{step}" for step in range(NODES)} <= metrics.keys()


def test_leaking_unimix_takes_illegal_actions(monkeypatch: pytest.MonkeyPatch):
    class LeakingDist(OneHotDist):
        """Spreads the uniform share over all actions, after the mask."""

        def __init__(self, logits: Tensor, *, mask: Tensor | None = None, unimix: float = 0.0) -> None:
            super().__init__(((1 - unimix) * OneHotDist(logits, mask=mask).probs + unimix / logits.shape[-1]).log())

    scene, batch = Scene(actor__unimix=0.1), episodes(32)
    assert scene.update(batch)["miss_rate"] == 0
    monkeypatch.setattr(networks, "OneHotDist", LeakingDist)
    assert scene.update(batch)["miss_rate"] > 0.005


def test_imag_mask_step_0_is_the_agreement_with_the_rules():
    scene, batch = Scene(imag_mask="predicted"), episodes(16)
    start = scene.start(batch)
    assert start.latent is not None and start.context is not None
    predicted = scene.model.predict_mask(start.latent.feat(), start.context)
    true = torch.ones(16, 4, NODES, dtype=torch.bool)
    # Tours of one instance begin at nodes 0, 1, 3 and 4, which alone are closed.
    true[:, range(4), [0, 1, 3, 4]] = False
    metrics = scene.update(batch)
    torch.testing.assert_close(metrics["imag_mask_step_0"], (predicted == true).float().mean())
    assert 0 < metrics["imag_mask_step_0"] < 1
    assert metrics["imag_legal_step_0"] == NODES - 1


def test_true_state_is_stepped_alongside_a_predicted_mask():
    _, trajectory = Scene(imag_mask="predicted").imagine_from(episodes(8), mask="predicted")
    assert trajectory.mask is not None and trajectory.true_mask is not None
    assert not torch.equal(trajectory.mask, trajectory.true_mask)
    assert torch.equal(trajectory.true_mask, TSPRules.action_mask(state_of(trajectory)))
    assert trajectory.mask[:, :, :-1].gather(-1, trajectory.action[..., None]).all()


def test_penalty_is_taken_from_illegal_moves_alone():
    batch = episodes(32)
    plain, punished = (Scene(imag_mask="predicted", imag_penalty=penalty) for penalty in (0.0, 2.0))
    start, trajectory = plain.imagine_from(batch, mask="predicted")
    assert trajectory.true_mask is not None
    legal = trajectory.true_mask[:, :, :-1].gather(-1, trajectory.action[..., None])[..., 0]
    difference = plain.behavior.reward(plain.model, trajectory, start) - punished.behavior.reward(
        punished.model, trajectory, start
    )
    assert (~legal).any()
    torch.testing.assert_close(difference, 2.0 * (~legal).float() * trajectory.alive)


# Against the environments


def test_imagined_states_equal_those_of_the_vector_environment():
    scene, batch = Scene(imag_reward="simulated", imag_first="stored"), episodes(16)
    start, trajectory = scene.imagine_from(batch)
    reward = scene.behavior.reward(scene.model, trajectory, start)
    state, rows = state_of(trajectory), trajectory.action.shape[0] * trajectory.action.shape[1]
    coords = instance_of(start).coords.repeat_interleave(trajectory.action.shape[1], 0)
    env = RoutingVectorEnv(TSPRules, num_envs=rows, num_nodes=NODES, device=CPU, instances=coords, check_actions=True)
    obs, _ = env.reset()
    for step in range(NODES + 1):
        assert torch.equal(obs["current_node"], state.current[:, :, step].flatten())
        assert torch.equal(obs["visited"], state.visited[:, :, step].flatten(0, 1))
        assert trajectory.mask is not None
        assert torch.equal(obs["action_mask"], trajectory.mask[:, :, step].flatten(0, 1))
        if step < NODES:
            obs, earned, terminated, _, _ = env.step(trajectory.action[:, :, step].flatten())
            torch.testing.assert_close(earned, reward[:, :, step].flatten())
            assert torch.equal(terminated, trajectory.cont[:, :, step].flatten() == 0)


def test_imagined_states_equal_those_of_the_gymnasium_environment():
    scene = Scene(imag_reward="simulated", imag_first="stored")
    start, trajectory = scene.imagine_from(episodes(1))
    reward, state = scene.behavior.reward(scene.model, trajectory, start), state_of(trajectory)
    for tour in range(trajectory.action.shape[1]):
        env = TSPEnv(num_nodes=NODES)
        obs, _ = env.reset(options={"coords": instance_of(start).coords[0].numpy()})
        for step, action in enumerate(trajectory.action[0, tour].tolist()):
            assert obs["current_node"] == state.current[0, tour, step]
            assert obs["visited"].tolist() == state.visited[0, tour, step].tolist()
            obs, earned, terminated, _, _ = env.step(action)
            assert earned == pytest.approx(float(reward[0, tour, step]), abs=1e-6)
        assert terminated


@pytest.mark.parametrize("first", ["any", "stored"])
def test_simulated_return_is_minus_the_tours_length(first: str):
    scene = Scene(imag_reward="simulated", imag_first=first)
    start, trajectory = scene.imagine_from(episodes(16))
    returns = scene.behavior.reward(scene.model, trajectory, start).sum(-1)
    torch.testing.assert_close(-returns, lengths(instance_of(start).coords, tours_of(trajectory)))


def test_head_comes_close_to_the_true_cost_from_replayed_moves_alone():
    head, truth = Scene(), Scene(imag_reward="simulated")
    batch = episodes(128)
    optimizer = Optimizer("model", {"model": head.model}, guard=Guard("cpu"), lr=1e-2, clip=10.0)
    for _ in range(150):
        loss = head.model.move_loss(batch, TSPInstance(batch["coords"][:, 0]), None)
        optimizer.step(loss, progress=0.0)
    start, trajectory = head.imagine_from(episodes(64))
    predicted = head.behavior.reward(head.model, trajectory, start)
    simulated = truth.behavior.reward(truth.model, trajectory, start)
    assert (predicted - simulated).abs().mean() < 0.04
    assert simulated.abs().mean() > 0.3


@pytest.fixture
def cost_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may ask what a move costs."""

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("the true cost was asked for")

    monkeypatch.setattr(TSPRules, "cost", staticmethod(refuse))
    monkeypatch.setattr(TSPRules, "longest_leg", staticmethod(refuse))
    monkeypatch.setattr(envs.routing, "leg_lengths", refuse)


def filled_replay() -> Replay:
    num_envs, draws = 4, generator()
    env = RoutingVectorEnv(TSPRules, num_envs=num_envs, num_nodes=NODES, device=CPU, generator=draws)
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    replay = Replay({**spaces, "action": ((), torch.int64)}, num_envs=num_envs, capacity=400, device=CPU)
    reward, ended = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
    for _ in range(5 * (NODES + 1)):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **flags, "action": action, "reward": reward})
        obs, reward, ended, _, info = env.step(action)
    return replay


def agent(**changes: Any) -> Dreamer:
    return Dreamer(ROUTING, debug_config(**changes), device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))


@pytest.fixture
def replay() -> Replay:
    return filled_replay()


def test_learned_reward_never_asks_for_the_true_cost(replay: Replay, cost_refused: None):
    learner = agent(imag_reward="head")
    for update in range(20):
        learner.update(replay, progress=update / 20)
    assert learner.updates == 20


def test_simulated_reward_asks_for_the_true_cost(replay: Replay, cost_refused: None):
    with pytest.raises(AssertionError, match="the true cost was asked for"):
        agent(imag_reward="simulated").update(replay, progress=0.0)


# Starts


def test_episode_starts_are_spread_over_the_nodes():
    for tours, expected in ((NODES, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (2, [0, 3])):
        start = Scene(imag_tours=tours).start(episodes(4))
        assert start.state is not None
        assert start.state.first.tolist() == [expected] * 4
        assert torch.equal(start.state.current, start.state.first)
        assert torch.equal(start.state.visited, torch.eye(NODES, dtype=torch.bool)[start.state.first])


def test_stored_starts_begin_at_the_stored_node():
    start = Scene(imag_first="stored").start(episodes(4))
    assert start.state is not None
    assert start.state.first.tolist() == [[0, 0, 0, 0]] * 4
    assert (start.weight == 1).all()


def test_replay_starts_are_the_replayed_rows():
    batch = episodes(4)
    start = Scene(imag_start="replay", imag_first="stored", imag_tours=2).start(batch)
    assert start.state is not None and start.latent is not None
    assert start.weight.shape == (4, 2 * (NODES + 1))
    assert torch.equal(start.state.current[:, ::2], batch["current_node"])
    assert torch.equal(start.state.current[:, 1::2], batch["current_node"])
    assert torch.equal(start.state.visited[:, 1::2], batch["visited"])
    # Nothing is left to decide once the episode has ended.
    assert torch.equal(start.weight, torch.tensor([1.0] * 2 * NODES + [0.0, 0.0]).expand(4, -1))


def test_replay_starts_beyond_the_first_episode_do_not_count():
    once = episodes(4)
    twice = {key: torch.cat((value, value), 1) for key, value in once.items()}
    start = Scene(**CRITIC, imag_tours=1).start(twice)
    assert torch.equal(start.weight, torch.tensor([1.0] * NODES + [0.0] * (NODES + 2)).expand(4, -1))


def test_alive_ends_with_the_episode_and_reward_with_it():
    scene = with_head(Scene(**CRITIC, imag_tours=1), constant=-1.0)
    start, trajectory = scene.imagine_from(episodes(4))
    # From row t of an episode there are N - t decisions to take.
    expected = torch.tensor([[1.0] * (NODES - row) + [0.0] * row for row in range(NODES + 1)])
    assert torch.equal(trajectory.alive, expected.expand(4, -1, -1))
    reward = scene.behavior.reward(scene.model, trajectory, start)
    assert (reward[trajectory.alive == 0] == 0).all()
    assert (reward[trajectory.alive == 1] == -1).all()


def test_augmentation_changes_coordinates_and_keeps_lengths():
    batch = episodes(64)
    scene = Scene(imag_reward="simulated", imag_augment=True)
    start, trajectory = scene.imagine_from(batch)
    augmented, stored = instance_of(start).coords, batch["coords"][:, 0]
    unchanged = (augmented - stored).abs().amax((1, 2)) < 1e-6
    # One symmetry in eight is the identity.
    assert 0 < unchanged.sum() < 20
    tours = tours_of(trajectory)
    torch.testing.assert_close(lengths(augmented, tours), lengths(stored, tours))
    torch.testing.assert_close(-scene.behavior.reward(scene.model, trajectory, start).sum(-1), lengths(stored, tours))


def test_expanded_instance_is_a_view():
    instance = TSPInstance(torch.rand(3, NODES, 2))
    expanded = expand_instance(instance, torch.Size((3, 4, 5))).coords
    assert expanded.shape == (3, 4, 5, NODES, 2)
    assert (expanded == instance.coords[:, None, None]).all()
    assert expanded.data_ptr() == instance.coords.data_ptr()


# Trajectories


def equal(one: Trajectory, other: Trajectory) -> bool:
    return torch.equal(one.action, other.action) and (
        one.feat is None or other.feat is None or torch.equal(one.feat, other.feat)
    )


def test_same_noise_gives_the_same_trajectory():
    scene = Scene()
    start = scene.start(episodes(16))
    assert equal(scene.imagine(start, seed=1), scene.imagine(start, seed=1))
    assert not equal(scene.imagine(start, seed=1), scene.imagine(start, seed=2))


def test_same_generator_gives_the_same_update():
    one, other, batch = Scene(), Scene(), episodes(8)
    metrics, again = one.update(batch, seed=3), other.update(batch, seed=3)
    assert all(torch.equal(metrics[name], again[name]) for name in metrics)
    for mine, theirs in zip(one.behavior.parameters(), other.behavior.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_greedy_imagination_draws_nothing_and_takes_the_likeliest_tour():
    scene = Scene()
    instance = TSPInstance(torch.rand(8, NODES, 2))
    before = torch.get_rng_state()
    trajectory, reward = scene.behavior.imagine_greedily(scene.model, instance)
    again, _ = scene.behavior.imagine_greedily(scene.model, instance)
    assert equal(trajectory, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tours_of(trajectory).sort(-1).values == torch.arange(NODES)).all()
    assert reward.shape == trajectory.action.shape == (8, 1, NODES)
    feat = None if trajectory.feat is None else trajectory.feat[:, :, :-1]
    tables = pointer_of(scene).encode(TSPRules.node_features(instance))
    assert torch.equal(scene.behavior.actor(feat, tables, trajectory.view(slice(0, -1))).mode(), trajectory.action)


def test_differentiable_imagination_equals_the_plain_one():
    scene = Scene(imag_gradient="dynamics")
    start = scene.start(episodes(8))
    plain, graph = scene.imagine(start), scene.imagine(start, differentiable=True)
    assert torch.equal(plain.action, graph.action)
    assert plain.feat is not None and graph.feat is not None and graph.positions is not None
    torch.testing.assert_close(plain.feat, graph.feat)
    coords, state = instance_of(start).coords, state_of(plain)
    torch.testing.assert_close(graph.positions[0], take_nodes(coords, state.current[:, :, :-1]))
    torch.testing.assert_close(graph.positions[1], take_nodes(coords, plain.action))
    assert plain.log_prob is None and plain.positions is None


def test_plain_imagination_keeps_no_graph():
    _, trajectory = Scene().imagine_from(episodes(4))
    assert trajectory.feat is not None
    assert not trajectory.feat.requires_grad and not trajectory.alive.requires_grad


# Targets and advantages


def square_batch(count: int = 1) -> dict[str, Tensor]:
    return episodes(count, COORDS)


def targets(scene: Scene, reward: Tensor, **choices: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    start, trajectory = scene.imagine_from(square_batch(reward.shape[0]), horizon=reward.shape[-1], **choices)
    return scene.behavior.targets(scene.model, trajectory, start, reward, RANGE)


def test_leave_one_out_advantage_by_hand():
    scene = Scene(imag_tours=3, target_clip="none", actor__advantage_scale="none")
    reward = torch.zeros(1, 3, NODES)
    reward[0, :, 0], reward[0, :, -1] = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 2.0])
    returns, advantage, metrics = targets(scene, reward)
    assert returns[0, :, 0].tolist() == [1.0, 2.0, 6.0]
    assert returns[0, :, -1].tolist() == [0.0, 2.0, 2.0]
    # The others' means are 4, 3.5 and 1.5; every decision of a tour shares its advantage.
    assert advantage[0].tolist() == [[-3.0] * NODES, [-1.5] * NODES, [4.5] * NODES]
    assert metrics["imag_return"] == 3.0


def test_leave_one_out_compares_tours_from_the_same_row_only():
    scene = Scene(
        imag_tours=2,
        imag_start="replay",
        imag_first="stored",
        target_clip="none",
        actor__advantage_scale="none",
    )
    reward = torch.zeros(1, 2 * (NODES + 1), NODES)
    reward[0, :, 0] = torch.arange(2.0 * (NODES + 1)).square()
    _, advantage, _ = targets(scene, reward)
    # Rows 2k and 2k + 1 are a pair: (2k + 1)^2 - (2k)^2 = 4k + 1.
    assert advantage[0, ::2, 0].tolist() == [-(4.0 * k + 1) for k in range(NODES + 1)]
    assert advantage[0, 1::2, 0].tolist() == [4.0 * k + 1 for k in range(NODES + 1)]


def test_advantage_is_divided_by_the_scale_and_its_floor():
    reward = torch.zeros(1, 2, NODES)
    reward[0, :, 0] = torch.tensor([0.0, 8.0])
    choices: dict[str, Any] = {"imag_tours": 2, "target_clip": "none", "actor__advantage_floor": 4.0}
    _, advantage, metrics = targets(Scene(**choices), reward)
    # The running range has taken one hundredth of 8 so far: the floor counts.
    assert metrics["advantage_scale"] == 4.0
    assert advantage[0, :, 0].tolist() == [-2.0, 2.0]


def constant_critic(scene: Scene) -> float:
    """Make the critic answer one of its bins, whatever it is asked."""
    critic = scene.behavior.critic
    nn.init.zeros_(critic.mlp.output.weight)
    nn.init.constant_(critic.mlp.output.bias, -1e4)
    with torch.no_grad():
        critic.mlp.output.bias[17] = 0.0
    return float(critic.bins[17])


def test_lambda_targets_by_hand():
    scene = Scene(
        imag_horizon="2", imag_tours=1, baseline="critic", discount=0.5, return_lambda=0.8, target_clip="none"
    )
    value = constant_critic(scene)
    assert value > 1
    returns, advantage, metrics = targets(scene, torch.tensor([[[3.0, 5.0]]]))
    last = 5.0 + 0.5 * value
    first = 3.0 + 0.5 * (0.2 * value + 0.8 * last)
    torch.testing.assert_close(returns, torch.tensor([[[first, last]]]))
    # The percentile range of so few returns is below its floor of 1.
    torch.testing.assert_close(advantage, torch.tensor([[[first - value, last - value]]]))
    assert metrics["value_min"] == metrics["value_max"] == pytest.approx(value)
    assert metrics["target_min"] == pytest.approx(min(first, last))


def test_lambda_targets_bootstrap_nothing_beyond_the_episodes_end():
    scene = Scene(imag_tours=1, baseline="critic", imag_first="stored", return_lambda=0.0, target_clip="none")
    value = constant_critic(scene)
    returns, _, _ = targets(scene, torch.full((1, 1, NODES), -1.0))
    torch.testing.assert_close(returns[0, 0], torch.tensor([value - 1] * (NODES - 1) + [-1.0]))


def bounds(scene: Scene, reward_range: tuple[float, float] = (-0.9, -0.1)) -> tuple[Any, Any]:
    start, trajectory = scene.imagine_from(square_batch())
    limits = (torch.tensor(reward_range[0]), torch.tensor(reward_range[1]))
    return scene.behavior.bounds(scene.model, trajectory, start, limits)


# Before each of a tour's decisions, this many legs are left.
LEGS = torch.arange(NODES, 0, -1).float()


def test_simulated_bounds_are_the_legs_that_remain_times_the_longest():
    low, high = bounds(Scene(imag_reward="simulated"))
    torch.testing.assert_close(low, (-DIAGONAL * LEGS).expand_as(low))
    assert (high == 0).all()


def test_learned_bounds_follow_the_rewards_in_replay():
    low, high = bounds(Scene())
    torch.testing.assert_close(low, (-1.5 * 0.9 * LEGS).expand_as(low))
    assert (high == 0).all()


def test_learned_bounds_lie_above_0_once_a_positive_reward_was_seen():
    low, high = bounds(Scene(), (0.1, 0.2))
    assert (low == 0).all()
    torch.testing.assert_close(high, (1.5 * 0.2 * LEGS).expand_as(high))


@pytest.mark.parametrize(("reward", "leg"), [("simulated", DIAGONAL), ("head", 1.5 * 0.9)])
def test_penalty_widens_the_bounds_by_its_largest_sum(reward: str, leg: float):
    low, high = bounds(Scene(imag_reward=reward, imag_penalty=2.0))
    torch.testing.assert_close(low, (-leg * LEGS - 2.0 * NODES).expand_as(low))
    assert (high == 0).all()


def test_constant_range_and_none_are_taken_as_given():
    low, high = bounds(Scene(target_clip="[-20, 0.5]"))
    assert (float(low), float(high)) == (-20.0, 0.5)
    assert bounds(Scene(target_clip="none")) == (None, None)


def test_targets_are_clipped_and_the_clipped_share_is_logged():
    scene = Scene(imag_tours=2, target_clip="[-5, 0]")
    reward = torch.zeros(1, 2, NODES)
    reward[0, 0] = -1.0
    returns, _, metrics = targets(scene, reward)
    # Only the first of twelve returns, -6, lies outside.
    assert returns[0, 0].tolist() == [-5.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    assert metrics["target_clip_rate"] == pytest.approx(1 / 12)
    assert metrics["target_min"] == -5.0


def test_no_true_return_is_clipped():
    scene, batch = Scene(imag_reward="simulated"), square_batch(4)
    start, trajectory = scene.imagine_from(batch)
    reward = scene.behavior.reward(scene.model, trajectory, start)
    assert scene.behavior.targets(scene.model, trajectory, start, reward, RANGE)[2]["target_clip_rate"] == 0


# Gradients


PLAIN: dict[str, Any] = {
    "actor__grad_clip": 1e9,
    "actor__entropy": 0.0,
    "actor__entropy_final": 0.0,
    "target_clip": "none",
}


def actor_gradient(scene: Scene, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the actor's optimiser was given in one update."""
    scene.update(batch)
    return {
        name: parameter.grad.clone()
        for name, parameter in scene.behavior.actor.named_parameters()
        if parameter.grad is not None
    }


def test_reinforce_gradient_equals_the_one_written_out_by_hand():
    scene, batch = Scene(imag_reward="simulated", imag_tours=3, actor__unimix=0.0, **PLAIN), episodes(4)
    draws = generator()
    start = scene.behavior.start(scene.model, batch, draws)
    noise = scene.behavior._noise(scene.model, start.weight.shape, NODES, draws)
    tables = pointer_of(scene).encode(TSPRules.node_features(instance_of(start)))
    trajectory = imagine(
        scene.model, scene.behavior.actor, start=start, tables=tables.detach(), noise=noise, horizon=NODES
    )
    returns = -lengths(instance_of(start).coords, tours_of(trajectory))
    dist = scene.behavior.actor(
        None if trajectory.feat is None else trajectory.feat[:, :, :-1], tables, trajectory.view(slice(0, -1))
    )
    objective = torch.zeros(())
    for row in range(4):
        for tour in range(3):
            others = [float(returns[row, other]) for other in range(3) if other != tour]
            advantage = float(returns[row, tour]) - sum(others) / 2
            for step, action in enumerate(trajectory.action[row, tour].tolist()):
                objective = objective + advantage * dist.probs[row, tour, step, action].log()
    loss = -objective / (4 * 3 * NODES)
    parameters = dict(scene.behavior.actor.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    actual = actor_gradient(scene, batch)
    assert max(gradient.abs().max() for gradient in actual.values()) > 1e-3
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_dynamics_gradient_reaches_the_actor_through_the_moves():
    gradient = actor_gradient(costly_legs(Scene(imag_gradient="dynamics", **PLAIN)), episodes(8))
    assert gradient.keys() == dict(Scene().behavior.actor.named_parameters()).keys()
    assert all(part.isfinite().all() for part in gradient.values())
    assert gradient["pointer.weight"].abs().max() > 1e-6


def test_dynamics_gradient_of_a_move_is_that_of_the_expected_position():
    scene = costly_legs(Scene(imag_gradient="dynamics", baseline="critic", imag_tours=1, imag_horizon="1", **PLAIN))
    start, trajectory = scene.imagine_from(episodes(8), horizon=1, differentiable=True)
    assert trajectory.positions is not None
    target = trajectory.positions[1]
    reward = scene.behavior.reward(scene.model, trajectory, start).sum()
    parameters = list(scene.behavior.actor.parameters())
    actual = torch.autograd.grad(reward, parameters, allow_unused=True, retain_graph=True)
    (slope,) = torch.autograd.grad(reward, target)
    tables = pointer_of(scene).encode(TSPRules.node_features(instance_of(start)))
    assert trajectory.feat is not None
    probs = scene.behavior.actor(trajectory.feat[:, :, :1], tables, trajectory.view(slice(0, 1))).probs
    expected = torch.autograd.grad(
        (probs @ instance_of(start).coords[:, None] * slope).sum(), parameters, allow_unused=True
    )
    assert max(gradient.abs().max() for gradient in expected if gradient is not None) > 1e-4
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_score_of_an_action_is_not_differentiated_through_the_latents_before_it():
    """Without any share of `dynamics`, `both` is `reinforce`: states are given, however they came about."""
    batch, gradients = episodes(8), []
    alternatives: list[dict[str, Any]] = [
        {"imag_gradient": "reinforce"},
        {"imag_gradient": "both", "imag_gradient_mix": 0.0},
    ]
    for choices in alternatives:
        scene = costly_legs(Scene(**choices, **PLAIN))
        with torch.no_grad():
            # Let the latent matter to the actor.
            pointer_of(scene).query_latent.weight.mul_(10.0)
        gradients.append(actor_gradient(scene, batch))
    reinforce, both = gradients
    for name, expected in reinforce.items():
        assert (both[name] - expected).norm() <= 5e-3 * expected.norm(), name


def test_both_is_the_weighted_sum_of_the_two_gradients():
    batch = episodes(8)
    reinforce, dynamics, both = (
        actor_gradient(costly_legs(Scene(imag_gradient=name, imag_gradient_mix=0.25, **PLAIN)), batch)
        for name in ("reinforce", "dynamics", "both")
    )
    for name in both:
        expected = 0.75 * reinforce[name] + 0.25 * dynamics[name]
        torch.testing.assert_close(both[name], expected, rtol=1e-3, atol=1e-6)


def test_entropy_bonus_follows_its_schedule():
    batch = episodes(8)
    at = {}
    for coefficient in (0.0, 2.0, 4.0):
        scene = Scene(actor__grad_clip=1e9, actor__entropy=coefficient, actor__entropy_final=coefficient)
        at[coefficient] = actor_gradient(scene, batch)
    halfway = Scene(actor__grad_clip=1e9, actor__entropy=0.0, actor__entropy_final=4.0)
    halfway.behavior.update(halfway.model, batch, progress=0.5, reward_range=RANGE, generator=generator())
    for name, parameter in halfway.behavior.actor.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, at[2.0][name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            at[4.0][name] - at[0.0][name], 2 * (at[2.0][name] - at[0.0][name]), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    "choices",
    [{}, CRITIC, {"imag_gradient": "dynamics"}, {"imag_gradient": "both"}, {"imag_mask": "predicted"}],
    ids=["default", "critic", "dynamics", "both", "predicted"],
)
def test_update_changes_actor_and_critic_and_leaves_the_model_alone(choices: dict[str, Any]):
    scene = Scene(**choices)
    costly_legs(scene)
    model, actor, critic = (
        [p.detach().clone() for p in part.parameters()]
        for part in (scene.model, scene.behavior.actor, scene.behavior.critic)
    )
    metrics = scene.update(episodes(8))
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())
    assert scene.guard.report() is None
    assert all(torch.equal(a, b) for a, b in zip(model, scene.model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(actor, scene.behavior.actor.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, scene.behavior.critic.parameters(), strict=True))


def test_slow_critic_follows_at_its_rate():
    scene = Scene(critic__slow_rate=0.25, **CRITIC)
    before = [p.detach().clone() for p in scene.behavior.slow_critic.parameters()]
    scene.update(episodes(8))
    triples = zip(before, scene.behavior.critic.parameters(), scene.behavior.slow_critic.parameters(), strict=True)
    for old, fast, slow in triples:
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_critic_approaches_the_returns_of_the_tours():
    scene = Scene(imag_reward="simulated", critic__share=1.0, critic__lr=1e-2, schedule__warmup=0)
    batch = episodes(16)
    errors = [float(scene.update(batch, seed)["critic_error"]) for seed in range(40)]
    assert sum(errors[-5:]) / 5 < errors[0] / 2


# Choices


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask": "decoded"}, "imag_mask is 'decoded'; choose one of rules, predicted"),
    ({"start": "middle"}, "imag_start is 'middle'"),
    ({"first": "last"}, "imag_first is 'last'"),
    ({"baseline": "mean"}, "baseline is 'mean'; choose one of critic, leave_one_out"),
    ({"gradient": "pathwise"}, "imag_gradient is 'pathwise'"),
    ({"reward": "true"}, "imag_reward is 'true'; choose head, simulated or your own module:function"),
    ({"horizon": 0}, "imag_horizon is 0"),
    ({"horizon": "long"}, "imag_horizon is 'long'"),
    ({"tours": 0}, "imag_tours is 0"),
    ({"discount": 0.0}, "discount must lie in"),
    ({"discount": 1.1}, "discount must lie in"),
    ({"lambda_": -0.1}, "lambda in"),
    ({"tours": 1}, "baseline leave_one_out .* imag_tours of 2 or more, got episode and 1"),
    ({"horizon": 10}, "baseline leave_one_out .* imag_horizon: episode .* got 10 and 16"),
    ({"gradient": "dynamics", "reward": "simulated"}, "imag_gradient dynamics .* imag_reward: head"),
    ({"gradient": "both", "reward": "module:function"}, "imag_gradient both .* imag_reward: head"),
    ({"start": "replay"}, "imag_first: any .* needs imag_start: episodes"),
    ({"augment": True}, "imag_augment .* imag_reward: simulated"),
    ({"target_clip": "wide"}, "target_clip is 'wide'"),
    ({"target_clip": (0.0, -20.0)}, "target_clip is .*lower and an upper bound"),
    ({"target_clip": (-20.0,)}, "target_clip is .*lower and an upper bound"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED, ids=[str(choices) for choices, _ in REFUSED])
def test_imagination_refuses_what_does_not_go_together(choices: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Imagination(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"start": "replay", "first": "stored"},
        {"baseline": "critic", "horizon": 10, "tours": 1},
        {"gradient": "both"},
        {"reward": "simulated", "augment": True},
        {"target_clip": (-20.0, 0.0)},
    ],
    ids=str,
)
def test_imagination_accepts_what_goes_together(choices: dict[str, Any]):
    accepted = Imagination(**choices)
    assert all(getattr(accepted, name) == value for name, value in choices.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imag_mask": "predicted", "model__loss_scales__mask": 0.0}, "imag_mask: predicted needs the mask head"),
        ({"model__loss_scales__reward": 0.0}, "imag_reward: head needs the reward head"),
        ({"target_clip": "[-20; 0]"}, "target_clip is .*two numbers"),
    ],
)
def test_behaviour_refuses_choices_that_the_model_cannot_serve(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Scene(**changes)


@pytest.mark.parametrize("changes", [{}, {"imag_horizon": "3", "baseline": "critic", "imag_reward": "simulated"}])
def test_behaviour_refuses_routing_choices_in_a_task_without_rules(changes: dict[str, Any]):
    task = Task(rules=None, num_actions=3, vectors={"position": 2})
    with pytest.raises(ValueError, match="a task without rules needs imag_horizon as a number of steps"):
        Scene(task, actor__type="mlp", **changes)


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics", "both"])
def test_behaviour_updates_in_a_task_without_rules(gradient: str):
    task = Task(rules=None, num_actions=3, vectors={"position": 2})
    scene = Scene(task, actor__type="mlp", imag_horizon="4", imag_tours=1, imag_gradient=gradient, **CRITIC)
    flags = torch.zeros(4, 7, dtype=torch.bool)
    batch = {
        "position": torch.randn(4, 7, 2),
        "action": torch.randint(3, (4, 7)),
        "prev_action": torch.randint(3, (4, 7)),
        "reward": torch.randn(4, 7),
        "is_first": flags,
        "is_last": flags,
        "is_terminal": flags,
    }
    metrics = scene.update(batch)
    assert all(metric.isfinite() for metric in metrics.values())
    assert "miss_rate" not in metrics and "target_clip_rate" not in metrics


CUSTOM_REWARD = """
def twice_the_node(instance, state, action):
    return 2.0 * action + 0.0 * instance.coords.sum((-1, -2)) + 0 * state.current
"""


def test_custom_reward_is_loaded_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_reward.py").write_text(CUSTOM_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    scene = Scene(imag_reward="own_reward:twice_the_node")
    start, trajectory = scene.imagine_from(episodes(4))
    reward = scene.behavior.reward(scene.model, trajectory, start)
    torch.testing.assert_close(reward, 2.0 * trajectory.action)
    # Nobody knows what range such returns have.
    assert scene.behavior.bounds(scene.model, trajectory, start, RANGE) == (None, None)
    assert scene.update(episodes(4))["imag_return"] == 2.0 * sum(range(NODES))


@pytest.mark.parametrize("name", ["no_such_module:reward", "math:no_such_function"])
def test_custom_reward_that_cannot_be_loaded_is_refused(name: str):
    with pytest.raises(ValueError, match=f"imag_reward names '{name}', which cannot be loaded"):
        load_function(name)
