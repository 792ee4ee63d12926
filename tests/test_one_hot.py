"""The masked one-hot distribution, against the distribution over the legal actions alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from envs.routing import TSPInstance, TSPRules
from tools import (
    OneHotDist,
)

CPU = torch.device("cpu")
UNIMIX = pytest.mark.parametrize("unimix", [0.0, 0.01])
LARGEST_BELOW_ONE = 1 - 2**-24  # the last float32 that a uniform draw can give
ROWS, ACTIONS = 32, 7


def logits_and_mask() -> tuple[Tensor, Tensor]:
    """Random logits and masks: any number of legal actions from 1 to all of them."""
    mask = torch.rand(ROWS, ACTIONS).argsort(-1) < torch.arange(ROWS)[:, None] % ACTIONS + 1
    return 3 * torch.randn(ROWS, ACTIONS), mask


def legal_subset(logits: Tensor, mask: Tensor, *, unimix: float) -> Categorical:
    """The reference for one row: a distribution that has never heard of the illegal actions."""
    probs = torch.softmax(logits[mask].double(), -1)
    return Categorical(probs=(1 - unimix) * probs + unimix / len(probs))


def each_row(logits: Tensor, mask: Tensor, *, unimix: float) -> list[Categorical]:
    return [legal_subset(*row, unimix=unimix) for row in zip(logits, mask, strict=True)]


def rank_among_legal(mask: Tensor, action: Tensor) -> Tensor:
    """Where each legal action stands in its row's legal subset."""
    return (mask.cumsum(-1) - 1).gather(-1, action[:, None]).squeeze(-1)


def legal_actions(mask: Tensor) -> Tensor:
    """A random legal action of every row."""
    return (torch.rand(mask.shape) * mask).argmax(-1)


@UNIMIX
def test_one_hot_probs_equal_legal_subset(unimix: float) -> None:
    logits, mask = logits_and_mask()
    dist = OneHotDist(logits, mask=mask, unimix=unimix)
    expected = torch.cat([row.probs for row in each_row(logits, mask, unimix=unimix)])
    torch.testing.assert_close(dist.probs[mask], expected.float())
    assert (dist.probs[~mask] == 0).all()
    assert torch.equal(dist.mode(), logits.masked_fill(~mask, -torch.inf).argmax(-1))


@UNIMIX
def test_one_hot_log_prob_equals_legal_subset(unimix: float) -> None:
    logits, mask = logits_and_mask()
    logits.requires_grad_()
    action = legal_actions(mask)
    ranks = rank_among_legal(mask, action)
    rows = each_row(logits, mask, unimix=unimix)
    expected = torch.stack([row.log_prob(rank) for row, rank in zip(rows, ranks, strict=True)])
    log_prob = OneHotDist(logits, mask=mask, unimix=unimix).log_prob(action)
    torch.testing.assert_close(log_prob, expected.float())
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient[~mask] == 0).all()


@UNIMIX
def test_one_hot_entropy_equals_legal_subset(unimix: float) -> None:
    logits, mask = logits_and_mask()
    logits.requires_grad_()
    expected = torch.stack([row.entropy() for row in each_row(logits, mask, unimix=unimix)])
    entropy = OneHotDist(logits, mask=mask, unimix=unimix).entropy()
    torch.testing.assert_close(entropy, expected.float())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[~mask] == 0).all()


@UNIMIX
def test_one_hot_without_mask_equals_categorical(unimix: float) -> None:
    logits, _ = logits_and_mask()
    dist = OneHotDist(logits, unimix=unimix)
    probs = (1 - unimix) * torch.softmax(logits.double(), -1) + unimix / ACTIONS
    expected = Categorical(probs=probs)
    torch.testing.assert_close(dist.probs, probs.float())
    torch.testing.assert_close(dist.log_probs, expected.logits.float())
    torch.testing.assert_close(dist.entropy(), expected.entropy().float())


@UNIMIX
def test_one_hot_kl_equals_legal_subset(unimix: float) -> None:
    logits, mask = logits_and_mask()
    others = torch.randn_like(logits)
    kl = OneHotDist(logits, mask=mask, unimix=unimix).kl(OneHotDist(others, mask=mask, unimix=unimix))
    pairs = zip(each_row(logits, mask, unimix=unimix), each_row(others, mask, unimix=unimix), strict=True)
    expected = torch.stack([kl_divergence(left, right) for left, right in pairs])
    torch.testing.assert_close(kl, expected.float(), rtol=1e-4, atol=1e-6)


