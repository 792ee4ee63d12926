"""What holds for every shape, mask and magnitude: distributions, encoders and rules, on inputs found by hypothesis."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from envs.routing import TSPInstance, TSPRules
from envs.tasks import ObservationKey
from parts.action_distributions import BoundedNormal, MultiOneHot
from parts.observations import ObservationDecoder, ObservationEncoder
from parts.sets import PointsEncoder, SetEncoder
from tools import (
    BernoulliDist,
    OneHotDist,
    SymexpTwoHot,
    SymlogGaussian,
    symexp,
    symexp_bins,
    symlog,
)

Drawn = TypeVar("Drawn")
# The same examples in every run.
searched = settings(max_examples=100, deadline=None, derandomize=True, database=None)
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "float16", "autocast"],
)
UNIMIX = st.sampled_from([0.0, 0.01])
LARGEST = torch.finfo(torch.float32).max
MAGNITUDES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 150.0, -150.0, 1e4, -1e4, 1e19, -1e19, LARGEST, -LARGEST]),
    st.floats(-LARGEST, LARGEST, width=32),
    st.floats(-10, 10, width=32),
)


@st.composite
def numbers(draw: st.DrawFn, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """A tensor of numbers of any magnitude, up to the largest that `dtype` holds."""
    count, largest = math.prod(shape), torch.finfo(dtype).max
    values = draw(st.lists(MAGNITUDES, min_size=count, max_size=count))
    return torch.tensor(values).clamp(-largest, largest).to(dtype).view(shape).requires_grad_(grad)


@st.composite
def booleans(draw: st.DrawFn, *shape: int) -> Tensor:
    count = math.prod(shape)
    return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(shape)


@st.composite
def noises(draw: st.DrawFn, *shape: int) -> Tensor:
    """What the samplers are given: uniform in [0, 1), both ends among them."""
    count = math.prod(shape)
    edges = st.sampled_from([0.0, 1 - 2**-24])
    draws = st.one_of(edges, st.floats(0, 1, width=32, exclude_max=True))
    return torch.tensor(draw(st.lists(draws, min_size=count, max_size=count))).view(shape)


def precision(autocast: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()


def assert_finite(quantities: dict[str, Tensor], inputs: Iterable[Tensor]) -> None:
    """Every quantity is finite, and so is its gradient to every input."""
    inputs = list(inputs)
    for name, quantity in quantities.items():
        assert quantity.isfinite().all(), name
        if quantity.requires_grad:
            gradients = torch.autograd.grad(quantity.sum(), inputs, retain_graph=True, allow_unused=True)
            assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None), name


# Distributions

ROWS = 2


@PRECISIONS
@searched
@given(data=st.data(), size=st.integers(1, 6), masked=st.booleans(), unimix=UNIMIX)
def test_one_hot_holds_for_every_magnitude(
    data: st.DataObject, size: int, masked: bool, unimix: float, dtype: torch.dtype, autocast: bool
):
    logits, others = (data.draw(numbers(ROWS, size, dtype=dtype)) for _ in range(2))
    mask = data.draw(booleans(ROWS, size)) if masked else None
    noise, action = data.draw(noises(ROWS)), torch.tensor(data.draw(st.tuples(*ROWS * [st.integers(0, size - 1)])))
    with precision(autocast):
        dist, other = (OneHotDist(each, mask=mask, unimix=unimix) for each in (logits, others))
        drawn = torch.stack((dist.sample(noise), dist.mode()))
        quantities = {
            "probs": dist.probs,
            "log_prob": dist.log_prob(action),
            "entropy": dist.entropy(),
            "kl": dist.kl(other),
            "embed": dist.embed(action),
        }
    assert_finite(quantities, [logits, others])
    torch.testing.assert_close(dist.probs.sum(-1), torch.ones(ROWS))
    assert (dist.probs.expand(2, -1, -1).gather(-1, drawn[..., None]) > 0).all()
    assert (quantities["log_prob"] < 1e-5).all() and (quantities["kl"] > -1e-5).all()
    assert (quantities["entropy"] > -1e-5).all() and (quantities["entropy"] < math.log(size) + 1e-5).all()
    if mask is not None:
        legal = torch.where(mask.any(-1, keepdim=True), mask, torch.arange(size) == 0)
        assert (dist.probs[~legal] == 0).all() and legal.expand(2, -1, -1).gather(-1, drawn[..., None]).all()


@PRECISIONS
@searched
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), unimix=UNIMIX)
def test_multi_one_hot_holds_for_every_magnitude(
    data: st.DataObject, sizes: tuple[int, ...], unimix: float, dtype: torch.dtype, autocast: bool
):
    logits, noise = data.draw(numbers(ROWS, sum(sizes), dtype=dtype)), data.draw(noises(ROWS, len(sizes)))
    action = torch.tensor([[data.draw(st.integers(0, size - 1)) for size in sizes] for _ in range(ROWS)])
    with precision(autocast):
        dist = MultiOneHot(logits, sizes, unimix=unimix)
        sample, mode = dist.sample(noise), dist.mode()
        quantities = {
            "log_prob": dist.log_prob(action),
            "log_prob of the sample": dist.log_prob(sample),
            "log_prob of the mode": dist.log_prob(mode),
            "entropy": dist.entropy(),
            "embed": dist.embed(action),
        }
    assert_finite(quantities, [logits])
    assert all(((drawn >= 0) & (drawn < torch.tensor(sizes))).all() for drawn in (sample, mode))
    assert (quantities["log_prob of the mode"] > -len(sizes) * math.log(max(sizes)) - 1e-4).all()
    assert (quantities["embed"].sum(-1) - len(sizes)).abs().max() < 1e-4


@PRECISIONS
@searched
@given(data=st.data(), size=st.integers(1, 3))
def test_bounded_normal_holds_for_every_magnitude(data: st.DataObject, size: int, dtype: torch.dtype, autocast: bool):
    mean, std = (data.draw(numbers(ROWS, size, dtype=dtype)) for _ in range(2))
    action, noise = data.draw(numbers(ROWS, size, dtype=dtype, grad=False)), data.draw(noises(ROWS, size))
    with precision(autocast):
        dist = BoundedNormal(mean, std)
        sample = dist.sample(noise)
        quantities = {
            "mode": dist.mode(),
            "sample": sample,
            "log_prob": dist.log_prob(action),
            "log_prob of the sample": dist.log_prob(sample),
            "entropy": dist.entropy(),
            "embed": dist.embed(action),
        }
    assert_finite(quantities, [mean, std])
    assert (quantities["log_prob"] <= dist.log_prob(dist.mode())).all()
    assert (dist.mode().abs() <= 1).all() and (quantities["embed"].abs() <= 1).all()
    assert ((sample - dist.mode()).abs() < 5.5).all()


@PRECISIONS
@searched
@given(data=st.data(), count=st.sampled_from([3, 5, 41]))
def test_two_hot_holds_for_every_magnitude(data: st.DataObject, count: int, dtype: torch.dtype, autocast: bool):
    bins = symexp_bins(count, device="cpu")
    logits = data.draw(numbers(ROWS, count, dtype=dtype))
    value = data.draw(numbers(ROWS, dtype=dtype, grad=False))
    with precision(autocast):
        dist = SymexpTwoHot(logits, bins)
        quantities = {"mean": dist.mean(), "log_prob": dist.log_prob(value)}
    assert_finite(quantities, [logits])
    assert (quantities["mean"].abs() <= 1.001 * bins[-1]).all() and (quantities["log_prob"] < 1e-5).all()


@PRECISIONS
@searched
@given(data=st.data(), size=st.integers(1, 4))
def test_symlog_gaussian_holds_for_every_magnitude(data: st.DataObject, size: int, dtype: torch.dtype, autocast: bool):
    mean, value = data.draw(numbers(ROWS, size, dtype=dtype)), data.draw(numbers(ROWS, size, dtype=dtype, grad=False))
    with precision(autocast):
        dist = SymlogGaussian(mean)
        quantities = {"mean": dist.mean(), "log_prob": dist.log_prob(value)}
    assert_finite(quantities, [mean])
    assert (quantities["log_prob"] <= 0).all()


@PRECISIONS
@searched
@given(data=st.data(), size=st.integers(1, 4))
def test_bernoulli_holds_for_every_magnitude(data: st.DataObject, size: int, dtype: torch.dtype, autocast: bool):
    logits, value = data.draw(numbers(ROWS, size, dtype=dtype)), data.draw(booleans(ROWS, size))
    share = data.draw(noises(ROWS, size))
    with precision(autocast):
        dist = BernoulliDist(logits)
        quantities = {
            "mean": dist.mean(),
            "log_prob": dist.log_prob(value),
            "log_prob of a share": dist.log_prob(share),
            "sum": dist.log_prob(value).sum(-1),
        }
    assert_finite(quantities, [logits])
    assert ((dist.mean() >= 0) & (dist.mean() <= 1)).all() and (quantities["log_prob"] <= 0).all()
    assert (dist.log_prob(dist.mode()) >= -math.log(2) - 1e-6).all()


@PRECISIONS
@searched
@given(data=st.data())
def test_symlog_and_symexp_hold_for_every_magnitude(data: st.DataObject, dtype: torch.dtype, autocast: bool):
    x = data.draw(numbers(4, dtype=dtype))
    with precision(autocast):
        assert_finite({"symlog": symlog(x), "symexp": symexp(x), "there and back": symexp(symlog(x))}, [x])


# Sets

PADDING = st.sampled_from([0.0, -1e30, LARGEST, math.nan, math.inf, -math.inf])


@st.composite
def sets(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Sets of points, where they are valid, and the same sets with something else for padding."""
    rows, places, features = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    valid = draw(booleans(rows, places))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e3]))
    draws = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    points = scale * torch.randn(rows, places, features, generator=draws)
    filled = [points.masked_fill(~valid[..., None], draw(PADDING)) for _ in range(2)]
    return filled[0].requires_grad_(), valid, filled[1].requires_grad_()


