"""Where imagined trajectories start: at instances' episodes, or at replayed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config import ConfigError, UserError
from tests.scenes import CRITIC, NODES, Scene, episodes, instance_of, lengths, tours_of


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
    torch.testing.assert_close(-scene.imagination.reward(trajectory, start).sum(-1), lengths(stored, tours))


@pytest.mark.parametrize("choice", ["episodes", "generated", "rows", "replay"])
def test_nodes_are_embedded_only_where_latents_are_read(choice: str):
    unread: dict[str, Any] = {
        "imag_start": choice,
        "imag_first": "stored",
        "actor.pointer.latent": 0,
        "critic.latent": False,
    }
    start = Scene(**unread).start(episodes(4))
    assert start.latent is None and start.context.nodes is None
    start = Scene(**{**unread, "critic.latent": True}).start(episodes(4))
    assert start.latent is not None and start.context.nodes is not None


def test_dreamt_maps_have_one_size_of_those_asked_for_and_as_many_nodes_together():
    scene = Scene(imag_start="generated", imag_generated=1.0, imag_nodes=[4, 12])
    seen = set()
    for seed in range(40):
        start = scene.start(episodes(8), seed=seed)
        count, nodes, _ = start.context.instance.coords.shape
        assert count == round(8 * NODES / nodes) and start.weight.shape[0] == count
        assert scene.imagination.horizon_from(start) == nodes
        seen.add(nodes)
    assert min(seen) == 4 and max(seen) > 10 and seen <= set(range(4, 13))


def test_tours_of_dreamt_maps_of_any_size_visit_every_node_once():
    scene = Scene(imag_start="generated", imag_generated=1.0, imag_nodes=[9, 9], imag_reward="simulated")
    start, trajectory = scene.imagine_from(episodes(8))
    tours = tours_of(trajectory)
    assert tours.shape == (5, 4, 9) and tours.sort(-1).values.equal(torch.arange(9).expand(tours.shape))
    coords = start.context.instance.coords
    torch.testing.assert_close(-scene.imagination.reward(trajectory, start).sum(-1), lengths(coords, tours))


def test_sizes_that_nothing_can_be_imagined_in_are_refused():
    dreamt: dict[str, Any] = {"imag_start": "generated", "imag_generated": 1.0}
    with pytest.raises(UserError, match="imag_nodes begins with 2 nodes; a tour has 3 at least"):
        Scene(**dreamt, imag_nodes=[2, 9])
    with pytest.raises(ConfigError, match="with imag_nodes it needs compile: none"):
        Scene(**dreamt, imag_nodes=[3, 9], compile="kernels")
