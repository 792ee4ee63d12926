"""Latents by classes: layers and imagination that gather weights give what products with one-hot vectors give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from envs.tasks import ActionSpec, ObservationTask
from networks import RSSM, Latent
from parts import latents
from parts.latents import Chosen, ClassLinear, as_one_hot, gathered, gathering_pays
from parts.precision import use_half_precision
from tests.scenes import Scene, episodes, random_rows, vector, without_zero_outputs

DETER, STOCH, CLASSES = 8, 3, 4
TASK = ObservationTask(actions=ActionSpec("discrete", (5,)), observations={"position": vector(2)})


def classes(*shape: int) -> Tensor:
    return torch.randint(CLASSES, (*shape, STOCH))


def one_hot(chosen: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(chosen, CLASSES).flatten(-2).float()


def test_one_hot_vectors_of_classes_by_hand() -> None:
    assert as_one_hot(torch.tensor([[0, 2], [1, 0]]), 6).tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 0]]


def test_layer_reads_classes_as_their_one_hot_vectors() -> None:
    layer, chosen = ClassLinear(STOCH * CLASSES, 5), classes(2, 7)
    torch.testing.assert_close(layer(chosen), layer(one_hot(chosen)))


def test_layer_reads_numbers_and_classes_in_that_order() -> None:
    layer, latent = ClassLinear(DETER + STOCH * CLASSES, 5), Chosen(torch.randn(2, 7, DETER), classes(2, 7))
    torch.testing.assert_close(layer(latent), layer(torch.cat((latent.deter, one_hot(latent.classes)), -1)))


def gradients(layer: ClassLinear, x: Tensor | Chosen, slope: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), [layer.weight, layer.bias], slope.to(layer.compute))


# One piece, pieces with a rest, and more rows than classes that are named.
@pytest.mark.parametrize("rows", [1, 10, 25])
@pytest.mark.parametrize("half", [False, True])
def test_gradient_of_gathered_weights_is_that_of_the_product(
    rows: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "ROWS_AT_A_TIME", 10)
    layer, latent = ClassLinear(DETER + STOCH * CLASSES, 5), Chosen(torch.randn(rows, DETER), classes(rows))
    if half:
        use_half_precision(layer)
    slope, tolerance = torch.randn(rows, 5), 2e-2 if half else 1e-5
    dense = torch.cat((latent.deter, one_hot(latent.classes)), -1)
    pairs = zip(gradients(layer, latent, slope), gradients(layer, dense, slope), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradients_of_many_rows_in_half_precision_add_up_in_float32() -> None:
    weight, rows = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True), 2**14
    gathered(weight, torch.zeros(rows, 1, dtype=torch.int64)).sum().backward()
    # In half precision the sum would stop at 256.
    assert weight.grad is not None and weight.grad.tolist() == [[rows, 0]]


@pytest.mark.parametrize("cell", ["block", "joint", "dense"])
def test_rssm_imagines_the_same_by_classes(cell: Any) -> None:
    model = RSSM(5, 6, cell=cell, deter=DETER, stoch=STOCH, classes=CLASSES, hidden=6, blocks=2, unimix=0.01)
    latent = Latent(torch.randn(7, DETER), one_hot(classes(7)).unflatten(-1, (STOCH, CLASSES)))
    action, noise = torch.randn(7, 5), torch.rand(7, STOCH)
    chosen, expected = model.imagine_step(latent.chosen(), action, noise), model.imagine_step(latent, action, noise)
    assert torch.equal(chosen.classes, expected.stoch.argmax(-1))
    torch.testing.assert_close(chosen.deter, expected.deter)


def learnt(monkeypatch: pytest.MonkeyPatch, *, gathers: bool, **changes: Any) -> tuple[Scene, dict[str, Tensor]]:
    """A scene after the backward pass of its losses, and metrics."""
    monkeypatch.setattr(latents, "LEAST_ROWS", 1 if gathers else 10**9)
    monkeypatch.setattr(latents, "LEAST_CLASSES", 1)
    scene = Scene(TASK, imag_horizon="3", **changes)
    for module in (scene.model, scene.behavior):
        without_zero_outputs(module)
    torch.manual_seed(1)
    batch = random_rows(TASK)
    losses, metrics = scene.losses(batch, scene.observe(batch))
    torch.stack(list(losses.values())).sum().backward()
    return scene, metrics


def test_losses_and_gradients_by_classes_are_those_by_one_hot_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, metrics), (theirs, expected) = (learnt(monkeypatch, gathers=gathers) for gathers in (True, False))
    # Sums of float32 in another order.
    torch.testing.assert_close(metrics, expected, rtol=3e-5, atol=1e-5)
    trained = 0
    for module in ("model", "behavior"):
        pairs = zip(*(dict(getattr(scene, module).named_parameters()).items() for scene in (ours, theirs)), strict=True)
        for (name, mine), (_, other) in pairs:
            assert (mine.grad is None) == (other.grad is None), name
            if mine.grad is not None and other.grad is not None:
                trained += bool(other.grad.any())
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert trained > 20


def feat_of(scene: Scene, batch: dict[str, Tensor], **choices: Any) -> Any:
    return scene.imagine_from(batch, horizon=2, **choices)[1].moments.feat


@pytest.fixture
def eager_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "LEAST_ROWS", 1)
    monkeypatch.setattr(latents, "LEAST_CLASSES", 1)


@pytest.mark.usefixtures("eager_to_gather")
def test_imagination_without_a_gradient_through_latents_is_by_classes() -> None:
    feat = feat_of(Scene(TASK, imag_horizon="2"), random_rows(TASK))
    assert isinstance(feat, Chosen)


@pytest.mark.usefixtures("eager_to_gather")
def test_a_gradient_through_latents_takes_one_hot_vectors() -> None:
    scene = Scene(TASK, imag_horizon="2", imag_gradient="dynamics")
    assert isinstance(feat_of(scene, random_rows(TASK), differentiable=True), Tensor)


@pytest.mark.usefixtures("eager_to_gather")
def test_kind_that_does_not_say_so_is_not_given_classes() -> None:
    assert isinstance(feat_of(Scene(), episodes(4)), Tensor)


@pytest.mark.parametrize(
    ("rows", "size", "device", "pays"),
    [
        (1024, 16, "cpu", True),
        (1023, 16, "cpu", False),
        (1024, 15, "cpu", False),
        (1024, 16, "meta", False),
    ],
)
def test_gathering_pays_for_many_rows_of_many_classes_on_a_cpu(rows: int, size: int, device: str, pays: bool) -> None:
    assert gathering_pays(torch.empty(rows, 2, size, device=device)) == pays
