"""Half precision: what is computed in it, what is not, and that weights and gradients stay in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parts.layers import MLP, BlockCell
from parts.moves import MoveHead
from parts.precision import halves_kept, rounded, use_half_precision
from parts.sets import SetEncoder
from soft.networks import TwinMLP

HALF = torch.bfloat16


def half_of(module: nn.Module) -> Any:
    half = copy.deepcopy(module)
    use_half_precision(half)
    return half


def relative(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None and b is not None
    return float((a.detach().float() - b.detach()).norm() / b.detach().norm())


def test_half_precision_changes_no_parameter_and_no_name() -> None:
    mlp = MLP(8, 3, units=16, layers=2)
    before = {name: (parameter, parameter.clone()) for name, parameter in mlp.named_parameters()}
    use_half_precision(mlp)
    mlp(torch.randn(4, 8)).float().sum().backward()
    for name, parameter in mlp.named_parameters():
        same, value = before[name]
        assert parameter is same and parameter.dtype == torch.float32 and torch.equal(parameter, value)
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


def test_networks_in_half_precision_agree_with_float32_to_two_digits_gradients_included() -> None:
    torch.manual_seed(0)
    mlp, x = MLP(32, 16, units=64, layers=2), torch.randn(128, 32)
    half = half_of(mlp)
    exact, rough = mlp(x), half(x)
    assert rough.dtype == HALF and 1e-4 < relative(rough, exact) < 1e-2
    exact.square().mean().backward()
    rough.float().square().mean().backward()
    for ours, theirs in zip(half.parameters(), mlp.parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) < 2e-2


def test_the_recurrent_state_stays_in_float32() -> None:
    cell = half_of(BlockCell(32, 16, 4, hidden=16, blocks=4))
    # Its digits beyond those of half precision pass on.
    state = torch.full((1, 32), 1 + 2.0**-12)
    assert cell(state, torch.zeros(1, 16), torch.zeros(1, 4)).dtype == torch.float32
    with torch.no_grad():
        cell.gates.bias.view(4, 3, 8)[:, 2] = -1e4
    assert torch.equal(cell(state, torch.zeros(1, 16), torch.zeros(1, 4)), state)


def test_what_needs_more_digits_is_left_alone() -> None:
    head, points = MoveHead(latent_size=0, units=16, layers=1), torch.rand(7, 2)
    nn.init.normal_(head.output.weight)
    assert torch.equal(half_of(head)(points, points.roll(1, 0), None), head(points, points.roll(1, 0), None))
    # Two nodes that are one in half precision.
    near = torch.tensor([[0.7001, 0.5], [0.7002, 0.5]])
    encoder = half_of(SetEncoder(2, width=16, layers=1, heads=2, hidden=32))
    assert torch.equal(near.to(HALF)[0], near.to(HALF)[1])
    assert not torch.equal(*encoder.embed(near))
    assert half_of(TwinMLP(4, 1, units=16, layers=1))(torch.randn(3, 4)).dtype == torch.float32


@pytest.mark.parametrize("learns", [True, False])
def test_a_weight_is_rounded_once_while_halves_are_kept_and_anew_afterwards(learns: bool) -> None:
    weight = nn.Parameter(torch.tensor([1 / 3, 2 / 3]), requires_grad=learns)
    with halves_kept():
        first, again = rounded(weight, HALF), rounded(weight, HALF)
        assert first.data_ptr() == again.data_ptr() and first.requires_grad == learns
        with torch.no_grad():
            assert not rounded(weight, HALF).requires_grad
    with torch.no_grad():
        weight.mul_(2)
    with halves_kept():
        assert torch.equal(rounded(weight, HALF), weight.to(HALF))
    assert torch.equal(rounded(weight, HALF), weight.to(HALF))


def test_gradients_of_many_uses_of_a_weight_add_up_in_float32() -> None:
    weight, uses = nn.Parameter(torch.ones(1)), 1000
    with halves_kept():
        total = torch.stack([rounded(weight, HALF).float() for _ in range(uses)]).sum()
    total.backward()
    # In half precision the sum would stop at 256.
    assert weight.grad is not None and float(weight.grad) == uses
