"""Layouts: where the nodes of random instances lie."""

from __future__ import annotations

import math

import pytest
import torch

from config import UserError
from routing.costs import EUCLIDEAN, find_costs
from routing.cvrp import CVRPRules
from routing.scattering import CLUSTERED, LAYOUTS, MIXED, MOST_CLUSTERS, UNIFORM, Layout
from routing.tsp import TSPRules


def placed(layout: Layout, count: int, nodes: int) -> torch.Tensor:
    numbers = torch.rand(count, layout.numbers(nodes), generator=torch.Generator().manual_seed(0), device="cpu")
    return layout.place(numbers, nodes)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nodes_lie_in_the_unit_square_and_apart_from_each_other(layout: Layout):
    coords = placed(layout, 200, 30)
    assert coords.shape == (200, 30, 2)
    assert coords.min() >= 0 and coords.max() <= 1
    assert len(coords.flatten(0, 1).unique(dim=0)) == 6000


def test_a_cluster_is_normal_around_its_centre():
    nodes = 3
    numbers = torch.zeros(1, CLUSTERED.numbers(nodes), dtype=torch.float64)
    # One cluster, with its centre at (0.3, 0.5) and the largest deviation, 0.1.
    numbers[0, 1:4] = torch.tensor([0.25, 0.5, 1.0])
    # Angles of none, a quarter and a half turn; distances of one, two and no deviation.
    numbers[0, -9:] = torch.tensor([0.0, math.exp(-0.5), 0.0, 0.25, math.exp(-2.0), 0.0, 0.5, 1.0, 0.0])
    expected = torch.tensor([[[0.4, 0.5], [0.3, 0.7], [0.3, 0.5]]], dtype=torch.float64)
    torch.testing.assert_close(CLUSTERED.place(numbers, nodes), expected, atol=1e-7, rtol=0)


def test_nodes_beyond_the_border_are_mirrored():
    numbers = torch.zeros(1, CLUSTERED.numbers(1), dtype=torch.float64)
    # The centre is (0.1, 0.9), and the node two deviations further to the left.
    numbers[0, 1:4] = torch.tensor([0.0, 1.0, 1.0])
    numbers[0, -3:] = torch.tensor([0.5, math.exp(-2.0), 0.0])
    torch.testing.assert_close(CLUSTERED.place(numbers, 1)[0, 0], torch.tensor([0.1, 0.9], dtype=torch.float64))


def test_clusters_are_one_to_eight_and_nodes_are_spread_over_them():
    nodes = 400
    numbers = torch.rand(64, CLUSTERED.numbers(nodes), generator=torch.Generator().manual_seed(1), device="cpu")
    # Without a deviation, the nodes of a cluster lie at its centre.
    numbers[:, 1 + 2 : 1 + 3 * MOST_CLUSTERS : 3] = -0.25
    counts = [len((1e4 * each).round().unique(dim=0)) for each in CLUSTERED.place(numbers, nodes)]
    assert set(counts) == set(range(1, 9))


def test_nearest_nodes_are_nearer_in_clusters():
    def nearest(layout: Layout) -> float:
        coords = placed(layout, 100, 50)
        return float((torch.cdist(coords, coords) + 9 * torch.eye(50)).amin(-1).mean())

    assert nearest(CLUSTERED) < 0.6 * nearest(UNIFORM)
    assert nearest(CLUSTERED) < nearest(MIXED) < nearest(UNIFORM)


def test_the_field_s_layout_draws_what_it_always_drew():
    drawn = EUCLIDEAN.random_nodes(5, 7, generator=torch.Generator().manual_seed(3), device="cpu").coords
    assert drawn.equal(torch.rand(5, 7, 2, generator=torch.Generator().manual_seed(3), device="cpu"))


def test_fewer_instances_are_the_first_of_more():
    world = find_costs("euclidean", layout="any")
    for rules in (TSPRules.under(world), CVRPRules.under(world)):
        few, many = (rules.field_instances(count, 12, seed=5).coords for count in (3, 8))
        assert few.equal(many[:3])
        assert not few.equal(rules.under(EUCLIDEAN).field_instances(3, 12, seed=5).coords)


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="layout is 'round'; choose one of uniform, clustered, mixed, any"):
        find_costs("euclidean", layout="round")