def test_one_hot_kl_by_hand() -> None:
    fair, biased = OneHotDist(torch.tensor([1.0, 1.0]).log()), OneHotDist(torch.tensor([1.0, 3.0]).log())
    torch.testing.assert_close(fair.kl(biased).item(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    torch.testing.assert_close(biased.kl(fair).item(), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


@UNIMIX
def test_one_hot_empty_row_is_point_mass_on_index_0(unimix: float) -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True, True, False, True]])
    dist = OneHotDist(logits, mask=mask, unimix=unimix)
    assert dist.probs[0].tolist() == [1, 0, 0, 0]
    assert dist.entropy()[0] == 0 and dist.log_prob(torch.tensor([0, 1]))[0] == 0
    assert dist.mode()[0] == 0 and dist.sample(torch.tensor([LARGEST_BELOW_ONE, 0.5]))[0] == 0
    (dist.log_prob(torch.tensor([0, 1])).sum() + dist.entropy().sum()).backward()
    assert logits.grad is not None
    assert (logits.grad[0] == 0).all() and (logits.grad[1, mask[1]] != 0).all()


@UNIMIX
def test_one_hot_lone_legal_action_is_certain(unimix: float) -> None:
    logits = torch.randn(ACTIONS, ACTIONS, requires_grad=True)
    dist = OneHotDist(logits, mask=torch.eye(ACTIONS, dtype=torch.bool), unimix=unimix)
    assert torch.equal(dist.probs, torch.eye(ACTIONS))
    (gradient,) = torch.autograd.grad(dist.log_prob(torch.arange(ACTIONS)).sum() + dist.entropy().sum(), logits)
    assert (dist.entropy() == 0).all() and (gradient == 0).all()


@UNIMIX
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_hot_computes_half_precision_in_float32(dtype: torch.dtype, unimix: float) -> None:
    logits, mask = logits_and_mask()
    half = (100 * logits).to(dtype).requires_grad_()
    whole = half.detach().float().requires_grad_()
    action = legal_actions(mask)
    log_probs = [OneHotDist(x, mask=mask, unimix=unimix).log_prob(action) for x in (half, whole)]
    assert log_probs[0].dtype == torch.float32 and torch.equal(*log_probs)
    for log_prob in log_probs:
        log_prob.sum().backward()
    assert half.grad is not None and whole.grad is not None
    assert torch.equal(half.grad, whole.grad.to(dtype)) and half.grad.isfinite().all()


EXTREME_ROWS = [
    # logits, legal actions
    ([1e4, -1e4, 0.0, 1e4], [True, True, True, True]),
    ([1e4, -1e4, -1e4, 1e4], [False, True, True, False]),
    ([3e38, -3e38, 0.0, -3e38], [True, True, True, False]),
    ([3e38, -3e38, 3e38, -3e38], [False, True, False, True]),
    ([-3e38, -3e38, -3e38, -3e38], [False, True, True, False]),
    ([0.0, -3e38, -1e30, -3e38], [False, True, False, False]),
    ([3e38, 3e38, 3e38, 3e38], [True, True, False, True]),
]


@UNIMIX
def test_one_hot_holds_for_extreme_logits(unimix: float) -> None:
    logits = torch.tensor([row for row, _ in EXTREME_ROWS], requires_grad=True)
    mask = torch.tensor([legal for _, legal in EXTREME_ROWS])
    dist = OneHotDist(logits, mask=mask, unimix=unimix)
    rows = each_row(logits.detach(), mask, unimix=unimix)
    torch.testing.assert_close(dist.probs[mask], torch.cat([row.probs for row in rows]).float())
    assert (dist.probs[~mask] == 0).all()
    torch.testing.assert_close(dist.entropy(), torch.stack([row.entropy() for row in rows]).float())
    assert mask.gather(-1, dist.mode()[:, None]).all()
    for quantity in (dist.log_probs.clamp(min=-1e6).sum(), dist.entropy().sum(), dist.kl(dist.detach()).sum()):
        (gradient,) = torch.autograd.grad(quantity, logits, retain_graph=True)
        assert quantity.isfinite() and gradient.isfinite().all()
    assert dist.log_probs.isfinite().all()


def test_one_hot_log_prob_of_an_illegal_action_is_low_yet_finite() -> None:
    mask = torch.tensor([True, False, True])
    for unimix in (0.0, 0.01):
        log_prob = OneHotDist(torch.zeros(3), mask=mask, unimix=unimix).log_prob(torch.tensor(1))
        assert log_prob.isfinite() and log_prob < -80


