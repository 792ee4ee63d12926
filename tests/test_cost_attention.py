"""A pointer that mixes costs of moves into attention: what it follows, what it ignores, and what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from config import UserError
from envs.routing import ATSPInstance, ATSPRules, TSPRules
from envs.tasks import RoutingTask
from networks import TSPPointerActor
from parts.cost_attention import CostEncoder, CostLayer
from parts.pointing import PointerTables
from parts.views import NodeSet, View
from routing.costs import find_costs
from routing.rules import each_part
from tests.scenes import (
    CPU,
    NODES,
    Scene,
    assert_gradient_reaches,
    debug_config,
    generator,
    pointer_of,
    without_zero_outputs,
)
from training.setup import make_setup

HEADS = 2
SIZES: dict[str, Any] = {"width": 16, "layers": 2, "heads": HEADS, "hidden": 32, "latent": 0, "clip": 10.0}


def drawn(count: int = 3, num_nodes: int = NODES) -> ATSPInstance:
    return ATSPRules.random(count, num_nodes, generator=generator(2), device=CPU)


def pointer(**changes: Any) -> TSPPointerActor:
    torch.manual_seed(0)
    features = ATSPRules.num_node_features
    actor = TSPPointerActor(0, features, unimix=0.0, **{**SIZES, "cost_units": 8, **changes})
    without_zero_outputs(actor)
    return actor


def tables(actor: TSPPointerActor, instance: ATSPInstance) -> PointerTables:
    return actor.tables(NodeSet.of(ATSPRules, instance))


def probs(actor: TSPPointerActor, instance: ATSPInstance, first: int = 0) -> Tensor:
    """Of the first move from a node, [B, N]."""
    state = ATSPRules.reset(instance, torch.full((len(instance.costs),), first))
    view = View.of(ATSPRules, each_part(state, lambda part: part[:, None]), ATSPRules.action_mask(state)[:, None])
    return actor(None, tables(actor, instance), view).probs[:, 0]


def test_cost_pointer_follows_the_nodes_in_any_order():
    actor, instance, order = pointer(), drawn(), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = ATSPInstance.of(instance.costs[:, order][:, :, order])
    torch.testing.assert_close(probs(actor, moved, first=1), probs(actor, instance, first=0)[:, order])


def test_cost_pointer_tells_a_matrix_from_its_transpose():
    actor, instance = pointer(), drawn()
    turned = ATSPInstance.of(instance.costs.transpose(1, 2).contiguous())
    assert (probs(actor, turned) - probs(actor, instance)).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**13])
def test_cost_pointer_answers_a_multiplied_matrix_in_the_same_way(factor: float):
    actor, instance = pointer(), drawn()
    assert probs(actor, instance._replace(costs=factor * instance.costs)).equal(probs(actor, instance))


def test_cost_pointer_has_a_gradient_for_every_parameter():
    actor = pointer()
    made = tables(actor, drawn())
    loss = sum((part.square().mean() for part in made.named().values()), torch.zeros(()))
    assert_gradient_reaches(actor.named_parameters(), loss)


def test_cost_pointer_makes_of_padded_matrices_what_it_makes_of_the_unpadded():
    actor, instance = pointer(), drawn()
    alone, padded = (tables(actor, each) for each in (instance, ATSPRules.pad(instance, NODES + 2)))
    torch.testing.assert_close(padded.direct[:, :NODES, :NODES], alone.direct)
    for found, expected in ((padded.current, alone.current), (padded.first, alone.first)):
        real = found.unflatten(-1, (HEADS, -1))[:, :NODES, :, :NODES].flatten(2)
        torch.testing.assert_close(real, expected)


def test_cost_encoder_embeds_moves_there_and_back():
    encoder = CostEncoder(3, width=4, layers=1, heads=1, hidden=4, cost_units=2)
    costs = torch.rand(1, 3, 3)
    dearer = costs.clone()
    dearer[0, 2, 1] += 1
    changed = (encoder.costs(dearer) != encoder.costs(costs)).any(-1)[0]
    assert changed.nonzero().tolist() == [[1, 2], [2, 1]]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_cost_pointer_ignores_what_stands_in_padding(junk: float):
    actor, padded = pointer(), ATSPRules.pad(drawn(), NODES + 2)
    costs = padded.costs.clone()
    costs[:, NODES:] = junk
    costs[:, :, NODES:] = junk
    expected, found = (tables(actor, each) for each in (padded, padded._replace(costs=costs)))
    for name, part in found.named().items():
        torch.testing.assert_close(part, expected.named()[name], msg=name)
    loss = sum((part.square().mean() for part in found.named().values()), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(actor.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_cost_layer_is_exactly_0_for_a_set_without_members():
    layer = CostLayer(8, heads=HEADS, hidden=16, cost_units=4)
    members, costs = torch.randn(2, 3, 8), torch.randn(2, 3, 3, 4)
    out = layer(members, torch.tensor([[True, True, False], [False] * 3]), costs)
    assert out.isfinite().all() and out[0, :2].any() and not out[0, 2].any() and not out[1].any()


def test_cost_layer_gathers_costs_by_its_attention():
    layer = CostLayer(4, heads=1, hidden=4, cost_units=1)
    with torch.no_grad():
        # Attention goes by costs alone: weights of 1 and 3 for costs of 0 and log 3.
        layer.query_key_value.weight.zero_()
        layer.cost_bias.weight.fill_(1.0)
        layer.costs_out.weight.copy_(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    seen: list[Tensor] = []

    def finish(members: Tensor, gathered: Tensor, valid: Tensor | None) -> Tensor:
        seen.append(gathered)
        return members

    layer.finish = finish  # type: ignore[method-assign]
    log3 = torch.tensor(3.0).log()
    layer(torch.zeros(1, 2, 4), None, torch.tensor([[[0.0, log3], [0.0, 0.0]]])[..., None])
    torch.testing.assert_close(seen[0], torch.tensor([[[0.75 * log3, 0, 0, 0], [0.0, 0, 0, 0]]]))


def test_cost_pointer_needs_somebody_to_show_costs():
    with pytest.raises(UserError, match="cost_units is 8, and nobody shows"):
        Scene(RoutingTask.of(TSPRules, NODES), **{"actor.pointer.cost_units": 8})


@pytest.mark.parametrize("cost", ["euclidean", "lanes"])
def test_cost_pointer_reads_what_the_move_head_expects(cost: str):
    rules = TSPRules.under(find_costs(cost))
    scene = Scene(RoutingTask.of(rules, NODES), **{"actor.pointer.cost_units": 8, "model.show_moves": True})
    without_zero_outputs(scene.model)
    nodes = scene.model.node_set(rules.random(2, NODES, generator=generator(), device=CPU))
    assert nodes.moves is not None and nodes.costs is None
    actor = pointer_of(scene)
    # A reward is minus a cost.
    expected = actor.encode(nodes.features, moves=nodes.moves, costs=-nodes.moves)
    other = actor.encode(nodes.features, moves=nodes.moves, costs=nodes.moves)
    assert actor.tables(nodes).current.equal(expected.current)
    assert (other.current - expected.current).abs().max() > 1e-4


def test_move_head_looks_at_what_moves_are_said_to_cost():
    scene = Scene(RoutingTask.of(ATSPRules, NODES))
    without_zero_outputs(scene.model)
    instance = drawn()
    expected = scene.model.predict_moves(instance, None)
    # It sees the cost alone: the same cost anywhere is the same to it.
    same = scene.model.predict_moves(instance._replace(costs=instance.costs.flip(1)), None)
    torch.testing.assert_close(same, expected.flip(1))
    part = scene.model.predict_moves_each(instance, None, slice(2, 4))[0]
    torch.testing.assert_close(part, expected[:, 2:4])
    tour = torch.tensor([[0, 3, 1, 5, 2, 4]]).expand(3, -1)
    legs = scene.model.predict_legs_each(instance, None, tour)[0]
    torch.testing.assert_close(legs, expected[torch.arange(3)[:, None], tour, tour.roll(-1, -1)])


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_atsp_is_imagined_by_what_the_head_expects_of_shown_costs(gradient: str):
    scene = Scene(RoutingTask.of(ATSPRules, NODES), **{"imag_gradient": gradient, "actor.pointer.cost_units": 8})
    without_zero_outputs(scene.model)
    instance = drawn()
    obs = ATSPRules.observe(instance, ATSPRules.reset(instance))
    start, trajectory = scene.imagine_from(
        {key: value[:, None] for key, value in obs.items()}, horizon=NODES, differentiable=gradient == "dynamics"
    )
    assert (trajectory.decisions.choice is None) == (gradient == "reinforce")
    current = trajectory.moments.state.current
    expected = scene.model.predict_moves(instance, None)
    legs = expected[torch.arange(3)[:, None, None], current[:, :, :-1], trajectory.action]
    torch.testing.assert_close(scene.imagination.reward(trajectory, start), legs)


def test_atsp_is_set_up_by_its_section():
    setup = make_setup(debug_config("atsp_attn"), CPU)
    assert setup.task.rules is ATSPRules
    with pytest.raises(UserError, match="leave cost and layout out"):
        make_setup(debug_config("atsp_attn", cost="lanes"), CPU)
