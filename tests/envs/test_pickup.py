import itertools
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import dreamer
from comparing.runs import METRICS
from envs.routing import PickupEnv, TSPInstance
from routing import pickup
from routing.instances import euclidean_distances, field_test_coords
from routing.pickup import PickupRules, shortest_length


def orders_by_hand(count):
    """Every order of the nodes in which each even one comes after the node before it."""
    for order in itertools.permutations(range(1, count)):
        place = {node: index for index, node in enumerate(order)}
        if all(place[node - 1] < place[node] for node in range(2, count, 2)):
            yield order


def orders_by_masks(count):
    begin: tuple[int, ...] = ()
    orders, unfinished = set(), [(begin, PickupRules.reset(TSPInstance(coords=torch.rand(1, count, 2))))]
    while unfinished:
        order, state = unfinished.pop()
        for node in PickupRules.action_mask(state)[0].nonzero()[:, 0].tolist():
            after, finished = PickupRules.step(state, torch.tensor([node]))
            if finished:
                orders.add(order)
            else:
                unfinished.append(((*order, node), after))
    return orders


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_pickup_rules_accept_every_order_that_delivers_after_pickup_and_no_other(count):
    assert orders_by_masks(count) == set(orders_by_hand(count))


def test_pickup_rules_refuse_another_start():
    with pytest.raises(ValueError, match="begins at node 0"):
        PickupRules.reset(TSPInstance(coords=torch.rand(1, 5, 2)), torch.tensor([1]))


def test_pickup_node_features_show_the_partner():
    coords = torch.arange(10.0).view(1, 5, 2)
    features = PickupRules.node_features(TSPInstance(coords=coords))[0]
    assert features[:, :2].equal(2 * coords[0] - 1)
    assert features[:, 2:4].equal(2 * coords[0, [0, 2, 1, 4, 3]] - 1)
    assert features[:, 4].tolist() == [0, 1, -1, 1, -1]


def test_pickup_state_features_follow_what_is_carried():
    state, shares = PickupRules.reset(TSPInstance(coords=torch.rand(1, 5, 2))), []
    for node in (1, 3, 2, 4, 0):
        shares.append(PickupRules.state_features(state).item())
        state, _ = PickupRules.step(state, torch.tensor([node]))
    assert shares == pytest.approx([0, 1 / 3, 1, 1, 0])


@pytest.mark.parametrize("count", [4, 7])
def test_pickup_references_are_the_shortest_of_all_orders(count):
    for distances in euclidean_distances(field_test_coords(count, 2)):
        best = min(distances[[0, *order], [*order, 0]].sum() for order in orders_by_hand(count))
        assert shortest_length(distances) == pytest.approx(best)


def test_pickup_references_are_found_while_few_partial_tours_are_kept(monkeypatch):
    distances = euclidean_distances(field_test_coords(11, 1))[0]
    best = shortest_length(distances)
    monkeypatch.setattr(pickup, "BEAM", 20)
    assert best <= shortest_length(distances) < 1.5 * best


def test_pickup_env_passes_the_gymnasium_checker():
    check_env(gymnasium.make("Pickup-v0", num_nodes=7).unwrapped)


def test_pickup_env_refuses_a_delivery_before_its_pickup():
    env = PickupEnv(num_nodes=5, seed=0)
    env.reset()
    env.step(3)
    with pytest.raises(ValueError, match=r"node 2 is not legal now; legal nodes: \[1, 4\]"):
        env.step(2)


@pytest.mark.run(shapes=True)
def test_pickup_trains_with_the_pointer(tmp_path):
    command = ["--configs", "pickup_attn", "debug", "--nodes", "7", "--steps", "120", "--device", "cpu"]
    dreamer.main([*command, "--logdir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert np.isfinite(rows[-1]["eval_gap"]) and rows[-1]["eval_gap"] >= -1e-3
    assert max(row.get("miss_rate", 0) + row.get("env_miss_rate", 0) for row in rows) == 0
