"""Worlds with candidates: what actors see of them in acting, in replayed rows and beyond, and who scores them."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from config import UserError
from driving.candidates import ACTIONS
from driving.features import FEATURES
from driving.lines import LINE_FEATURES, LINES, POINTS
from envs.candidates import candidate_spec
from envs.driving import DriveEnv
from envs.spaces import action_spec
from envs.tasks import ActionSpec, CandidateSpec, ObservationKey, ObservationTask
from imagining.candidate_imagination import CandidateImagination
from imagining.observation_imagination import ObservationImagination
from parts.acting import Sight
from parts.candidates import STRIDE, CandidateActor, Candidates, line_size, read_lines
from routing.rules import each_part
from tests.scenes import Scene, assert_gradient_reaches, random_rows, vector, without_zero_outputs

SPEC = CandidateSpec(lines=3, points=7, features=2, modes=2)
MASKED = ActionSpec("discrete", (SPEC.lines * SPEC.modes + 1,), masked=True)
FLAGS = SPEC.lines * SPEC.points
OBSERVATIONS = {
    "ego": vector(2),
    "lines": vector(FLAGS * SPEC.features),
    "lines_valid": ObservationKey("classes", (FLAGS,), torch.int64, classes=(2,) * FLAGS),
}
TASK = ObservationTask(actions=MASKED, observations=OBSERVATIONS, candidates=SPEC)
TOURS = 2
ACTOR: dict[str, Any] = {
    "actor.type": "candidates",
    "actor.units": 16,
    "actor.layers": 2,
    "imag_horizon": "3",
    "imag_tours": TOURS,
}


def rows_with(*lines: int, count: int = 5) -> dict[str, Tensor]:
    """Replayed sequences, one for each entry of `lines`: so many lines in each row, and any legal candidate taken."""
    torch.manual_seed(3)
    batch = random_rows(TASK, count=len(lines), rows=count)
    there = torch.arange(SPEC.lines) < torch.tensor(lines)[:, None]
    shape = (len(lines), count)
    valid = there[:, None, :, None].expand(*shape, SPEC.lines, SPEC.points)
    batch["lines_valid"] = valid.flatten(2).long()
    batch["action_mask"] = torch.cat((there.repeat_interleave(SPEC.modes, 1), torch.ones(len(lines), 1).bool()), 1)
    batch["action_mask"] = batch["action_mask"][:, None].expand(*shape, -1)
    batch["action"] = torch.multinomial(batch["action_mask"].float().flatten(0, 1), 1).view(shape)
    return batch


def scene(**changes: Any) -> Scene:
    made = Scene(TASK, **{**ACTOR, **changes})
    without_zero_outputs(made.behavior)
    return made


def actor_of(scene: Scene) -> CandidateActor:
    assert isinstance(scene.behavior.actor, CandidateActor)
    return scene.behavior.actor


def seen(batch: dict[str, Tensor]) -> Candidates:
    return Candidates(batch["action_mask"], read_lines(batch["lines"], batch["lines_valid"], SPEC))


def test_task_of_drive_has_candidates():
    env = DriveEnv()
    found = candidate_spec(env.observation_space, action_spec(env.action_space, env.observation_space))
    assert found == (LINES, POINTS, LINE_FEATURES, (ACTIONS - 1) // LINES)
    assert FEATURES["lines"].shape == found[:3]


@pytest.mark.parametrize(
    ("changes", "actions"),
    [
        ({"lines": spaces.Box(-1, 1, (3, 14))}, MASKED),
        ({"lines_valid": spaces.MultiBinary((3, 6))}, MASKED),
        ({"lines_valid": spaces.MultiBinary(21)}, MASKED),
        ({}, MASKED._replace(sizes=(8,))),
        ({}, MASKED._replace(sizes=(1,))),
        ({}, MASKED._replace(masked=False)),
    ],
)
def test_other_tasks_have_no_candidates(changes: dict[str, spaces.Space], actions: ActionSpec):
    parts = {"lines": spaces.Box(-1, 1, (3, 7, 2)), "lines_valid": spaces.MultiBinary((3, 7))}
    assert candidate_spec(spaces.Dict(parts), MASKED) == SPEC
    assert candidate_spec(spaces.Dict({**parts, **changes}), actions) is None
    assert candidate_spec(parts["lines"], MASKED) is None


def test_lines_are_read_at_every_so_manyth_point():
    points = torch.zeros(SPEC.lines, SPEC.points, SPEC.features)
    points[1, STRIDE] = torch.tensor([torch.e - 1, -(torch.e - 1)])
    points[2] = torch.nan
    valid = torch.zeros(SPEC.lines, SPEC.points, dtype=torch.bool)
    valid[1] = True
    # The numbers in symlog, and 1 where there is a point; of two points, the first and the sixth.
    expected = torch.tensor([[0.0] * 6, [0.0, 0.0, 1.0, 1.0, -1.0, 1.0], [0.0] * 6])
    torch.testing.assert_close(read_lines(points.flatten(), valid.flatten().long(), SPEC), expected)
    assert expected.shape[-1] == line_size(SPEC)


def test_replayed_row_is_imagined_as_it_is_acted_in():
    made, batch, index = scene(), rows_with(0, 1, 3), 2
    start, trajectory = made.imagine_from(batch)
    row = {name: value[:, index] for name, value in batch.items()}
    look = made.imagination.look(Sight(row, row["is_first"], any_first=False), {}, made.behavior.actor)
    assert torch.equal(look.view.action_mask[:, 0], row["action_mask"])
    assert start.latent is not None
    for tour in range(index * TOURS, (index + 1) * TOURS):
        imagined = each_part(trajectory.moments.view, itemgetter((slice(None), tour, slice(1))))
        assert torch.equal(look.view.action_mask, imagined.action_mask) and torch.equal(look.view.lines, imagined.lines)
        acting = actor_of(made)(start.latent.feat()[:, tour : tour + 1], None, look.view)
        scores = trajectory.decisions.scores[:, tour, :1]
        torch.testing.assert_close(acting.log_probs, actor_of(made).distribution(scores, imagined).log_probs)


def test_replayed_rows_are_seen_as_they_are_acted_in():
    made, batch = scene(), rows_with(0, 2)
    view = made.imagination.replayed(batch)
    assert torch.equal(view.action_mask, batch["action_mask"]) and torch.equal(view.lines, seen(batch).lines)


def test_imagined_actions_are_legal_by_what_is_observed_and_by_what_is_predicted():
    made, batch = scene(), rows_with(0, 1, 2, 3)
    _, trajectory = made.imagine_from(batch)
    mask = trajectory.moments.view.action_mask[:, :, :-1]
    assert mask.gather(-1, trajectory.action[..., None]).all()
    assert torch.equal(mask[:, ::TOURS, 0], batch["action_mask"])
    # Where there is no line there is one thing to do.
    assert (trajectory.action[0, :, 0] == MASKED.sizes[0] - 1).all()


def test_predicted_masks_leave_the_candidate_without_a_line_legal():
    made = scene()
    head = made.model.heads["mask"].output
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-100.0)
    mask = made.model.predict_mask(torch.zeros(2, made.model.rssm.feat_size), None)
    assert mask.tolist() == [[False] * (MASKED.sizes[0] - 1) + [True]] * 2


def test_lines_beyond_the_replayed_row_are_those_that_the_decoder_expects():
    made, batch = scene(), rows_with(1, 3)
    _, trajectory = made.imagine_from(batch)
    feat = trajectory.feat(slice(1, None))
    predicted = made.model.decoder.predict(feat)
    expected = read_lines(predicted["lines"], predicted["lines_valid"], SPEC)
    torch.testing.assert_close(trajectory.moments.view.lines[:, :, 1:], expected)
    assert not trajectory.moments.view.lines.requires_grad


def test_candidates_of_lines_that_change_places_change_places():
    made, batch = scene(), rows_with(2, 3)
    order = torch.tensor([2, 0, 1])
    view, feat = seen(batch), torch.randn(2, 5, made.model.rssm.feat_size)
    mask = view.action_mask[..., :-1].unflatten(-1, (3, 2))[:, :, order].flatten(2)
    moved = Candidates(torch.cat((mask, view.action_mask[..., -1:]), -1), view.lines[:, :, order])
    scores, others = (actor_of(made).scores(feat, None, each) for each in (view, moved))
    legal = moved.action_mask
    back = torch.cat((scores[..., :-1].unflatten(-1, (3, 2))[:, :, order].flatten(2), scores[..., -1:]), -1)
    torch.testing.assert_close(others[legal], back[legal])
    assert (scores[view.action_mask].std() > 1e-3).item()


def test_scores_depend_on_no_line_that_is_not_there_nor_on_other_rows():
    made, batch = scene(), rows_with(1, 2)
    feat, view = torch.randn(2, 5, made.model.rssm.feat_size), seen(batch)
    spoilt = view.lines.clone()
    spoilt[:, :, 2] = torch.nan
    lines = spoilt.requires_grad_()
    dist = actor_of(made)(feat, None, Candidates(view.action_mask, lines))
    torch.testing.assert_close(dist.log_probs, actor_of(made)(feat, None, view).log_probs)
    dist.entropy().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in actor_of(made).parameters())
    assert lines.grad is not None and lines.grad.isfinite().all() and (lines.grad[:, :, 2] == 0).all()
    alone = actor_of(made).scores(feat[1:], None, Candidates(view.action_mask[1:], view.lines[1:]))
    torch.testing.assert_close(actor_of(made).scores(feat, None, view)[1:], alone)


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_gradient_reaches_all_of_the_actor_and_nothing_else(gradient: str):
    made, batch = scene(imag_gradient=gradient), rows_with(0, 1, 2, 3)
    losses, metrics = made.losses(batch)
    assert_gradient_reaches(made.behavior.actor.named_parameters(), losses["actor"])
    others = [*made.model.parameters(), *made.behavior.critic.parameters()]
    gradients = torch.autograd.grad(losses["actor"], others, allow_unused=True)
    assert all(each is None for each in gradients)
    assert all(value.isfinite() for value in metrics.values())


def test_one_batch_is_imitated_whole():
    made = scene(**{"imag_policy": 0.0, "imag_imitation": 1.0})
    batch = rows_with(0, 1, 2, 3, count=4)
    observed = made.model.observe(batch, torch.rand(4, 4, made.model.rssm.stoch_size))
    optimizer = torch.optim.Adam(made.behavior.actor.parameters(), lr=1e-2)
    for _ in range(150):
        loss, metrics = made.behavior.imitation_loss(batch, observed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A hundredth is spread over what is legal, whatever the scores are.
    assert metrics["imitation_loss"] < 0.05
    chosen = made.behavior.actor(observed.latents.feat(), None, seen(batch)).mode()
    assert torch.equal(chosen, batch["action"])


def test_imitation_is_the_mean_log_likelihood_of_rows_that_something_was_done_in():
    made, batch = scene(**{"actor.unimix": 0.0}), rows_with(1, 1, count=3)
    with torch.no_grad():
        for part in (actor_of(made).modes, actor_of(made).alone):
            part.output.weight.zero_()
            part.output.bias.zero_()
        actor_of(made).modes.output.bias[1] = 1.0
    batch["action"] = torch.tensor([[0, 1, 1], [6, 1, 1]])
    batch["is_last"] = torch.tensor([[False, False, True], [False, True, False]])
    observed = made.observe(batch)
    # Of the candidates 0, 1 and 6, the second has a score of 1 and the others of 0.
    total = torch.tensor(2 + torch.e).log()
    loss, _ = made.behavior.imitation_loss(batch, observed)
    torch.testing.assert_close(loss, total - 2 / 4)


def test_imitation_counts_beside_imagination_by_its_weight():
    made, also = scene(), scene(imag_imitation=0.5)
    batch = rows_with(1, 2)
    observed = made.observe(batch)
    (alone, _), (both, metrics) = (each.losses(batch, observed) for each in (made, also))
    torch.testing.assert_close(both["actor"], alone["actor"] + 0.5 * metrics["imitation_loss"])


def test_masked_actor_plays_where_there_are_candidates():
    made = scene(**{"actor.type": "masked"})
    losses, metrics = made.losses(rows_with(0, 3))
    assert isinstance(made.imagination, CandidateImagination)
    assert losses["actor"].isfinite() and metrics["actor_entropy"] > 0


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (ObservationTask(actions=MASKED, observations=OBSERVATIONS), {}),
        (TASK, {"model.decode_keys": "ego"}),
        (TASK, {"model.loss_scales.decoder": 0.0}),
    ],
)
def test_actor_of_candidates_is_refused_where_there_are_none(task: ObservationTask, changes: dict[str, Any]):
    with pytest.raises(UserError, match="actor.type candidates scores lines to follow, and this task has none that"):
        Scene(task, **{**ACTOR, **changes})
    made = Scene(task, **{**changes, "actor.type": "masked"})
    assert type(made.imagination) is ObservationImagination


def test_units_that_heads_cannot_share_are_refused():
    with pytest.raises(UserError, match="width must be a multiple of its heads"):
        scene(**{"actor.units": 18})
