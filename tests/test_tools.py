from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from envs.routing import TSPInstance, TSPRules
from tools import (
    BernoulliDist,
    OneHotDist,
    ReturnScale,
    SymexpTwoHot,
    SymlogGaussian,
    lambda_return,
    leave_one_out,
    symexp,
    symexp_bins,
    symlog,
    uniform,
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
    # Of 2,400 draws, 24 in the mixture are uniform over the three legal actions: 8 each.
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


def test_symlog_by_hand() -> None:
    torch.testing.assert_close(symlog(torch.tensor([0.0, math.e - 1, 1 - math.e**3])), torch.tensor([0.0, 1.0, -3.0]))


def test_symexp_inverts_symlog() -> None:
    magnitudes = torch.logspace(-6, 8, 50, dtype=torch.float64)
    values = torch.cat((-magnitudes, torch.zeros(1, dtype=torch.float64), magnitudes))
    torch.testing.assert_close(symexp(symlog(values)), values)


def test_symexp_bins_are_symmetric_and_spaced_by_symexp() -> None:
    bins = symexp_bins(41, device=CPU)
    assert torch.equal(bins, -bins.flip(0)) and bins[20] == 0
    torch.testing.assert_close(symlog(bins), torch.linspace(-20, 20, 41))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_symexp_bins_refuse_a_count_without_a_centre(count: int) -> None:
    with pytest.raises(ValueError, match=f"odd and at least 3, got {count}"):
        symexp_bins(count, device=CPU)


def test_two_hot_mean_by_hand() -> None:
    bins = torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0])
    logits = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0]).log()
    assert SymexpTwoHot(logits, bins).mean().item() == pytest.approx(1.0, abs=1e-6)  # (20 - 10 + 2 - 2) / 10


def test_two_hot_mean_of_symmetric_logits_is_exactly_0() -> None:
    bins = symexp_bins(255, device=CPU)
    half = torch.randn(64, 127)
    logits = torch.cat((half, torch.randn(64, 1), half.flip(-1)), -1)
    assert (SymexpTwoHot(logits, bins).mean() == 0).all()


def test_two_hot_log_prob_by_hand() -> None:
    bins = torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0])
    logits = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).log()
    value = torch.tensor([-0.25, 5.5, -1.0, 0.0, 1e9, -1e9, 10.0])
    expected = [
        0.25 * math.log(0.2) + 0.75 * math.log(0.3),
        0.5 * math.log(0.15) + 0.5 * math.log(0.25),
        *(math.log(share) for share in (0.2, 0.3)),
        *(math.log(share) for share in (0.25, 0.1, 0.25)),  # beyond the bins counts as the outermost
    ]
    log_prob = SymexpTwoHot(logits.expand(len(value), -1), bins).log_prob(value)
    torch.testing.assert_close(log_prob, torch.tensor(expected))


def test_two_hot_log_prob_gradient_is_code_minus_probabilities() -> None:
    bins = torch.tensor([-1.0, 0.0, 1.0])
    logits = torch.randn(3, requires_grad=True)
    value = torch.tensor(0.25, requires_grad=True)
    SymexpTwoHot(logits, bins).log_prob(value).backward()
    assert logits.grad is not None and value.grad is None
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.75, 0.25]) - torch.softmax(logits.detach(), -1))


def test_two_hot_learns_the_value_it_is_shown() -> None:
    bins = symexp_bins(255, device=CPU)
    value = torch.tensor([-3.8357, 0.0, 1234.5])
    position = (bins[:, None] <= value).sum(0) - 1
    share = (value - bins[position]) / (bins[position + 1] - bins[position])
    code = torch.zeros(3, 255).scatter(-1, position[:, None], 1 - share[:, None])
    code = code.scatter_add(-1, position[:, None] + 1, share[:, None])
    torch.testing.assert_close(SymexpTwoHot(code.log().clamp(min=-1e3), bins).mean(), value)


def test_symlog_gaussian_by_hand() -> None:
    prediction = torch.tensor([[1.0, 0.0], [2.0, -1.0]], requires_grad=True)
    dist = SymlogGaussian(prediction)
    value = torch.tensor([[math.e**3 - 1, 0.0], [math.e**2 - 1, 1 - math.e**4]])
    log_prob = dist.log_prob(value)  # half the squares of (1 - 3, 0) and (0, -1 + 4)
    torch.testing.assert_close(log_prob, torch.tensor([-2.0, -4.5]))
    torch.testing.assert_close(dist.mean()[0], torch.tensor([math.e - 1, 0.0]))
    (gradient,) = torch.autograd.grad(log_prob.sum(), prediction)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 0.0], [0.0, -3.0]]))


def test_bernoulli_equals_reference() -> None:
    logits = torch.tensor([-200.0, -1.0, 0.0, 0.5, 200.0])
    value = torch.tensor([False, True, True, False, True])
    dist, reference = BernoulliDist(logits), Bernoulli(logits=logits)
    torch.testing.assert_close(dist.log_prob(value), reference.log_prob(value.float()))
    torch.testing.assert_close(dist.mean(), reference.mean)
    assert dist.mode().tolist() == [False, False, False, True, True]


