from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parts.sets import SetEncoder, SetLayer, SetNorm, masked_mean

WIDTH, HEADS = 8, 2


def encoder() -> SetEncoder:
    return SetEncoder(3, width=WIDTH, layers=2, heads=HEADS, hidden=16)


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]]])
    mask = torch.tensor([[[True, False, True], [True, True, True], [False, True, False]]])
    assert masked_mean(values, mask).tolist() == [[[3.5, 35.0], [3.0, 30.0], [2.0, 20.0]]]


def test_masked_mean_takes_any_number_of_masks() -> None:
    values, mask = torch.randn(4, 5, 3), torch.rand(4, 2, 3, 5) < 0.7
    mean = masked_mean(values, mask)
    assert mean.shape == (4, 2, 3, 3)
    torch.testing.assert_close(mean[:, 1, 2], masked_mean(values, mask[:, 1, 2]))


def test_masked_mean_of_an_empty_row_is_0_with_gradient_0() -> None:
    values = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True, False, False, True]])
    mean = masked_mean(values, mask)
    assert (mean[0] == 0).all()
    (gradient,) = torch.autograd.grad(mean.sum(), values)
    assert (gradient[0] == 0).all()
    assert gradient[1, :, 0].tolist() == [0.5, 0.0, 0.0, 0.5]


def test_masked_mean_ignores_members_outside_the_mask() -> None:
    values, mask = torch.randn(3, 6, 2), torch.arange(6).expand(3, 6) < 4
    other = values.clone()
    other[:, 4:] = 1e6
    assert torch.equal(masked_mean(values, mask), masked_mean(other, mask))


def test_set_norm_by_hand() -> None:
    norm = SetNorm(2)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([1.0, 3.0]))
        norm.shift.copy_(torch.tensor([0.0, 5.0]))
    members = torch.tensor([[[1.0, 0.0], [3.0, 40.0]], [[-7.0, 2.0], [7.0, 0.0]]])
    expected = torch.tensor([[[-1.0, 2.0], [1.0, 8.0]], [[-1.0, 8.0], [1.0, 2.0]]])
    torch.testing.assert_close(norm(members), expected, rtol=0, atol=1e-4)


def test_set_norm_of_equal_members_is_its_shift() -> None:
    norm = SetNorm(WIDTH)
    torch.nn.init.normal_(norm.shift)
    members = torch.full((2, 4, WIDTH), 0.5, requires_grad=True)
    normed = norm(members)
    torch.testing.assert_close(normed, norm.shift.expand_as(normed))
    (gradient,) = torch.autograd.grad(normed.square().sum(), members)
    assert gradient.isfinite().all()


def test_set_layer_equals_plain_attention() -> None:
    layer = SetLayer(WIDTH, heads=HEADS, hidden=16)
    members = torch.randn(5, WIDTH)
    size = WIDTH // HEADS
    query, key, value = (members @ layer.query_key_value.weight.T).split(WIDTH, -1)
    attended = torch.zeros(5, WIDTH)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(5):
            scores = torch.stack([query[i, part] @ key[j, part] for j in range(5)]) / math.sqrt(size)
            attended[i, part] = torch.softmax(scores, 0) @ value[:, part]

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    hidden = normed(members + attended @ layer.attention_out.weight.T)
    expected = normed(hidden + layer.hidden_out(torch.relu(layer.hidden(hidden))))
    torch.testing.assert_close(layer(members[None])[0], expected)


def test_set_encoder_is_permutation_equivariant() -> None:
    encode, members, order = encoder(), torch.randn(4, 7, 3), torch.randperm(7)
    torch.testing.assert_close(encode(members[:, order]), encode(members)[:, order])
    assert not torch.allclose(encode(members)[:, order], encode(members))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_set_encoder_keeps_sets_apart(mode: str) -> None:
    encode, members = encoder(), torch.randn(4, 7, 3)
    encode.train(mode == "train")
    other = members.clone()
    other[2] = torch.randn(7, 3)
    changed = (encode(members) != encode(other)).flatten(1).any(-1)
    assert changed.tolist() == [False, False, True, False]