def make_set_encoder(features: int, layers: int) -> SetEncoder:
    torch.manual_seed(0)
    return SetEncoder(features, width=8, layers=layers, heads=2, hidden=8)


def make_points_encoder(features: int, layers: int) -> PointsEncoder:
    torch.manual_seed(0)
    return PointsEncoder(features, width=8, layers=layers, heads=2, hidden=8)


ENCODERS = pytest.mark.parametrize("make", [make_set_encoder, make_points_encoder])
MakeEncoder = Callable[[int, int], SetEncoder | PointsEncoder]


@ENCODERS
@searched
@given(drawn=sets(), layers=st.integers(1, 4))
def test_set_encoders_read_no_padding(make: MakeEncoder, drawn: tuple[Tensor, Tensor, Tensor], layers: int):
    points, valid, other = drawn
    encode = make(points.shape[-1], layers)
    encoded = encode(points, valid)
    assert torch.equal(encoded, encode(other, valid))
    assert_finite({"encoded": encoded}, [points, *encode.parameters()])
    (gradient,) = torch.autograd.grad(encoded.square().sum(), points)
    assert (gradient[~valid] == 0).all()


@ENCODERS
@searched
@given(drawn=sets(), layers=st.integers(1, 4))
def test_set_encoders_make_nothing_of_empty_sets(make: MakeEncoder, drawn: tuple[Tensor, Tensor, Tensor], layers: int):
    points, valid, _ = drawn
    encode = make(points.shape[-1], layers)
    nothing = encode(points, valid)[~valid.any(-1)]
    assert (nothing == 0).all()
    gradients = torch.autograd.grad(nothing.sum(), [points, *encode.parameters()])
    assert all((gradient == 0).all() for gradient in gradients)


