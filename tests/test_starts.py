"""Where imagined trajectories start: at instances' episodes, or at replayed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