def test_bernoulli_takes_probabilities_as_targets() -> None:
    log_prob = BernoulliDist(torch.tensor([math.log(3.0)])).log_prob(torch.tensor([0.4]))
    torch.testing.assert_close(log_prob.item(), 0.4 * math.log(0.75) + 0.6 * math.log(0.25))


def test_lambda_return_by_hand() -> None:
    returns = lambda_return(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([10.0, 20.0, 30.0, 40.0]),
        torch.tensor([0.9, 0.8, 0.5]),
        lambda_=0.5,
    )
    # From the last: 3 + 0.5 * 40, then 2 + 0.8 * (30 + 23) / 2, then 1 + 0.9 * (20 + 23.2) / 2.
    torch.testing.assert_close(returns, torch.tensor([20.44, 23.2, 23.0]))


def test_lambda_return_stops_at_the_end_of_an_episode() -> None:
    returns = lambda_return(
        torch.tensor([-1.0, -2.0, -4.0]), torch.full((4,), 99.0), torch.tensor([1.0, 0.0, 1.0]), lambda_=1.0
    )
    assert returns.tolist() == [-3.0, -2.0, 95.0]


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
def test_lambda_return_equals_closed_form(lambda_: float) -> None:
    horizon = 6
    reward, value = torch.randn(4, horizon).double(), torch.randn(4, horizon + 1).double()
    discount = torch.rand(4, horizon).double()
    error = reward + discount * value[:, 1:] - value[:, :-1]
    expected = value[:, :-1].clone()
    for t in range(horizon):
        for later in range(t, horizon):
            expected[:, t] += lambda_ ** (later - t) * discount[:, t:later].prod(-1) * error[:, later]
    torch.testing.assert_close(lambda_return(reward, value, discount, lambda_=lambda_), expected)


def test_lambda_return_0_is_one_step() -> None:
    reward, value, discount = torch.randn(4, 6), torch.randn(4, 7), torch.rand(4, 6)
    torch.testing.assert_close(lambda_return(reward, value, discount, lambda_=0.0), reward + discount * value[:, 1:])


def test_lambda_return_1_is_monte_carlo() -> None:
    reward, value = torch.randn(4, 6), torch.randn(4, 7)
    returns = lambda_return(reward, value, torch.ones(4, 6), lambda_=1.0)
    torch.testing.assert_close(returns, reward.flip(-1).cumsum(-1).flip(-1) + value[:, -1:])


def test_leave_one_out_by_hand() -> None:
    baseline = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, -4.0]]))
    assert baseline.tolist() == [[4.0, 3.5, 1.5], [-2.0, -2.0, 0.0]]


def test_return_scale_percentile_by_hand() -> None:
    scale = ReturnScale("percentile", rate=0.5)
    scale.update(torch.arange(-100.0, 1.0))  # 5th and 95th percentiles -95 and -5, from 0 half-way
    torch.testing.assert_close(scale.scale(), torch.tensor(45.0))
    scale.update(torch.arange(-100.0, 1.0))
    torch.testing.assert_close(scale.scale(), torch.tensor(67.5))
    torch.testing.assert_close(scale.low, torch.tensor(-71.25))


def test_return_scale_mean_abs_by_hand() -> None:
    scale = ReturnScale("mean_abs", rate=0.25)
    scale.update(torch.tensor([[-30.0, 10.0], [20.0, -20.0]]))
    torch.testing.assert_close(scale.scale(), torch.tensor(5.0))


def test_return_scale_none_is_1() -> None:
    scale = ReturnScale("none", floor=7.0)
    scale.update(torch.tensor([-300.0, 100.0]))
    assert scale.scale() == 1


@pytest.mark.parametrize("method", ["percentile", "mean_abs"])
def test_return_scale_keeps_to_its_floor(method: str) -> None:
    scale = ReturnScale(method, floor=0.3, rate=1.0)
    assert scale.scale().item() == pytest.approx(0.3)  # before any update
    scale.update(torch.tensor([0.01, 0.01, 0.02]))
    assert scale.scale().item() == pytest.approx(0.3)


def test_return_scale_is_restored_with_its_state() -> None:
    scale, restored = ReturnScale("percentile"), ReturnScale("percentile")
    scale.update(1e4 * torch.randn(50))
    restored.load_state_dict(scale.state_dict())
    assert restored.scale() == scale.scale() > 1


def test_return_scale_passes_no_gradient() -> None:
    scale = ReturnScale("percentile", rate=1.0)
    scale.update(torch.randn(50, requires_grad=True))
    assert not scale.scale().requires_grad


@pytest.mark.parametrize("method", ["percentile", "mean_abs"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_return_scale_is_not_moved_by_returns_that_are_not_finite(method: str, value: float) -> None:
    scale = ReturnScale(method, rate=0.5)
    scale.update(10 * torch.randn(50))
    before = scale.scale()
    scale.update(torch.tensor([1.0, value, value]))
    assert scale.scale() == before > 1


def test_return_scale_refuses_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="'median'; choose one of percentile, mean_abs, none"):
        ReturnScale("median")


def test_uniform_follows_its_generator() -> None:
    first, second = (uniform((1000,), torch.Generator(device=CPU).manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert 0 <= first.min() < 0.01 and 0.99 < first.max() < 1