@ENCODERS
@searched
@given(data=st.data(), drawn=sets())
def test_set_encoders_keep_a_changed_mask_to_its_own_set(
    make: MakeEncoder, data: st.DataObject, drawn: tuple[Tensor, Tensor, Tensor]
):
    points, valid, _ = drawn
    points = points.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1e4, 1e4).requires_grad_()
    row = data.draw(st.integers(0, len(points) - 1))
    changed = valid.clone()
    changed[row] = data.draw(booleans(points.shape[1]))
    others = torch.arange(len(points)) != row
    encode = make(points.shape[-1], 2)
    encoded = [encode(points, mask)[others] for mask in (valid, changed)]
    gradients = [torch.autograd.grad(each.square().sum(), points)[0] for each in encoded]
    assert torch.equal(*encoded) and torch.equal(*gradients)


# Observations


@st.composite
def observations(draw: st.DrawFn) -> tuple[dict[str, ObservationKey], dict[str, Tensor]]:
    """Keys of some of the kinds, and a batch of two observations of them."""
    keys: dict[str, ObservationKey] = {}
    obs: dict[str, Tensor] = {}
    kinds = draw(st.sets(st.sampled_from(["vector", "classes", "image", "set"]), min_size=1))
    if "vector" in kinds:
        size = draw(st.integers(1, 4))
        keys["vector"] = ObservationKey("vector", (size,), torch.float32)
        obs["vector"] = draw(numbers(ROWS, size, grad=False))
    if "classes" in kinds:
        sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        keys["classes"] = ObservationKey("classes", (len(sizes),), torch.int64, classes=sizes)
        obs["classes"] = torch.tensor([[draw(st.integers(0, size - 1)) for size in sizes] for _ in range(ROWS)])
    if "image" in kinds:
        keys["image"] = ObservationKey("image", (16, 16, 1), torch.uint8)
        obs["image"] = torch.full((ROWS, 16, 16, 1), draw(st.integers(0, 255)), dtype=torch.uint8)
    if "set" in kinds:
        places, features = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        keys["set"] = ObservationKey("set", (places, features), torch.float32, validity="valid")
        keys["valid"] = ObservationKey("validity", (places,), torch.bool)
        obs["valid"] = draw(booleans(ROWS, places))
        points = draw(numbers(ROWS, places, features, grad=False))
        obs["set"] = points.masked_fill(~obs["valid"][..., None], draw(PADDING))
    return keys, obs


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # slower so, no less right
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@searched
@given(drawn=observations())
def test_observation_encoder_and_decoder_hold_for_every_magnitude(
    drawn: tuple[dict[str, ObservationKey], dict[str, Tensor]], autocast: bool
):
    keys, obs = drawn
    torch.manual_seed(0)
    encoder = ObservationEncoder(keys, units=8, layers=1, depth=1)
    parts = {"deter": 2, "stoch_size": encoder.embed_size - 2, "blocks": 2}
    decoder = ObservationDecoder(keys, units=8, layers=1, depth=1, **parts)
    with precision(autocast):
        embedded = encoder(obs)
        losses = decoder.losses(embedded, obs)
    assert embedded.shape == (ROWS, encoder.embed_size) and set(losses) == set(keys)
    assert_finite({"embedded": embedded, **losses}, [*encoder.parameters(), *decoder.parameters()])
    if "set" in keys:
        empty = ~obs["valid"].any(-1)
        # A set comes last of all keys.
        assert (embedded[empty, -8:] == 0).all()