def test_set_encoder_lets_each_member_know_of_the_others() -> None:
    encode, members = encoder(), torch.randn(1, 7, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(encode(members)[0, 0].square().sum(), members)
    assert (gradient.abs().sum(-1) > 0).all()


def test_set_layer_refuses_heads_that_do_not_divide_its_width() -> None:
    with pytest.raises(ValueError, match="multiple of its heads, got width 8, heads 3"):
        SetLayer(8, heads=3, hidden=16)


# Padding

SIZES = [7, 3, 1, 5]


def padded(padding: float) -> tuple[Tensor, Tensor]:
    """Four sets of SIZES members among 7 places, the members in scattered places."""
    members = torch.randn(4, 7, 3)
    order = torch.stack([torch.randperm(7) for _ in SIZES])
    valid = order < torch.tensor(SIZES)[:, None]
    return members.masked_fill(~valid[..., None], padding), valid


@pytest.mark.parametrize("padding", [0.0, 1e6, math.nan, math.inf])
def test_set_encoder_equals_the_encoder_on_the_set_without_its_padding(padding: float) -> None:
    encode, (members, valid) = encoder(), padded(padding)
    encoded = encode(members, valid)
    for row, present in enumerate(valid):
        expected = encode(members[row, present][None])[0]
        torch.testing.assert_close(encoded[row, present], expected, rtol=1e-4, atol=1e-5)
    assert (encoded[~valid] == 0).all()


def test_set_encoder_takes_nothing_from_the_padding() -> None:
    encode, (members, valid) = encoder(), padded(0.0)
    other = members.masked_fill(~valid[..., None], math.nan)
    assert torch.equal(encode(members, valid), encode(other, valid))


def test_set_encoder_gives_the_padding_no_gradient() -> None:
    encode, (members, valid) = encoder(), padded(math.nan)
    members.requires_grad_()
    (gradient,) = torch.autograd.grad(encode(members, valid).square().sum(), members)
    assert (gradient[~valid] == 0).all()
    assert gradient.isfinite().all()
    # A set of one is normalised to nothing but the shift, whatever its member is.
    assert (gradient[valid & (valid.sum(-1, keepdim=True) > 1)].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_set_encoder_of_an_empty_set_is_0_with_finite_gradients(padding: float) -> None:
    encode, members = encoder(), torch.randn(2, 4, 3)
    members[0] = padding
    valid = torch.tensor([[False] * 4, [True, False, True, True]])
    encoded = encode(members, valid)
    assert (encoded[0] == 0).all() and (encoded[1, valid[1]] != 0).any()
    gradients = torch.autograd.grad(encoded.square().sum() + encoded.sum(), list(encode.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    alone = encode(members[1:], valid[1:])
    expected = torch.autograd.grad(alone.square().sum() + alone.sum(), list(encode.parameters()))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_set_encoder_without_padding_is_the_same_with_and_without_a_mask() -> None:
    encode, members = encoder(), torch.randn(4, 7, 3)
    torch.testing.assert_close(encode(members, torch.ones(4, 7, dtype=torch.bool)), encode(members))


def test_set_norm_takes_its_statistics_from_valid_members_only() -> None:
    norm = SetNorm(3)
    torch.nn.init.normal_(norm.scale)
    torch.nn.init.normal_(norm.shift)
    members, valid = padded(1e3)
    normed = norm(members, valid)
    for row, present in enumerate(valid):
        expected = norm(members[row, present][None])[0]
        torch.testing.assert_close(normed[row, present], expected, rtol=1e-4, atol=1e-4)


def test_set_norm_of_an_empty_set_is_finite_with_finite_gradients() -> None:
    norm, members = SetNorm(3), torch.randn(2, 4, 3, requires_grad=True)
    normed = norm(members, torch.zeros(2, 4, dtype=torch.bool))
    assert normed.isfinite().all()
    gradients = torch.autograd.grad(normed.square().sum(), [members, *norm.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
