"""What is not known yet as a reward: the ensemble's formula, what its gradients reach, and the sea it is needed in."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dreamer
import grpo
import sac
from config import UserError
from envs.deep_sea import DeepSeaEnv
from envs.tasks import ActionSpec
from imagining.exploration import Explorer
from networks import Latent
from parts.latents import Chosen
from tests.scenes import SCRIPTED, Scene, generator, random_rows, refusal, scripted_replay

ROWS = 3


def explorer_of(scene: Scene) -> Explorer:
    assert scene.behavior.explorer is not None
    return scene.behavior.explorer


def exploring(**changes: object) -> Scene:
    return Scene(SCRIPTED, explore__scale=2.0, explore__members=3, **changes)


def replayed(seed: int = 0) -> dict[str, Tensor]:
    return scripted_replay().sample_windows(8, 12, generator=generator(seed))


def answering(explorer: Explorer, answers: list[float]) -> Explorer:
    """Let member m expect the number m of `answers` for every class, whatever it is asked."""
    nn.init.zeros_(explorer.output.weight)
    each = torch.tensor(answers).repeat_interleave(explorer.variables * explorer.classes)
    explorer.output.bias = nn.Parameter(each)
    return explorer


def test_disagreement_is_the_variance_between_members_over_the_classes_of_a_variable():
    explorer = answering(explorer_of(exploring()), [0.0, 1.0, 5.0])
    feat, action = torch.randn(2, ROWS, explorer.from_feat.in_features), torch.zeros(2, ROWS, dtype=torch.int64)
    # The mean is 2, and (4 + 1 + 9) / 2 is 7 for each of 4 classes.
    torch.testing.assert_close(explorer.disagreement(feat, action), torch.full((2, ROWS), 28.0))
    torch.testing.assert_close(explorer.bonus(feat, action), torch.full((2, ROWS), 56.0))


def test_loss_is_the_squared_error_of_the_next_rows_probabilities_within_an_episode():
    scene = exploring()
    batch, explorer = replayed(), answering(explorer_of(scene), [0.0, 0.0, 1.0])
    observed = scene.observe(batch)
    probs, total, count = observed.posterior.probs.detach(), 0.0, 0
    for row in range(8):
        for step in range(11):
            if not batch["is_last"][row, step]:
                true = probs[row, step + 1]
                errors = [((answer - true) ** 2).sum(-1).mean() for answer in (0.0, 0.0, 1.0)]
                total, count = total + float(sum(errors)) / 3, count + 1
    loss, metrics = explorer.loss(batch, observed)
    assert 0 < count < 8 * 11
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)
    # The mean is 1/3, and (1/9 + 1/9 + 4/9) / 2 is 1/3 for each of 4 classes.
    assert float(metrics["disagreement"]) == pytest.approx(4 / 3)


def test_members_do_not_see_one_another():
    explorer = explorer_of(exploring())
    feat, action = torch.randn(5, explorer.from_feat.in_features), torch.arange(5) % 3
    predicted = explorer.predict(feat, action)
    gradients = torch.autograd.grad(predicted[:, 1].square().sum(), list(explorer.parameters()))
    for (name, parameter), gradient in zip(explorer.named_parameters(), gradients, strict=True):
        parts = gradient if name.endswith("output.weight") or gradient.dim() == 3 else gradient.chunk(3)
        assert len(parts) == 3, f"{name} {tuple(parameter.shape)} is not a part for each member"
        assert [bool(part.any()) for part in parts] == [False, True, False], name


def test_latents_by_classes_are_predicted_from_as_those_by_one_hot_vectors():
    scene = exploring()
    explorer, rssm = explorer_of(scene), scene.model.rssm
    classes = torch.randint(rssm.classes, (4, 5, rssm.stoch_size), generator=generator())
    deter, action = torch.randn(4, 5, rssm.deter_size), torch.ones(4, 5, dtype=torch.int64)
    one_hot = nn.functional.one_hot(classes, rssm.classes).float()
    torch.testing.assert_close(
        explorer.disagreement(Chosen(deter, classes), action),
        explorer.disagreement(Latent(deter, one_hot).feat(), action),
    )


def test_the_actions_of_continuous_and_combined_spaces_are_predicted_from():
    for actions in (ActionSpec("continuous", (2,)), ActionSpec("multi_discrete", (3, 2))):
        scene = Scene(replace(SCRIPTED, actions=actions), explore__scale=1.0)
        batch = random_rows(scene.model.task)
        losses, metrics = scene.losses(batch)
        assert losses["explore"].isfinite() and metrics["intrinsic_reward"] > 0


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
        inside = torch.autograd.grad(loss, list(explorer.parameters()), retain_graph=True, allow_unused=True)
        outside = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
        assert any(part is not None and bool(part.any()) for part in inside) == (name == "explore"), name
        assert any(part is not None and bool(part.any()) for part in outside) == (name != "explore"), name
    assert all(parameter.requires_grad for parameter in explorer.parameters())


def test_what_is_new_is_added_to_what_imagined_actions_earn():
    plain, scene = Scene(SCRIPTED), exploring()
    scene.behavior.load_state_dict({**scene.behavior.state_dict(), **plain.behavior.state_dict()})
    scene.model.load_state_dict(plain.model.state_dict())
    answering(explorer_of(scene), [0.0, 1.0, 5.0])
    batch = replayed()
    start, trajectory = scene.imagine_from(batch)
    reward, metrics = scene.behavior._earned(trajectory, start)
    torch.testing.assert_close(reward, plain.behavior._earned(trajectory, start)[0] + 56.0)
    assert float(metrics["intrinsic_reward"]) == pytest.approx(56.0)


def test_replayed_rewards_have_what_the_action_before_was_worth_but_at_the_first_row_of_an_episode():
    scene, batch = exploring(), replayed()
    before = copy.deepcopy(batch)
    observed = scene.observe(batch)
    rewarded = answering(explorer_of(scene), [0.0, 1.0, 5.0]).rewarded(batch, observed)
    added = rewarded["reward"] - batch["reward"]
    follows = ~batch["is_first"]
    # What led to the first row of a window is not there.
    follows[:, 0] = False
    torch.testing.assert_close(added, 56.0 * follows.float())
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_disagreement_falls_on_what_was_seen_and_stays_on_what_was_not():
    torch.manual_seed(0)
    scene = exploring()
    explorer, batch = explorer_of(scene), replayed()
    seen = {**batch, "action": torch.zeros_like(batch["action"])}
    with torch.no_grad():
        observed = scene.observe(batch)
    feat, tried = observed.latents.feat()[:, :-1], seen["action"][:, :-1]
    optimizer = torch.optim.Adam(explorer.parameters(), lr=3e-3)

    def spread(action: Tensor) -> float:
        return float(explorer.disagreement(feat, action).detach().mean())

    before = spread(tried)
    for _ in range(150):
        loss, _ = explorer.loss(seen, observed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known, new = spread(tried), spread(torch.full_like(tried, 2))
    assert known < 0.02 * before
    assert new > 5 * known


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