# Rules


@st.composite
def instances(draw: st.DrawFn) -> TSPInstance:
    rows, num_nodes = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    scale = draw(st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
    draws = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return TSPInstance(coords=scale * torch.rand(rows, num_nodes, 2, generator=draws))


@searched
@given(data=st.data(), instance=instances(), own_first=st.booleans())
def test_tsp_play_ends_in_a_permutation(data: st.DataObject, instance: TSPInstance, own_first: bool):
    rows, num_nodes, _ = instance.coords.shape
    first = torch.tensor([data.draw(st.integers(0, num_nodes - 1)) for _ in range(rows)]) if own_first else None
    state, tour = TSPRules.reset(instance, first), []
    longest = TSPRules.longest_leg(instance)
    for step in range(TSPRules.episode_steps(num_nodes)):
        mask = TSPRules.action_mask(state)
        assert mask.any(-1).all() and (TSPRules.remaining_legs(state) == num_nodes - step).all()
        action = OneHotDist(torch.zeros(rows, num_nodes), mask=mask).sample(data.draw(noises(rows)))
        cost = TSPRules.cost(instance, state, action)
        assert ((cost >= 0) & (cost <= longest * (1 + 1e-6))).all()
        state, finished = TSPRules.step(state, action)
        assert finished.all() if step == num_nodes - 1 else not finished.any()
        tour.append(action)
    assert torch.equal(torch.stack(tour, -1).sort(-1).values, torch.arange(num_nodes).expand(rows, -1))
    assert torch.equal(state.current, state.first) and (TSPRules.remaining_legs(state) == 0).all()


@searched
@given(data=st.data(), instance=instances(), steps=st.integers(0, 12))
def test_tsp_states_are_restored_from_what_is_observed(data: st.DataObject, instance: TSPInstance, steps: int):
    """At any step, those past the end included, where the only legal move is to stay."""
    state = TSPRules.reset(instance)
    for _ in range(steps):
        mask = TSPRules.action_mask(state)
        action = OneHotDist(torch.zeros(mask.shape), mask=mask).sample(data.draw(noises(len(mask))))
        state, _ = TSPRules.step(state, action)
    obs = TSPRules.observe(instance, state)
    restored_instance, restored = TSPRules.restore(obs)
    assert torch.equal(restored_instance.coords, instance.coords)
    assert all(torch.equal(*pair) for pair in zip(restored, state, strict=True))
    assert torch.equal(obs["action_mask"], TSPRules.action_mask(restored)) and obs["action_mask"].any(-1).all()
    if steps >= instance.coords.shape[1]:
        assert (obs["action_mask"].sum(-1) == 1).all() and obs["action_mask"][:, 0].all()
