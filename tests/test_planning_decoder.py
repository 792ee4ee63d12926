"""Plans for lines and modes: nothing comes of padding, of order or of other rows, and something of no line at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import Tensor

from imitation.decoder import Plans
from imitation.losses import imitation_losses
from imitation.network import PlanningNetwork
from imitation.scene_encoder import Scene
from tests.imitation_scenes import CANDIDATES, LINES, MODES, POINTS, driven, features, make_network

PADDING = pytest.mark.parametrize("padding", [0.0, -3e38, math.nan, math.inf])
POINTWISE = ("ego", "agents", "roads", "lines", "candidates")


def loss_of(plans: Plans, rows: dict[str, Tensor], *, padding: float = 0.0) -> Tensor:
    losses, _ = imitation_losses(plans, driven(rows, padding=padding))
    return torch.stack(list(losses.values())).sum()


def gradients(network: PlanningNetwork, rows: dict[str, Tensor], *, padding: float = 0.0) -> dict[str, Tensor]:
    """Of the losses, by parameter and by feature."""
    rows = {name: value.clone().requires_grad_(name in POINTWISE) for name, value in rows.items()}
    named = {**dict(network.named_parameters()), **{name: rows[name] for name in POINTWISE}}
    found = torch.autograd.grad(loss_of(network(rows), rows, padding=padding), list(named.values()))
    return dict(zip(named, found, strict=True))


def permuted(rows: dict[str, Tensor], names: tuple[str, ...], order: Tensor) -> dict[str, Tensor]:
    return {name: value[:, order] if name in names else value for name, value in rows.items()}


def test_plans_have_a_trajectory_and_a_score_for_every_candidate():
    plans = make_network()(features([3, 1, 0]))
    assert plans.trajectories.shape == (3, CANDIDATES, POINTS, 3) and plans.scores.shape == (3, CANDIDATES)
    assert (plans.trajectories[2, :-1] == 0).all() and plans.trajectories[2, -1].all()


def test_an_untrained_decoder_drives_the_candidates_and_prefers_none():
    network, rows = make_network(), features([3, 0])
    for mlp in (network.decoder.trajectory, network.decoder.score):
        torch.nn.init.zeros_(mlp.output.weight)
    plans = network(rows)
    torch.testing.assert_close(plans.trajectories, rows["candidates"])
    torch.testing.assert_close(plans.distribution().probs[0], torch.full((CANDIDATES,), 1 / CANDIDATES))


def test_the_candidate_without_a_line_is_certain_where_there_is_no_line():
    probs = make_network()(features([0, 2])).distribution().probs
    assert probs[0].tolist() == [0.0] * (CANDIDATES - 1) + [1.0]
    assert (probs[1] > 0).sum() == 2 * MODES + 1


@PADDING
def test_padding_changes_no_plan(padding: float):
    network, lines = make_network(), [3, 1, 0, 2]
    plain, filled = network(features(lines)), network(features(lines, padding=padding))
    assert torch.equal(plain.trajectories, filled.trajectories)
    assert torch.equal(plain.distribution().log_probs, filled.distribution().log_probs)


@pytest.mark.parametrize("name", ["agents", "roads"])
def test_more_padding_changes_no_plan(name: str):
    network, rows = make_network(), features([3, 1, 0, 2])
    wider = dict(rows)
    for each in (name, f"{name}_valid"):
        wider[each] = torch.cat((rows[each], torch.zeros_like(rows[each])), 1)
    ours, theirs = network(wider), network(rows)
    torch.testing.assert_close(ours.trajectories, theirs.trajectories, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)


def test_illegal_candidates_are_nothing_at_every_layer():
    network, rows = make_network(), features([3, 1, 0, 2])
    passed: list[Tensor] = []
    for layer in network.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: passed.append(output))
    plans = network(rows)
    illegal = ~rows["action_mask"]
    assert len(passed) == 2 and all((queries[illegal] == 0).all() and queries[~illegal].all() for queries in passed)
    assert (plans.trajectories[illegal] == 0).all()


@PADDING
def test_padding_has_gradient_exactly_0_and_changes_no_other(padding: float):
    network, lines = make_network(), [3, 1, 0, 2]
    rows = features(lines, padding=padding)
    found, expected = gradients(network, rows, padding=padding), gradients(network, features(lines))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("agents", "roads", "lines"):
        valid = rows[f"{name}_valid"]
        assert (found[name][~valid] == 0).all()
        # The last row's future is unknown, and of lines every third point is read.
        assert found[name][:-1][valid[:-1]].any()
    assert (found["candidates"][~rows["action_mask"]] == 0).all()


def test_other_rows_change_no_plan():
    network, rows = make_network(), features([3, 1, 0, 2])
    whole = network(rows)
    for row in range(4):
        alone = network({name: value[row : row + 1] for name, value in rows.items()})
        torch.testing.assert_close(alone.trajectories[0], whole.trajectories[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=1e-4, atol=1e-4)
    # The same number of rows is computed in the same way, and is the same to the last bit.
    others = features([0, 3, 1, 0], padding=math.nan, seed=7)
    mixed = network({name: torch.cat((value[:2], others[name][2:])) for name, value in rows.items()})
    assert torch.equal(mixed.trajectories[:2], whole.trajectories[:2])
    assert torch.equal(mixed.scores[:2], whole.scores[:2])


@pytest.mark.parametrize("name", ["agents", "roads"])
def test_the_order_of_what_is_around_changes_no_plan(name: str):
    network, rows = make_network(), features([3, 1, 0, 2])
    order = torch.randperm(rows[name].shape[1])
    plans, expected = network(permuted(rows, (name, f"{name}_valid"), order)), network(rows)
    torch.testing.assert_close(plans.trajectories, expected.trajectories, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plans.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_lines_in_another_order_have_the_same_plans_in_that_order():
    network, rows = make_network(), features([3, 1, 2])
    order = torch.tensor([2, 0, 1])
    of_candidates = torch.cat(((order[:, None] * MODES + torch.arange(MODES)).flatten(), torch.tensor([LINES * MODES])))
    moved = permuted(permuted(rows, ("lines", "lines_valid"), order), ("candidates", "action_mask"), of_candidates)
    plans, expected = network(moved), network(rows)
    torch.testing.assert_close(plans.trajectories, expected.trajectories[:, of_candidates], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plans.scores, expected.scores[:, of_candidates], rtol=1e-4, atol=1e-4)


def test_plans_depend_on_all_that_is_there():
    network, rows = make_network(), features([3, 2])
    found = gradients(network, rows)
    assert all(found[name].any() for name in POINTWISE)
    silent = [name for name, gradient in found.items() if not gradient.any()]
    assert silent == []


@PADDING
def test_a_batch_without_any_line_trains(padding: float):
    network, rows = make_network(), features([0, 0, 0], padding=padding)
    found = gradients(network, rows, padding=padding)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["decoder.trajectory.output.weight"].any() and (found["lines"] == 0).all()


def test_a_batch_with_nothing_but_an_ego_trains():
    rows = features([0, 0])
    for name in ("agents", "roads", "lines"):
        rows[f"{name}_valid"] = torch.zeros_like(rows[f"{name}_valid"])
    assert all(gradient.isfinite().all() for gradient in gradients(make_network(), rows).values())


@PADDING
@pytest.mark.parametrize("name", ["agents", "roads", "lines"])
def test_one_valid_point_trains(name: str, padding: float):
    rows = features([1, 0])
    for each in ("agents", "roads", "lines"):
        rows[f"{each}_valid"] = torch.zeros_like(rows[f"{each}_valid"])
    rows[f"{name}_valid"][0, 0, 0] = True
    rows[name] = torch.full_like(rows[name], padding)
    rows[name][0, 0, 0] = torch.arange(rows[name].shape[-1]).float()
    found = gradients(make_network(), rows)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found[name][0, 0, 0].all() and found[name].count_nonzero() == rows[name].shape[-1]


def test_a_value_that_is_not_finite_comes_out_where_it_is_valid():
    """It is not hidden: the guard has to see it."""
    rows = features([3, 2])
    rows["lines"][0, 0, 0] = math.nan
    plans = make_network()(rows)
    assert not plans.scores[0].isfinite().all() and plans.scores[1].isfinite().all()


def test_decoder_refuses_candidates_that_are_not_of_its_lines_and_modes():
    rows = features([1])
    rows["lines"], rows["lines_valid"] = rows["lines"][:, :2], rows["lines_valid"][:, :2]
    with pytest.raises(AssertionError, match="2 lines of 2 modes and one without are 5"):
        make_network()(rows)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # from torch's own compiler
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decoder_compiles_without_a_break(backend: str):
    network: Any = make_network()
    compiled = torch.compile(network.decoder, fullgraph=True, backend=backend)
    for lines in ([3, 1, 0, 2], [0, 0, 0, 0]):
        rows = features(lines, padding=math.nan)
        scene = Scene(*(part.detach() for part in network.scene(rows)))
        candidates, mask = rows["candidates"], rows["action_mask"]
        ours, theirs = compiled(scene, candidates, mask), network.decoder(scene, candidates, mask)
        torch.testing.assert_close(ours.trajectories, theirs.trajectories, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(loss_of(ours, rows), network.decoder.candidate.weight, retain_graph=True)
        expected = torch.autograd.grad(loss_of(theirs, rows), network.decoder.candidate.weight)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
