import math

import pytest
import torch

from groups.losses import Scored, advantages, clipped_gain, divergence, mean_over, surrogate

REWARD = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
ONE = torch.ones(())


def test_advantages_within_a_group_by_hand():
    deviation = math.sqrt((4 + 1 + 9) / 2)
    found = advantages(REWARD, baseline="group", scale=None)
    assert found[0].tolist() == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation], rel=1e-4)


@pytest.mark.parametrize(("value", "count"), [(12345.678, 8), (1e6 + 0.1, 7), (0.1, 7), (99.9, 7)])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_equal_rewards_of_any_size_have_no_advantage(baseline, value, count):
    assert advantages(torch.full((1, count), value), baseline=baseline, scale=None).tolist() == [[0.0] * count]


def test_what_stands_behind_the_end_changes_nothing():
    log_prob = torch.tensor([[[-1.0, -0.5], [-2.0, -200.0]]], requires_grad=True)
    reference = torch.tensor([[[-1.0, -1.0], [-1.0, 0.0]]])
    loss, _ = losses(log_prob, reference=reference, kl=0.1, before=torch.zeros(1, 2, 2))
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and float(gradient[0, 1, 1]) == 0


def test_samples_that_all_earned_the_same_teach_nothing():
    assert advantages(REWARD, baseline="group", scale=None)[1].tolist() == [0.0, 0.0, 0.0]
    assert advantages(REWARD, baseline="leave_one_out", scale=None)[1].tolist() == [0.0, 0.0, 0.0]


def test_advantages_against_the_others_by_hand():
    found = advantages(REWARD, baseline="leave_one_out", scale=2 * ONE)
    assert found[0].tolist() == pytest.approx([-1.5, -0.75, 2.25])


def test_advantages_do_not_depend_on_what_all_rewards_share():
    for baseline in ("group", "leave_one_out"):
        for scale in (None, ONE):
            shifted, plain = (advantages(REWARD + by, baseline=baseline, scale=scale) for by in (100, 0))
            torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)


def test_clipped_gain_by_hand():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log().requires_grad_()
    gain = clipped_gain(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), clip=0.2)
    assert gain.tolist() == pytest.approx([1.2, -1.5, 0.5, -0.8, 2.2])
    (gradient,) = torch.autograd.grad(gain.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([0.0, -1.5, 0.5, 0.0, 2.2])


def test_divergence_is_never_negative_and_estimates_the_kl():
    ours, theirs = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    each = divergence(ours.log(), theirs.log())
    assert (each > 0).all()
    # Its mean over what we draw is the divergence itself.
    assert float((ours * each).sum()) == pytest.approx(float((ours * (ours / theirs).log()).sum()))
    assert divergence(ours.log(), ours.log()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("length", "expected"), [("sample", 3.25), ("decision", 8.5 / 3), ("longest", 8.5 / 10)])
def test_mean_over_decisions_by_hand(length, expected):
    values = torch.tensor([[[1.0, 3.0], [4.5, 100.0]]])
    counted = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    # Two samples, of which the longest possible has 5 decisions.
    assert float(mean_over(values, counted, length=length, longest=5)) == pytest.approx(expected)


def losses(log_prob, **changes):
    scored = Scored(log_prob, torch.zeros_like(log_prob), torch.zeros(()))
    choice = {
        **{"before": log_prob.detach(), "reference": None, "advantage": torch.tensor([[1.0, -2.0]])},
        **{"counted": torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]), "clip": 0.2, "length": "decision", "longest": 2},
        **{"entropy": 0.0, "kl": 0.0},
    }
    return surrogate(scored, **{**choice, **changes})


def test_surrogate_on_policy_has_the_gradient_of_reinforce():
    log_prob = torch.tensor([[[-1.0, -0.5], [-2.0, -9.0]]], requires_grad=True)
    loss, _ = losses(log_prob)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    # What lies behind a sample's end has no gradient.
    assert gradient[0].tolist() == [pytest.approx([-1 / 3, -1 / 3]), pytest.approx([2 / 3, 0.0])]


def test_surrogate_pulls_towards_the_reference():
    log_prob = torch.tensor([[[-1.0, -1.0], [-1.0, -1.0]]], requires_grad=True)
    reference = torch.full((1, 2, 2), -0.5)
    loss, metrics = losses(log_prob, advantage=torch.zeros(1, 2), reference=reference, kl=2.0)
    each = math.exp(0.5) - 1.5
    assert float(loss.detach()) == pytest.approx(2 * each) and float(metrics["reference_kl"]) == pytest.approx(each)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    # More likely is nearer to it.
    assert float(gradient[0, 0, 0]) == pytest.approx(2 * (1 - math.exp(0.5)) / 3)


def test_surrogate_counts_the_ratios_that_are_clipped():
    log_prob = torch.tensor([[[-1.0, -1.0], [-1.0, -1.0]]])
    before = log_prob - torch.tensor([[[0.5, 0.0], [0.0, 0.5]]])
    assert float(losses(log_prob, before=before)[1]["ratio_clip_rate"]) == pytest.approx(1 / 3)