@UNIMIX
def test_one_hot_sample_frequencies_are_exact_on_a_grid(unimix: float) -> None:
    mask = torch.tensor([False, True, False, True, True, False])
    eighths = torch.tensor([9.0, 2.0, 9.0, 5.0, 1.0, 9.0])
    dist = OneHotDist(eighths.log().expand(2400, -1), mask=mask.expand(2400, -1), unimix=unimix)
    drawn = dist.sample((torch.arange(2400) + 0.5) / 2400)
    # The mixture makes 24 of 2,400 draws uniform over the three legal actions: 8 each.
    expected = [0, 600, 0, 1500, 300, 0] if unimix == 0 else [0, 602, 0, 1493, 305, 0]
    assert drawn.bincount(minlength=6).tolist() == expected
    assert (drawn.diff() >= 0).all()


@UNIMIX
@pytest.mark.parametrize("edge", [0.0, LARGEST_BELOW_ONE, 1.0])  # 1.0: what half precision would round to
def test_one_hot_sample_never_yields_probability_0(edge: float, unimix: float) -> None:
    count = 20_000
    logits, mask = 3 * torch.randn(count, 20), torch.rand(count, 20) < 0.3
    logits[:5000] *= 1e4  # legal actions whose probability underflows to 0
    dist = OneHotDist(logits, mask=mask, unimix=unimix)
    for noise in (torch.full((count,), edge), torch.rand(count)):
        assert (dist.probs.gather(-1, dist.sample(noise)[:, None]) > 0).all()


def test_one_hot_one_hot_passes_the_gradient_of_the_probabilities() -> None:
    logits = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5, 4)
    dist = OneHotDist(logits, unimix=0.01)
    action = torch.tensor([0, 3, 1, 1, 2])
    encoded = dist.one_hot(action)
    assert torch.equal(encoded.detach(), torch.nn.functional.one_hot(action, 4).float())
    (gradient,) = torch.autograd.grad((weights * encoded).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * dist.probs).sum(), logits)
    assert torch.equal(gradient, expected) and (gradient != 0).any()


@UNIMIX
def test_one_hot_detach_keeps_the_distribution_and_drops_the_graph(unimix: float) -> None:
    logits, mask = logits_and_mask()
    dist = OneHotDist(logits.requires_grad_(), mask=mask, unimix=unimix)
    detached = dist.detach()
    assert torch.equal(detached.probs, dist.probs) and not detached.log_probs.requires_grad


def imagined_masks(*, num_nodes: int, horizon: int) -> Tensor:
    """Masks [start, step, node] of imagined rollouts that begin at every decision of one tour."""
    state = TSPRules.reset(TSPInstance(coords=torch.rand(num_nodes, 2)))
    masks = []
    for t in range(num_nodes + horizon - 1):
        masks.append(TSPRules.action_mask(state))
        # A rollout that outlives its episode stays at the closed tour's start.
        state, _ = TSPRules.step(state, torch.tensor((t + 1) % num_nodes if t < num_nodes else 0))
    return torch.stack([torch.stack(masks[start : start + horizon]) for start in range(num_nodes)])


def test_one_hot_unimix_does_not_leak_where_the_ancestors_did() -> None:
    # The ancestor masked the logits, then mixed in 1 % of a uniform distribution over all 20 nodes: at a decision
    # with i illegal nodes, an illegal one has probability 0.01 i / 20. Decision d = 1..20 of a tour has i = d, but
    # the last 19, because the start node opens; so has every step past the end, where a closed tour stays at its
    # start. Over 20 starts and 10 steps the mean of min(start + step, 19), step from 0, is 13.9, and
    # 0.01 * 13.9 / 20 = 0.695 %.
    mask = imagined_masks(num_nodes=20, horizon=10)
    logits = torch.randn(mask.shape)
    leaking = OneHotDist(logits.masked_fill(~mask, -1e9), unimix=0.01)
    ours = OneHotDist(logits, mask=mask, unimix=0.01)
    assert (~mask).sum(-1).double().mean().item() == pytest.approx(13.9)
    assert (leaking.probs * ~mask).sum(-1).mean().item() == pytest.approx(0.00695, abs=1e-7)
    assert (ours.probs * ~mask).max() == 0


def test_no_noise_draws_what_is_too_unlikely_for_a_number() -> None:
    dist = OneHotDist(torch.tensor([[-90.0, 0.0, -1.0]]))
    assert float(dist.probs[0, 0]) == 0 and int(dist.sample(torch.zeros(1))) == 1
