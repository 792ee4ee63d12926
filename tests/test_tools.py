"""The maths that the models share, the masked distribution apart: values by hand and limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli

from tools import (
    BernoulliDist,
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
