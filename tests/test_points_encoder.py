"""Sets as one vector: nothing comes of nothing, and nothing comes of padding."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import Tensor

from parts.sets import PointsEncoder, SetEncoder, SetLayer, masked_max

FEATURES, WIDTH, PLACES = 3, 8, 6
PADDING = pytest.mark.parametrize("padding", [0.0, -3e38, math.nan, math.inf])


def make_encoder(layers: int = 2) -> PointsEncoder:
    torch.manual_seed(0)
    return PointsEncoder(FEATURES, width=WIDTH, layers=layers, heads=2, hidden=16)


def points_and_valid(sizes: list[int], *, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """One set of each size, its points in scattered places and `padding` between them."""
    draws = torch.Generator().manual_seed(1)
    points = torch.randn(len(sizes), PLACES, FEATURES, generator=draws)
    valid = torch.rand(len(sizes), PLACES, generator=draws).argsort(-1) < torch.tensor(sizes)[:, None]
    return points.masked_fill(~valid[..., None], padding), valid


def gradients_of(embedded: Tensor, points: Tensor, encode: PointsEncoder) -> list[Tensor]:
    weight = torch.linspace(-1, 2, embedded.numel()).view_as(embedded)
    return list(torch.autograd.grad((embedded * weight).sum(), [points, *encode.parameters()], retain_graph=True))


# The maximum


def test_masked_max_by_hand():
    values = torch.tensor([[[-5.0, 1.0], [-2.0, 0.0], [9.0, 9.0]], [[-1.0, -3.0], [-4.0, -2.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert masked_max(values, mask).tolist() == [[-2.0, 1.0], [-1.0, -2.0]]


@pytest.mark.parametrize("padding", [-1.0, 3e38, math.nan, math.inf, -math.inf])
def test_masked_max_of_an_empty_row_is_0_with_gradient_0(padding: float):
    values = torch.full((2, 3, 2), padding)
    values[1, 0] = -7.0
    values.requires_grad_()
    largest = masked_max(values, torch.tensor([[False] * 3, [True, False, False]]))
    assert largest.tolist() == [[0.0, 0.0], [-7.0, -7.0]]
    (gradient,) = torch.autograd.grad(largest.sum(), values)
    assert gradient.tolist() == [[[0, 0]] * 3, [[1, 1], [0, 0], [0, 0]]]


# Empty sets


@PADDING
def test_points_encoder_gives_exactly_nothing_for_a_set_without_points(padding: float):
    encode, (points, valid) = make_encoder(), points_and_valid([4, 0, 1], padding=padding)
    embedded = encode(points.requires_grad_(), valid)
    assert (embedded[1] == 0).all() and embedded[[0, 2]].all()
    assert all((gradient == 0).all() for gradient in gradients_of(embedded[1], points, encode))
    assert all(gradient.isfinite().all() for gradient in gradients_of(embedded, points, encode))


@PADDING
def test_points_encoder_gives_exactly_nothing_for_a_batch_without_points(padding: float):
    encode, (points, valid) = make_encoder(), points_and_valid([0, 0], padding=padding)
    embedded = encode(points.requires_grad_(), valid)
    assert (embedded == 0).all()
    assert all((gradient == 0).all() for gradient in gradients_of(embedded, points, encode))


def test_points_encoder_takes_a_batch_of_no_sets():
    empty = torch.zeros(0, PLACES)
    assert make_encoder()(torch.zeros(0, PLACES, FEATURES), empty.bool()).shape == (0, WIDTH)


@PADDING
def test_points_encoder_knows_a_lone_point(padding: float):
    encode, (points, valid) = make_encoder(), points_and_valid([1], padding=padding)
    embedded, other = encode(points.requires_grad_(), valid), encode(points.detach() + 1, valid)
    assert (embedded - other).norm() > 0.01
    gradient = gradients_of(embedded, points, encode)[0]
    assert gradient[valid].all() and (gradient[~valid] == 0).all()


@pytest.mark.parametrize("sizes", [[0], [1], [0, 1, 4]])
def test_set_encoder_does_not_blow_up_what_has_no_spread(sizes: list[int]):
    """Each norm divides by a spread; padding and sets of one have none, and would grow 300-fold at each."""
    torch.manual_seed(0)
    encode = SetEncoder(FEATURES, width=WIDTH, layers=8, heads=2, hidden=16)
    points, valid = points_and_valid(sizes)
    encoded = encode(points.requires_grad_(), valid)
    gradients = torch.autograd.grad(encoded.square().sum(), [points, *encode.parameters()])
    assert encoded.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][~valid] == 0).all()


def test_set_encoder_gathers_exactly_nothing_where_there_is_nothing_to_attend_to():
    encode, (points, valid) = make_encoder(), points_and_valid([0, 3], padding=math.nan)
    gathered: list[Tensor] = []
    for layer in encode.attention.layers:
        assert isinstance(layer, SetLayer)
        layer.attention_out.register_forward_pre_hook(lambda _, inputs: gathered.append(inputs[0]))
    embedded = encode(points, valid)
    for attended in gathered:
        assert (attended[0] == 0).all() and attended[1].any()
        (gradient,) = torch.autograd.grad(embedded.sum(), attended, retain_graph=True)
        assert (gradient[0] == 0).all() and gradient[1].any()


# Padding


@PADDING
def test_points_encoder_takes_nothing_from_the_padding(padding: float):
    encode, sizes = make_encoder(), [6, 3, 1, 0, 2]
    clean, valid = points_and_valid(sizes, padding=1.0)
    dirty, _ = points_and_valid(sizes, padding=padding)
    embedded = [encode(points.requires_grad_(), valid) for points in (clean, dirty)]
    assert torch.equal(*embedded)
    pairs = zip(gradients_of(embedded[0], clean, encode), gradients_of(embedded[1], dirty, encode), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_points_encoder_equals_the_encoder_on_the_set_without_its_padding():
    encode, (points, valid) = make_encoder(), points_and_valid([6, 3, 1, 2], padding=math.nan)
    embedded = encode(points, valid)
    for row, present in enumerate(valid):
        torch.testing.assert_close(embedded[row], encode(points[row, present]), rtol=1e-4, atol=1e-5)


def test_points_encoder_without_padding_is_the_same_with_and_without_a_mask():
    encode, (points, valid) = make_encoder(), points_and_valid([PLACES] * 4)
    assert valid.all()
    torch.testing.assert_close(encode(points, valid), encode(points))


@pytest.mark.parametrize("row", [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [0, 1, PLACES])
def test_points_encoder_keeps_a_changed_mask_to_its_own_set(row: tuple[int, int], size: int):
    encode, (points, valid) = make_encoder(), points_and_valid([4, 2, 3] * 3)
    points, valid = torch.randn(3, 3, PLACES, FEATURES).requires_grad_(), valid.view(3, 3, PLACES)
    changed = valid.clone()
    changed[row] = torch.arange(PLACES) < size
    others = torch.ones(3, 3, dtype=torch.bool)
    others[row] = False
    embedded = [encode(points, mask) for mask in (valid, changed)]
    gradients = [gradients_of(each, points, encode)[0] for each in embedded]
    for before, after in (embedded, gradients):
        assert torch.equal(before[others], after[others]) and not torch.equal(before[row], after[row])


def test_points_encoder_does_not_care_for_the_order_of_points():
    encode, (points, valid) = make_encoder(), points_and_valid([6, 3, 1, 0])
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    torch.testing.assert_close(encode(points[:, order], valid[:, order]), encode(points, valid))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_points_encoder_takes_any_leading_dimensions(lead: tuple[int, ...]):
    encode, points = make_encoder(), torch.randn(*lead, PLACES, FEATURES)
    valid = torch.rand(*lead, PLACES) < 0.5
    embedded = encode(points, valid)
    assert embedded.shape == (*lead, WIDTH)
    flat = encode(points.reshape(-1, PLACES, FEATURES), valid.reshape(-1, PLACES))
    torch.testing.assert_close(embedded.reshape(-1, WIDTH), flat)


@PADDING
def test_points_encoder_holds_in_half_precision(padding: float):
    encode, (points, valid) = make_encoder(), points_and_valid([6, 3, 1, 0], padding=padding)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = encode(points.requires_grad_(), valid)
    assert embedded.dtype == torch.bfloat16 and (embedded[3] == 0).all() and embedded.isfinite().all()
    gradients = gradients_of(embedded, points, encode)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][~valid] == 0).all()


# Compilation


@pytest.fixture
def without_shape_checks():
    """Their wrappers are no part of what is compiled."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
def test_points_encoder_is_traced_as_one_graph_for_every_mask():
    encode, (points, valid) = make_encoder(), points_and_valid([6, 3, 1, 0], padding=math.nan)
    traced = torch.export.export(encode, (points, valid)).module()
    for mask in (valid, torch.zeros_like(valid), valid.flip(0)):
        torch.testing.assert_close(traced(points, mask), encode(points, mask), equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # from torch's own compiler
@pytest.mark.usefixtures("without_shape_checks")
def test_points_encoder_compiles_without_a_break():
    encode, (points, valid) = make_encoder(), points_and_valid([6, 3, 1, 0], padding=math.nan)
    compiled = torch.compile(encode, fullgraph=True)
    for mask in (valid, torch.zeros_like(valid)):
        torch.testing.assert_close(compiled(points, mask), encode(points, mask))
    assert (compiled(points, torch.zeros_like(valid)) == 0).all()
