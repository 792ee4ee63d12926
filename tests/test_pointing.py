"""A pointer's scores in two forms, and the gradients that are computed some states at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parts import pointing
from parts.actors import TSPPointerActor
from parts.views import NodeSet, View

BATCH, TOURS, STEPS, NODES, FEAT = 5, 3, 6, 11, 10


def scene(*, features: int, latent: int) -> tuple[TSPPointerActor, Tensor, View, Tensor]:
    torch.manual_seed(0)
    actor = TSPPointerActor(
        FEAT,
        2,
        state_features=features,
        latent=latent,
        width=32,
        layers=1,
        heads=4,
        hidden=64,
        clip=10.0,
        unimix=0.0,
    )
    mask = torch.rand(BATCH, TOURS, STEPS, NODES) > 0.5
    # One state has nowhere to go.
    mask[0, 0, 0] = False
    view = View(
        mask,
        first=torch.randint(NODES, (BATCH, TOURS, 1)),
        current=torch.randint(NODES, (BATCH, TOURS, STEPS)),
        features=torch.randn(BATCH, TOURS, STEPS, features) if features else None,
    )
    return actor, torch.rand(BATCH, NODES, 2), view, torch.randn(BATCH, TOURS, STEPS, FEAT)


def gradients(actor: TSPPointerActor, scores: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    named = dict(actor.named_parameters())
    found = torch.autograd.grad((scores * weight).sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize(("features", "latent"), [(0, 0), (2, 0), (2, 4)])
@pytest.mark.parametrize("most_whole", [100, 1])
# All at once; some instances; some states of one instance.
@pytest.mark.parametrize("chunk", [2**18, 2 * TOURS * STEPS * 4 * NODES, 5 * 4 * NODES])
def test_scores_known_from_a_roll_out_get_the_gradients_of_scores_computed_anew(
    features: int, latent: int, most_whole: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointing, "MOST_WHOLE", most_whole)
    monkeypatch.setitem(pointing.CHUNK, "cpu", chunk)
    actor, nodes, view, feat = scene(features=features, latent=latent)
    anew = actor.scores(feat, actor.tables(NodeSet(nodes, None)), view)
    again = actor.score_again(anew.detach(), feat, actor.tables(NodeSet(nodes, None)), view)
    assert torch.equal(again, anew)
    expected, found = gradients(actor, anew), gradients(actor, again)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_the_two_factors_score_as_their_product_does(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, nodes, view, feat = scene(features=2, latent=4)
    whole = actor.tables(NodeSet(nodes, None))
    monkeypatch.setattr(pointing, "MOST_WHOLE", 1)
    factors = actor.tables(NodeSet(nodes, None))
    assert isinstance(factors.pointed, pointing.FactoredPointed) and isinstance(whole.pointed, pointing.Pointed)
    torch.testing.assert_close(actor.scores(feat, factors, view), actor.scores(feat, whole, view))
