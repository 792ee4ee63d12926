"""Distributions over actions that are not one index: several choices, and continuous numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional

from parts.action_distributions import BoundedNormal, MultiOneHot
from tools import OneHotDist

ROWS, ACTIONS = 32, 3
SIZES = (2, 5, 1, 3)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
UNIMIX = pytest.mark.parametrize("unimix", [0.0, 0.1])
LARGEST_BELOW_ONE = 1 - 2**-24  # the last float32 that a uniform draw can give


def normal_outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    mean, std = (2 * torch.randn(ROWS, ACTIONS, generator=draws) for _ in range(2))
    return mean.requires_grad_(), std.requires_grad_()


def normal_reference(mean: Tensor, std: Tensor) -> Independent:
    return Independent(Normal(mean.tanh(), 0.1 + 0.9 * torch.sigmoid(std + 2)), 1)


def choice_logits(seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(ROWS, sum(SIZES), generator=draws)).requires_grad_()


def choices(seed: int = 1) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (ROWS,), generator=draws) for size in SIZES], -1)


def choice_references(logits: Tensor, *, unimix: float) -> list[Categorical]:
    parts = logits.split(SIZES, -1)
    return [Categorical(probs=(1 - unimix) * part.softmax(-1) + unimix / part.shape[-1]) for part in parts]


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    weight = torch.linspace(-1, 2, ours.numel()).view_as(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad((theirs * weight).sum(), inputs, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# Continuous actions


def test_bounded_normal_equals_reference():
    mean, std = normal_outputs()
    dist, reference = BoundedNormal(mean, std), normal_reference(mean, std)
    action = 1.5 * torch.randn(ROWS, ACTIONS)
    pairs = [(dist.log_prob(action), reference.log_prob(action)), (dist.entropy(), reference.entropy())]
    for ours, theirs in pairs:
        assert ours.shape == (ROWS,)
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(ours, theirs, [mean, std])
    assert torch.equal(dist.mode(), reference.mean)


def test_bounded_normal_by_hand():
    dist = BoundedNormal(torch.tensor([0.0]), torch.tensor([-2.0]), low=0.2, high=0.6)
    # The sigmoid of 0 is the middle of the range: a standard deviation of 0.4.
    assert dist.mode().item() == 0
    assert dist.log_prob(torch.tensor([0.8])).item() == pytest.approx(-2 - math.log(0.4 * math.sqrt(2 * math.pi)))
    assert dist.entropy().item() == pytest.approx(0.5 + math.log(0.4 * math.sqrt(2 * math.pi)))


def test_bounded_normal_keeps_its_bounds():
    dist = BoundedNormal(torch.tensor([-1e4, 1e4]), torch.tensor([-1e4, 1e4]))
    assert dist.mode().tolist() == [-1.0, 1.0]
    # One standard deviation above the mean.
    noise = Normal(0.0, 1.0).cdf(torch.ones(2))
    torch.testing.assert_close(dist.sample(noise), torch.tensor([-1 + 0.1, 1 + 1.0]))


def test_bounded_normal_samples_by_the_inverse_cumulative_distribution():
    mean, std = normal_outputs()
    dist, noise = BoundedNormal(mean, std), torch.rand(ROWS, ACTIONS).clamp(0.01, 0.99)
    sample = dist.sample(noise)
    torch.testing.assert_close(sample, normal_reference(mean, std).base_dist.icdf(noise).detach())
    assert (sample.abs() > 1).any(), "draws are clipped"
    assert not sample.requires_grad


def test_bounded_normal_samples_are_finite_at_both_ends():
    mean, std = normal_outputs()
    dist = BoundedNormal(mean, std)
    for end, sign in ((0.0, -1), (LARGEST_BELOW_ONE, 1)):
        sample = dist.sample(torch.full((ROWS, ACTIONS), end))
        assert sample.isfinite().all() and dist.log_prob(sample).isfinite().all()
        assert (sign * (sample - dist.mode()) > 0.5).all()


def test_bounded_normal_embeds_the_action_itself():
    mean, std = normal_outputs()
    action = torch.linspace(-3, 3, ROWS * ACTIONS).view(ROWS, ACTIONS)
    embedded = BoundedNormal(mean, std).embed(action)
    inside = action.abs() <= 1
    assert torch.equal(embedded[inside], action[inside])
    torch.testing.assert_close(embedded[~inside], action[~inside].sign())


def test_bounded_normal_embeds_with_reparameterised_gradients():
    mean, std = normal_outputs()
    dist, reference = BoundedNormal(mean, std), normal_reference(mean, std).base_dist
    action = dist.sample(torch.rand(ROWS, ACTIONS))
    distance = ((action - reference.mean) / reference.stddev).detach()
    moved = (reference.mean + reference.stddev * distance) / action.abs().clamp(min=1)
    assert_same_gradients(dist.embed(action), moved, [mean, std])


@HALF
def test_bounded_normal_is_computed_in_float32(dtype: torch.dtype):
    mean, std = (output.detach().to(dtype) for output in normal_outputs())
    dist, whole = BoundedNormal(mean, std), BoundedNormal(mean.float(), std.float())
    action = torch.randn(ROWS, ACTIONS)
    assert torch.equal(dist.log_prob(action), whole.log_prob(action))
    assert torch.equal(dist.entropy(), whole.entropy())
    assert dist.mode().dtype == torch.float32


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_bounded_normal_is_finite_at_extreme_outputs(extreme: float):
    mean, std = (torch.full((2, ACTIONS), extreme, requires_grad=True) for _ in range(2))
    dist = BoundedNormal(mean, std)
    action = dist.sample(torch.rand(2, ACTIONS))
    values = dist.log_prob(action), dist.entropy(), dist.embed(action).sum(-1)
    assert all(value.isfinite().all() for value in values)
    gradients = torch.autograd.grad(torch.stack(values).sum(), [mean, std])
    assert all(gradient.isfinite().all() for gradient in gradients)


# Several choices


@UNIMIX
def test_multi_one_hot_equals_reference(unimix: float):
    logits, action = choice_logits(), choices()
    dist, references = MultiOneHot(logits, SIZES, unimix=unimix), choice_references(logits, unimix=unimix)
    log_prob = sum(reference.log_prob(choice) for reference, choice in zip(references, action.unbind(-1), strict=True))
    entropy = sum(reference.entropy() for reference in references)
    for ours, theirs in ((dist.log_prob(action), log_prob), (dist.entropy(), entropy)):
        assert isinstance(theirs, Tensor) and ours.shape == (ROWS,)
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(ours, theirs, [logits])
    assert torch.equal(dist.mode(), torch.stack([reference.probs.argmax(-1) for reference in references], -1))


def test_multi_one_hot_samples_each_choice_by_its_own_noise():
    logits = torch.tensor([0.5, 0.5, 0.1, 0.2, 0.7]).log()
    dist = MultiOneHot(logits, (2, 3))
    noise = torch.tensor([[0.4, 0.05], [0.6, 0.05], [0.4, 0.2], [0.6, 0.9], [0.0, LARGEST_BELOW_ONE]])
    drawn = [dist.sample(row).tolist() for row in noise]
    assert drawn == [[0, 0], [1, 0], [0, 1], [1, 2], [0, 2]]


def test_multi_one_hot_samples_as_often_as_it_says():
    logits = choice_logits()[:1].detach()
    draws = 20_000
    noise = torch.rand(draws, len(SIZES), generator=torch.Generator().manual_seed(2))
    sample = MultiOneHot(logits.expand(draws, -1), SIZES, unimix=0.1).sample(noise)
    for index, reference in enumerate(choice_references(logits, unimix=0.1)):
        shares = functional.one_hot(sample[:, index], SIZES[index]).float().mean(0)
        torch.testing.assert_close(shares, reference.probs[0], atol=0.02, rtol=0)


@UNIMIX
def test_multi_one_hot_embeds_with_straight_through_gradients(unimix: float):
    logits, action = choice_logits(), choices()
    embedded = MultiOneHot(logits, SIZES, unimix=unimix).embed(action)
    pairs = zip(action.unbind(-1), SIZES, strict=True)
    expected = torch.cat([functional.one_hot(choice, size) for choice, size in pairs], -1).float()
    torch.testing.assert_close(embedded, expected)
    probs = torch.cat([reference.probs for reference in choice_references(logits, unimix=unimix)], -1)
    assert_same_gradients(embedded, probs, [logits])


def test_multi_one_hot_of_one_choice_is_a_one_hot_dist():
    logits = choice_logits().detach()
    dist, single = MultiOneHot(logits, (sum(SIZES),), unimix=0.01), OneHotDist(logits, unimix=0.01)
    action = torch.arange(ROWS) % sum(SIZES)
    assert torch.equal(dist.log_prob(action[:, None]), single.log_prob(action))
    assert torch.equal(dist.embed(action[:, None]), single.embed(action))


@HALF
def test_multi_one_hot_is_computed_in_float32(dtype: torch.dtype):
    logits, action = choice_logits().detach().to(dtype), choices()
    dist, whole = MultiOneHot(logits, SIZES, unimix=0.01), MultiOneHot(logits.float(), SIZES, unimix=0.01)
    assert torch.equal(dist.log_prob(action), whole.log_prob(action))
    assert torch.equal(dist.entropy(), whole.entropy())
    assert dist.embed(action).dtype == torch.float32


@UNIMIX
def test_multi_one_hot_is_finite_at_extreme_logits(unimix: float):
    logits = (1e30 * torch.randn(ROWS, sum(SIZES)).sign()).requires_grad_()
    dist, action = MultiOneHot(logits, SIZES, unimix=unimix), choices()
    values = dist.log_prob(action), dist.entropy(), dist.embed(action).sum(-1)
    assert all(value.isfinite().all() for value in values)
    assert torch.autograd.grad(torch.stack(values).sum(), logits)[0].isfinite().all()
