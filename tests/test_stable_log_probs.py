"""Log-probabilities of logits that hold anything: NaN, infinities, and numbers far apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from config import UserError
from tools import LOGIT_FLOOR, OneHotDist, StableLogProbs, stable_log_probs

NAN, INF = math.nan, math.inf
CLIP, MIN_PROB = 30.0, 1e-8


def stable(logits: Tensor, mask: Tensor | None = None, **changes: float) -> StableLogProbs:
    settings = {"clip": CLIP, "min_prob": MIN_PROB, **changes}
    return stable_log_probs(logits, mask, **settings)


def probs_of(row: list[float], mask: list[bool] | None = None, **changes: float) -> list[float]:
    found = stable(torch.tensor([row]), None if mask is None else torch.tensor([mask]), **changes)
    return found.log_probs.exp()[0].tolist()


def test_stable_log_probs_equal_the_legal_softmax_where_nothing_is_wrong():
    logits, mask = 3 * torch.randn(32, 7), torch.rand(32, 7) < 0.5
    mask[:, 3] = True
    expected = torch.log_softmax(logits.masked_fill(~mask, -INF).double(), -1).float()
    torch.testing.assert_close(stable(logits, mask, min_prob=0.0).log_probs, expected)
    torch.testing.assert_close(stable(logits, mask).log_probs.exp(), expected.exp(), rtol=1e-6, atol=2 * MIN_PROB)


def test_stable_log_probs_equal_those_of_the_one_hot_distribution():
    logits, mask = 3 * torch.randn(32, 7), torch.rand(32, 7) < 0.5
    mask[:, 3] = True
    # The floor gives each of n legal ones its share of n times the floor.
    floors = 0.01 / mask.sum(-1)
    rows = [stable(row, legal, min_prob=float(floor)) for row, legal, floor in zip(logits, mask, floors, strict=True)]
    found = torch.stack([row.log_probs for row in rows])
    assert (found[~mask] == -INF).all()
    torch.testing.assert_close(found[mask], OneHotDist(logits, mask=mask, unimix=0.01).log_probs[mask])


def test_stable_log_probs_floor_by_hand():
    # Three legal tokens at probabilities 3/4, 1/4 and nearly 0; a floor of 0.1 leaves 70 % to be shared so.
    row = [math.log(3.0), 0.0, -100.0, -INF]
    assert probs_of(row, min_prob=0.1) == pytest.approx([0.625, 0.275, 0.1, 0.0], abs=1e-6)


def test_stable_log_probs_clip_by_hand():
    # With a clip of 1 nothing is further than 2 below the top.
    weights = [1.0, math.exp(-1.5), math.exp(-2.0), math.exp(-2.0)]
    expected = [weight / sum(weights) for weight in weights]
    found = stable(torch.tensor([[5.0, 3.5, 2.0, -45.0]]), clip=1.0, min_prob=0.0)
    assert found.log_probs.exp()[0].tolist() == pytest.approx(expected)
    assert int(found.clipped) == 2


def test_what_is_illegal_takes_nothing_however_close_the_clip_is():
    weights = [1.0, math.exp(-1.0)]
    expected = [weights[0] / sum(weights), 0.0, 0.0, weights[1] / sum(weights)]
    assert probs_of([0.0, -INF, NAN, -1.0], clip=0.5, min_prob=0.0) == pytest.approx(expected)


def test_stable_log_probs_count_what_was_wrong():
    logits = torch.tensor([[NAN, INF, -INF, 0.0], [NAN, NAN, -70.0, 0.0], [NAN, NAN, NAN, NAN], [0.0, 0.0, 0.0, 0.0]])
    found = stable(logits)
    assert (int(found.nan), int(found.inf), int(found.clipped)) == (7, 1, 1)
    assert found.empty.tolist() == [False, False, True, False]


def test_nan_is_illegal():
    assert probs_of([NAN, 0.0, 0.0, NAN]) == pytest.approx([0.0, 0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("row", "probs"),
    [
        ([INF, 2.0, -98.0], [0.5, 0.5, MIN_PROB]),
        ([INF, INF, -INF], [0.5, 0.5, 0.0]),
        ([INF, NAN, -INF], [1.0, 0.0, 0.0]),
    ],
)
def test_infinity_counts_as_the_largest_finite_logit(row: list[float], probs: list[float]):
    assert probs_of(row) == pytest.approx(probs, rel=1e-3)


@pytest.mark.parametrize("min_prob", [0.0, MIN_PROB, 0.1])
def test_what_is_illegal_keeps_probability_0(min_prob: float):
    logits, mask = 100 * torch.randn(64, 9), torch.rand(64, 9) < 0.5
    logits[:, 0], logits[:, 1], mask[:, 2] = -INF, NAN, True
    illegal = ~mask | ~logits.isfinite()
    assert (stable(logits, mask, min_prob=min_prob).log_probs[illegal] == -INF).all()
    assert (stable(logits, mask, min_prob=min_prob, illegal=LOGIT_FLOOR).log_probs[illegal] == LOGIT_FLOOR).all()


@pytest.mark.parametrize(
    ("row", "mask", "probs"),
    [
        ([NAN, -INF, NAN, -INF], None, [0.5, 0.0, 0.5, 0.0]),
        ([-INF, -INF, -INF, -INF], None, [0.25, 0.25, 0.25, 0.25]),
        ([NAN, 1.0, NAN, NAN], [True, False, True, False], [0.5, 0.0, 0.5, 0.0]),
        ([3.0, 1.0, NAN, INF], [False, False, False, False], [0.25, 0.25, 0.25, 0.25]),
    ],
)
@pytest.mark.parametrize("min_prob", [0.0, MIN_PROB])
def test_row_with_nothing_legal_is_uniform(row, mask, probs, min_prob: float):
    assert probs_of(row, mask, min_prob=min_prob) == pytest.approx(probs)


@pytest.mark.parametrize("shift", [-150.0, 1e4, 1e6])
def test_stable_log_probs_do_not_change_with_a_shift_of_the_row(shift: float):
    # Multiples of 1/4, to which such numbers can be added without rounding.
    logits = (30 * torch.randn(8, 1000) * 4).round() / 4
    logits[0, :3] = torch.tensor([NAN, INF, -INF])
    assert torch.equal(stable(logits + shift).log_probs, stable(logits).log_probs)


WILD = [
    [NAN, 150.0, -150.0, INF, -INF],
    [NAN, NAN, NAN, NAN, NAN],
    [-INF, -INF, -INF, -INF, -INF],
    [INF, INF, INF, INF, INF],
    [3e38, -3e38, 0.0, NAN, -INF],
    [-3.4e38, NAN, -3.4e38, -INF, -INF],
    [0.0, -INF, -INF, -INF, -INF],
]


@pytest.mark.parametrize("min_prob", [0.0, MIN_PROB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stable_log_probs_of_wild_rows_are_probabilities(dtype: torch.dtype, min_prob: float):
    found = stable(torch.tensor(WILD).to(dtype), min_prob=min_prob).log_probs
    assert found.dtype == torch.float32 and (found <= 0).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(WILD)))


def test_stable_log_probs_are_never_above_0():
    # One sure token among many: rounding must not take its probability above 1.
    logits = torch.randn(2000, 50)
    logits[:, 0] += torch.linspace(0, 100, 2000)
    assert (stable(logits).log_probs <= 0).all() and (stable(logits, min_prob=0.0).log_probs <= 0).all()


@pytest.mark.parametrize("min_prob", [0.0, MIN_PROB])
def test_stable_log_probs_have_finite_gradients(min_prob: float):
    logits = torch.tensor(WILD, requires_grad=True)
    found = stable(logits, min_prob=min_prob, illegal=LOGIT_FLOOR)
    entropy = -(found.log_probs.exp() * found.log_probs).sum()
    for quantity in (entropy, found.log_probs.clamp(min=-1e6).sum()):
        (gradient,) = torch.autograd.grad(quantity, logits, retain_graph=True)
        assert quantity.isfinite() and gradient.isfinite().all()
        assert (gradient[found.empty] == 0).all() and (gradient[logits.isnan()] == 0).all()


@pytest.mark.parametrize("min_prob", [0.0, MIN_PROB])
def test_stable_log_probs_have_the_gradient_of_the_softmax(min_prob: float):
    logits, action = torch.randn(16, 5, requires_grad=True), torch.arange(16)[:, None] % 5
    (gradient,) = torch.autograd.grad(stable(logits, min_prob=min_prob).log_probs.gather(-1, action).sum(), logits)
    (expected,) = torch.autograd.grad(torch.log_softmax(logits, -1).gather(-1, action).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_floors_that_leave_nothing_to_share_are_refused():
    with pytest.raises(UserError, match="min_prob 0.3 for each of 4"):
        stable(torch.zeros(2, 4), min_prob=0.3)
