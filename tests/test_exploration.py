"""What is not known yet as a reward: the ensemble's formula, what its gradients reach, and the sea it is needed in."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dreamer
import grpo
import sac
from config import UserError
from envs.deep_sea import DeepSeaEnv
from imagining.exploration import Explorer
from networks import Latent
from parts.latents import Chosen
from tests.scenes import SCRIPTED, Scene, generator, refusal, scripted_replay

ROWS = 3


def explorer_of(scene: Scene) -> Explorer:
    assert scene.behavior.explorer is not None
    return scene.behavior.explorer


def exploring(**changes: object) -> Scene:
    return Scene(SCRIPTED, explore__scale=2.0, explore__members=3, **changes)


def replayed(seed: int = 0) -> dict[str, Tensor]:
    return scripted_replay().sample_windows(8, 12, generator=generator(seed))


def answering(explorer: Explorer, answers: list[float]) -> Explorer:
    """Let member m expect the number m of `answers` in every place, whatever it is asked."""
    for members in (explorer.learnt, explorer.prior):
        nn.init.zeros_(members.output.weight)
        nn.init.zeros_(members.output.bias)
    each = torch.tensor(answers).repeat_interleave(len(explorer.learnt.output.bias) // len(answers))
    explorer.learnt.output.bias = nn.Parameter(each)
    return explorer


def test_disagreement_is_the_variance_between_members():
    explorer = answering(explorer_of(exploring()), [0.0, 1.0, 5.0])
    deter = torch.randn(2, ROWS, explorer.learnt.first.in_features)
    # The mean is 2, and (4 + 1 + 9) / 2 is 7.
    torch.testing.assert_close(explorer.disagreement(deter), torch.full((2, ROWS), 7.0))
    torch.testing.assert_close(explorer.bonus(torch.cat((deter, deter), -1)), torch.full((2, ROWS), 14.0))


def test_loss_is_the_squared_error_of_what_follows_an_action():
    scene = exploring()
    batch, explorer = replayed(), answering(explorer_of(scene), [0.0, 0.0, 1.0])
    observed = scene.observe(batch)
    embed, total, count = scene.model.encoder(batch).detach(), 0.0, 0
    for row in range(8):
        for step in range(12):
            if not batch["is_first"][row, step]:
                total += sum(float((answer - embed[row, step]).square().mean()) for answer in (0.0, 0.0, 1.0)) / 3
                count += 1
    loss, metrics = explorer.loss(batch, observed)
    assert 0 < count < 8 * 12
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)
    # The mean is 1/3, and (1/9 + 1/9 + 4/9) / 2 is 1/3.
    assert float(metrics["disagreement"]) == pytest.approx(1 / 3)


def test_members_do_not_see_one_another():
    learnt = explorer_of(exploring()).learnt
    predicted = learnt(torch.randn(5, learnt.first.in_features))
    gradients = torch.autograd.grad(predicted[:, 1].square().sum(), list(learnt.parameters()))
    for (name, parameter), gradient in zip(learnt.named_parameters(), gradients, strict=True):
        parts = gradient if gradient.dim() == 3 else gradient.chunk(3)
        assert len(parts) == 3, f"{name} {tuple(parameter.shape)} is not a part for each member"
        assert [bool(part.any()) for part in parts] == [False, True, False], name


def test_latents_by_classes_are_worth_what_those_by_one_hot_vectors_are():
    scene = exploring()
    explorer, rssm = explorer_of(scene), scene.model.rssm
    classes = torch.randint(rssm.classes, (4, 5, rssm.stoch_size), generator=generator())
    deter = torch.randn(4, 5, rssm.deter_size)
    one_hot = nn.functional.one_hot(classes, rssm.classes).float()
    torch.testing.assert_close(explorer.bonus(Chosen(deter, classes)), explorer.bonus(Latent(deter, one_hot).feat()))


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_gradients_of_the_explorer_reach_it_alone_and_no_other_loss_reaches_it(gradient: str):
    scene = exploring(imag_gradient=gradient)
    batch = replayed()
    losses, _ = scene.losses(batch, scene.observe(batch))
    explorer, everything = explorer_of(scene), (scene.model, scene.behavior)
    own = {id(parameter) for parameter in explorer.parameters()}
    others = [p for part in everything for p in part.parameters() if id(p) not in own and p.requires_grad]
    assert {"actor", "critic", "explore", "replay_value"} == losses.keys()
    for name, loss in losses.items():
        inside = torch.autograd.grad(loss, list(explorer.learnt.parameters()), retain_graph=True, allow_unused=True)
        outside = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
        assert any(part is not None and bool(part.any()) for part in inside) == (name == "explore"), name
        assert any(part is not None and bool(part.any()) for part in outside) == (name != "explore"), name
    assert all(parameter.requires_grad for parameter in explorer.learnt.parameters())
    assert not any(parameter.requires_grad for parameter in explorer.prior.parameters())


def test_dynamics_gradients_lead_the_actor_to_what_is_new():
    scene = exploring(imag_gradient="dynamics", actor__entropy=0.0, actor__entropy_final=0.0)
    start = scene.start(replayed())
    for parameter in scene.model.parameters():
        parameter.requires_grad_(False)
    trajectory = scene.imagine(start, horizon=2, differentiable=True)
    feat = trajectory.feat(slice(1, None))
    assert isinstance(feat, Tensor)
    gradients = torch.autograd.grad(
        explorer_of(scene).bonus(feat).sum(), list(scene.behavior.actor.parameters()), allow_unused=True
    )
    assert any(part is not None and bool(part.any()) for part in gradients)


def test_what_is_new_is_added_to_what_imagined_actions_earn():
    plain, scene = Scene(SCRIPTED), exploring()
    scene.behavior.load_state_dict({**scene.behavior.state_dict(), **plain.behavior.state_dict()})
    scene.model.load_state_dict(plain.model.state_dict())
    answering(explorer_of(scene), [0.0, 1.0, 5.0])
    start, trajectory = scene.imagine_from(replayed())
    reward, metrics = scene.behavior._earned(trajectory, start)
    torch.testing.assert_close(reward, plain.behavior._earned(trajectory, start)[0] + 14.0)
    assert float(metrics["intrinsic_reward"]) == pytest.approx(14.0)


def test_an_imagined_action_is_worth_what_is_not_known_of_the_latent_after_it():
    scene = exploring()
    start, trajectory = scene.imagine_from(replayed())
    reward, _ = scene.behavior._earned(trajectory, start)
    feat = trajectory.feat(slice(None))
    assert isinstance(feat, Tensor)
    deter = feat[:, :, 1:, : scene.model.rssm.deter_size]
    expected = scene.imagination.reward(trajectory, start) + 2 * explorer_of(scene).disagreement(deter)
    torch.testing.assert_close(reward, expected)


def test_replayed_rewards_have_what_the_action_before_was_worth_but_at_the_first_row_of_an_episode():
    scene, batch = exploring(), replayed()
    before = copy.deepcopy(batch)
    observed = scene.observe(batch)
    rewarded = answering(explorer_of(scene), [0.0, 1.0, 5.0]).rewarded(batch, observed)
    torch.testing.assert_close(rewarded["reward"] - batch["reward"], 14.0 * (~batch["is_first"]).float())
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_critic_learns_from_replayed_rewards_with_what_was_new_in_them(monkeypatch: pytest.MonkeyPatch):
    scene, batch, seen = exploring(), replayed(), []
    observed = scene.observe(batch)
    answering(explorer_of(scene), [0.0, 1.0, 5.0])
    plain = scene.behavior.replay_value_loss

    def watched(batch: dict[str, Tensor], *others: Any) -> Tensor:
        seen.append(batch["reward"])
        return plain(batch, *others)

    monkeypatch.setattr(scene.behavior, "replay_value_loss", watched)
    scene.losses(batch, observed)
    (reward,) = seen
    torch.testing.assert_close(reward, explorer_of(scene).rewarded(batch, observed)["reward"])
    assert not torch.equal(reward, batch["reward"])


def test_disagreement_falls_on_what_was_seen_and_stays_on_what_was_not():
    scene = exploring()
    explorer, batch = explorer_of(scene), replayed()
    with torch.no_grad():
        observed = scene.observe(batch)
    seen = observed.latents.deter[~batch["is_first"]]
    new = seen[:, torch.randperm(seen.shape[1], generator=generator())]
    optimizer = torch.optim.Adam(explorer.learnt.parameters(), lr=3e-3)

    def spread(deter: Tensor) -> float:
        return float(explorer.disagreement(deter).detach().mean())

    before = spread(seen)
    for _ in range(150):
        loss, _ = explorer.loss(batch, observed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert spread(seen) < 0.05 * before
    assert spread(new) > 5 * spread(seen)


def test_nothing_is_built_without_a_scale():
    assert Scene(SCRIPTED).behavior.explorer is None


def test_exploration_is_refused_in_routing(capsys: pytest.CaptureFixture[str], tmp_path):
    with pytest.raises(UserError, match=r"explore.scale is 0\.5, which is for gymnasium tasks"):
        Scene(explore__scale=0.5)
    line = refusal(capsys, "--configs", "debug", "--explore.scale", "0.5", "--logdir", str(tmp_path / "run"))
    assert "model.move_heads" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", [sac, grpo])
def test_exploration_is_refused_by_agents_without_a_model(program, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        program.main(["--explore.scale", "1"])
    assert "only dreamer.py reads explore.scale" in capsys.readouterr().err


@pytest.mark.run
def test_a_run_that_explores_learns_by_four_groups_and_goes_on(tmp_path, capsys: pytest.CaptureFixture[str]):
    command = ["--configs", "deep_sea", "debug", "--logdir", str(tmp_path), "--eval_every", "0", "--steps"]
    dreamer.main([*command, "120"])
    log = (tmp_path / "metrics.jsonl").read_text()
    assert all(f'"{name}"' in log for name in ("intrinsic_reward", "disagreement", "explore_loss", "explore_grad_norm"))
    dreamer.main([*command, "160"])
    assert "goes on from its checkpoint at step 120" in capsys.readouterr().err


# The deep sea


def test_deep_sea_rewards_only_who_goes_right_all_the_way():
    env = DeepSeaEnv(size=4)
    rewards = []
    env.reset()
    for row in range(4):
        obs, reward, terminated, truncated, _ = env.step(int(env.right[row, row]))
        rewards.append(reward)
        assert not truncated and terminated == (row == 3)
    # Each move to the right costs 0.01 / 4, and the last one finds the treasure.
    assert rewards == pytest.approx([-0.0025, -0.0025, -0.0025, 0.9975])
    assert not obs.any()


def test_deep_sea_lets_nobody_through_a_wall():
    env = DeepSeaEnv(size=3)
    env.reset()
    obs, reward, *_ = env.step(1 - int(env.right[0, 0]))
    assert reward == 0 and obs[1].tolist() == [1, 0, 0]


def test_deep_sea_refuses_a_size_that_is_none():
    with pytest.raises(ValueError, match="size is 1"):
        DeepSeaEnv(size=1)


def test_deep_sea_is_bsuites():
    deep_sea = pytest.importorskip("bsuite.environments.deep_sea")
    theirs, ours = deep_sea.DeepSea(10, mapping_seed=42), DeepSeaEnv()
    draws = np.random.default_rng(0)
    for _ in range(50):
        first, (obs, _) = theirs.reset(), ours.reset()
        assert (first.observation == obs).all()
        follows, ended = draws.random() < 0.5, False
        while not ended:
            right = int(ours.right[ours.episode]) if follows else int(draws.integers(2))
            step, (obs, reward, ended, _, _) = theirs.step(right), ours.step(right)
            assert (step.observation == obs).all() and step.reward == pytest.approx(reward)
            assert step.last() == ended
