"""Queries of one set attend to the members of another: in no order, and exactly nothing where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from config import UserError
from parts.sets import CrossAttention

WIDTH, HEADS, PLACES = 8, 2, 6
PADDING = pytest.mark.parametrize("padding", [0.0, -3e38, math.nan, math.inf])


def scene(sizes: list[int], *, padding: float = 0.0) -> tuple[CrossAttention, Tensor, Tensor, Tensor]:
    """An attention, four queries for each size, and as many members in scattered places."""
    torch.manual_seed(0)
    attention = CrossAttention(WIDTH, heads=HEADS)
    queries, members = torch.randn(len(sizes), 4, WIDTH), torch.randn(len(sizes), PLACES, WIDTH)
    valid = torch.rand(len(sizes), PLACES).argsort(-1) < torch.tensor(sizes)[:, None]
    return attention, queries, members.masked_fill(~valid[..., None], padding), valid


def test_cross_attention_by_hand() -> None:
    attention, queries, members, valid = scene([3])
    query = queries[0] @ attention.query.weight.T
    key, value = (members[0, valid[0]] @ attention.key_value.weight.T).split(WIDTH, -1)
    size, gathered = WIDTH // HEADS, torch.zeros(4, WIDTH)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(4):
            weights = torch.softmax(key[:, part] @ query[i, part] / math.sqrt(size), 0)
            gathered[i, part] = weights @ value[:, part]
    torch.testing.assert_close(attention(queries, members, valid)[0], gathered @ attention.out.weight.T)


def test_cross_attention_takes_any_number_of_leading_axes_in_one_order() -> None:
    attention, queries, members, valid = scene([3, 0, 6, 1, 2, 5])
    table = attention(*(each.view(2, 3, *each.shape[1:]) for each in (queries, members, valid)))
    assert torch.equal(table.flatten(0, 1), attention(queries, members, valid))


def test_cross_attention_does_not_depend_on_the_order_of_members_and_follows_that_of_queries() -> None:
    attention, queries, members, valid = scene([4, 2])
    expected, order, turned = attention(queries, members, valid), torch.randperm(PLACES), torch.randperm(4)
    torch.testing.assert_close(attention(queries, members[:, order], valid[:, order]), expected)
    torch.testing.assert_close(attention(queries[:, turned], members, valid), expected[:, turned])
    assert not torch.allclose(expected[:, turned], expected)


@PADDING
def test_cross_attention_gathers_exactly_nothing_where_there_is_no_member(padding: float) -> None:
    attention, queries, members, valid = scene([4, 0], padding=padding)
    inputs = (queries.requires_grad_(), members.requires_grad_(), *attention.parameters())
    gathered = attention(queries, members, valid)
    assert (gathered[1] == 0).all() and gathered[0].all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(gathered[1].sum(), inputs, retain_graph=True))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(gathered.square().sum(), inputs))


@PADDING
def test_cross_attention_takes_nothing_from_padding_and_gives_it_no_gradient(padding: float) -> None:
    attention, queries, members, valid = scene([3, 1], padding=padding)
    plain = members.masked_fill(~valid[..., None], 0.0)
    assert torch.equal(attention(queries, members, valid), attention(queries, plain, valid))
    members.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(queries, members, valid).square().sum(), members)
    assert (gradient[~valid] == 0).all() and gradient[valid].all()


def test_cross_attention_keeps_rows_apart() -> None:
    attention, queries, members, valid = scene([3, 0, 2])
    members[1], other = 1.0, valid.clone()
    other[1] = True
    changed = (attention(queries, members, valid) != attention(queries, members, other)).flatten(1).any(-1)
    assert changed.tolist() == [False, True, False]


def test_cross_attention_without_a_mask_is_that_of_members_alone() -> None:
    attention, queries, members, valid = scene([PLACES])
    torch.testing.assert_close(attention(queries, members), attention(queries, members, valid))


def test_cross_attention_refuses_heads_that_do_not_divide_its_width() -> None:
    with pytest.raises(UserError, match="multiple of its heads, got width 8, heads 3"):
        CrossAttention(8, heads=3)
