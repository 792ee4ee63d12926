"""Planned tours as lessons: what is planned, how it is told, and what imitating it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config import UserError
from dreamer import Dreamer
from guard import Guard
from imagining.routing_imagination import RoutingImagination
from planning.planner import Planner
from planning.teacher import Lesson, Teacher, imitation
from routing.instances import reference_lengths
from routing.rules import tour_length
from settings.planning import PlanSettings, TeacherSettings
from tests.scenes import (
    CPU,
    NODES,
    ROUTING,
    Scene,
    costly_legs,
    debug_config,
    episodes,
    generator,
    pointer_of,
    routing,
    routing_replay,
    without_zero_outputs,
)
from training.devices import make_generators


def a_teacher(scene: Scene, **settings: Any) -> Teacher:
    chosen = {"scale": 1.0, "plans": 6, "batch": 8, "tours": 3, "stock": 10, **settings}
    assert isinstance(scene.imagination, RoutingImagination)
    return Teacher(Planner(scene.imagination, PlanSettings()), TeacherSettings(**chosen))


def told_tours(lesson: Lesson) -> torch.Tensor:
    """The closed tours of a lesson [B, Q, N], each from where it is told from."""
    assert lesson.view.current is not None
    return torch.cat((lesson.view.current[:, :, :1], lesson.action[:, :, :-1]), -1)


def taught(**settings: Any) -> tuple[Lesson, Teacher]:
    teacher = a_teacher(costly_legs(Scene(actor__pointer__latent=0)), **settings)
    return teacher.lesson(episodes(4), generator()), teacher


def test_lesson_tells_shortest_tours_where_moves_cost_their_length():
    lesson, _ = taught()
    coords = (lesson.nodes.features + 1) / 2
    references = torch.from_numpy(reference_lengths(coords.double().numpy()))
    for tours in told_tours(lesson).unbind(1):
        torch.testing.assert_close(tour_length(coords, tours).double(), references, rtol=1e-5, atol=0)


def test_lesson_tells_tours_from_nodes_spread_over_them():
    lesson, _ = taught()
    tours = told_tours(lesson)
    for one in tours:
        first = one[0]
        places = [int((first == other[0]).nonzero()) for other in one]
        assert sorted((place - places[0]) % NODES for place in places) == [0, 2, 4]


def test_lesson_tells_tours_either_way_round_only_where_costs_allow():
    scene = costly_legs(Scene(actor__pointer__latent=0))
    batch = episodes(4)
    either = a_teacher(scene)
    ways = {tuple(tour.tolist()) for tour in _from_node_0(told_tours(either.lesson(batch, generator())))}
    assert any((0, *tour[:0:-1]) in ways for tour in ways)
    assert either.stock is not None and either.stock.either_way[: either.planned].all()
    # With any other head, moves cost more in one direction.
    without_zero_outputs(scene.model.heads["reward"])
    one_way = a_teacher(scene)
    one_way.lesson(batch, generator())
    assert one_way.stock is not None and not one_way.stock.either_way.any()


def _from_node_0(tours: torch.Tensor) -> torch.Tensor:
    flat = tours.flatten(0, 1)
    begin = (flat == 0).long().argmax(-1, keepdim=True)
    return flat.gather(-1, (begin + torch.arange(NODES)) % NODES)


def test_lesson_weighs_choices_alone():
    lesson, _ = taught()
    # Of the last two moves of a tour of 6 nodes, one goes to the last node that is open and one home.
    assert lesson.weight.tolist() == [[[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * 3] * 8


@pytest.mark.parametrize(("dreamt", "same"), [(0.0, True), (1.0, False)])
def test_teacher_plans_walked_and_dreamt_maps(dreamt: float, same: bool):
    _, teacher = taught(dreamt=dreamt, plans=3, batch=3)
    assert teacher.stock is not None
    walked = episodes(4)["coords"][:, 0]
    assert (teacher.stock.instance.coords[:3] == walked[:3]).all() == same


def test_teacher_keeps_the_latest_plans():
    _, teacher = taught()
    assert teacher.planned == 8 and teacher.stock is not None
    before = teacher.stock.instance.coords.clone()
    teacher.lesson(episodes(4), generator(1))
    changed = (teacher.stock.instance.coords != before).any(-1).any(-1)
    assert changed.tolist() == [True] * 4 + [False] * 4 + [True] * 2


def test_teacher_goes_on_from_its_state():
    _, teacher = taught()
    other = a_teacher(costly_legs(Scene(actor__pointer__latent=0)))
    other.load_state_dict(teacher.state_dict())
    one, again = (each.lesson(episodes(4), generator(3)) for each in (teacher, other))
    assert torch.equal(one.action, again.action)
    assert torch.equal(one.nodes.features, again.nodes.features)


def test_teacher_plans_rows_by_what_was_believed_there():
    scene = Scene(
        routing("stretch"), model__belief=True, imag_start="rows", imag_first="stored", actor__pointer__latent=0
    )
    teacher = a_teacher(scene)
    lesson = teacher.lesson(episodes(8, rules=routing("stretch").rules), generator())
    assert lesson.action.shape == (8, 1, NODES)
    assert lesson.nodes.belief is not None and lesson.nodes.moves is not None
    assert lesson.view.action_mask is not None
    legal = lesson.view.action_mask.gather(-1, lesson.action[..., None])
    assert bool(legal.all())
    assert 0 < float(lesson.weight.mean()) < 1


def test_imitation_raises_the_chance_of_what_was_planned():
    scene = costly_legs(Scene(actor__pointer__latent=0))
    lesson = a_teacher(scene).lesson(episodes(4), generator())
    actor = pointer_of(scene)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, metrics = imitation(actor, lesson)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["teacher_agreement"]) > 0.8


def test_scale_of_imitation_moves_to_its_final_share():
    teacher = a_teacher(Scene(), scale=2.0, final=0.25)
    assert [teacher.scale(progress) for progress in (0.0, 0.5, 1.0)] == [2.0, 1.25, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actor__pointer__latent": 4}, "needs actor.type: tsp_pointer and actor.pointer.latent: 0"),
        ({"model__reward_latent": True, "actor__pointer__latent": 0}, "nobody plans: it takes task tsp or cvrp"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(changes: dict[str, Any], message: str):
    settings = debug_config(imag_teacher=1.0, **changes)
    with pytest.raises(UserError, match=message):
        Dreamer.of(ROUTING, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))


def test_a_stock_that_holds_no_lesson_is_refused():
    with pytest.raises(UserError, match="teacher.stock is 5; it must hold the first lesson, so give at least 8"):
        TeacherSettings(stock=5, batch=8, plans=2)


@pytest.mark.parametrize("choices", [{"imag_policy": 0.0}, {}])
def test_agent_learns_from_plans_beside_the_policy_gradient_or_alone(choices: dict[str, Any]):
    settings = debug_config(imag_teacher=1.0, actor__pointer__latent=0, **choices)
    agent = Dreamer.of(ROUTING, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))
    before = {name: value.clone() for name, value in agent.behavior.actor.named_parameters()}
    metrics = agent.update(routing_replay(num_envs=4, columns=5 * (NODES + 1)), progress=0.0)
    assert ("actor_loss" in metrics) == (not choices)
    assert "teacher_loss" in metrics
    assert all(not torch.equal(value, before[name]) for name, value in agent.behavior.actor.named_parameters())
