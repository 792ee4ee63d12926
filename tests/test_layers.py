"""The layers that networks are built of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from envs.tasks import ActionSpec
from parts.layers import MLP, BlockCell, BlockLinear, DenseCell, JointCell, embed_actions, initialise
from tests.scenes import assert_gradient_reaches, without_zero_outputs

BATCH, ACTIONS, STOCH, CLASSES = 3, 4, 3, 4


def test_block_linear_equals_block_diagonal_matrix() -> None:
    layer, x = BlockLinear(6, 9, blocks=3), torch.randn(4, 6)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight) + layer.bias)


def test_block_linear_refuses_sizes_that_its_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="6 and 8 must both be multiples of 3"):
        BlockLinear(6, 8, blocks=3)


def test_mlp_gradient_reaches_every_parameter() -> None:
    mlp = MLP(3, 2, units=8, layers=2)
    assert_gradient_reaches(mlp.named_parameters(), mlp(torch.randn(7, 3)).square().sum())


def test_mlp_with_zero_output_starts_at_0_and_learns() -> None:
    mlp = MLP(3, 2, units=8, layers=2, zero_output=True)
    out = mlp(torch.randn(7, 3))
    assert (out == 0).all()
    assert_gradient_reaches(mlp.output.named_parameters(), out.sum())
    without_zero_outputs(mlp)
    assert_gradient_reaches(mlp.named_parameters(), mlp(torch.randn(7, 3)).sum())


def test_block_cell_by_hand() -> None:
    # Without weights the gates are their biases: per block reset, candidate, update.
    cell = BlockCell(8, STOCH * CLASSES, ACTIONS, hidden=6, blocks=2)
    reset, candidate, update = torch.randn(3, 2, 4).unbind(0)
    with torch.no_grad():
        cell.gates.weight.zero_()
        cell.gates.bias.copy_(torch.stack((reset, candidate, update), 1).flatten())
    deter = torch.randn(BATCH, 8)
    share = torch.sigmoid(update.flatten() - 1)
    expected = share * torch.tanh(torch.sigmoid(reset.flatten()) * candidate.flatten()) + (1 - share) * deter
    actual = cell(deter, torch.randn(BATCH, STOCH * CLASSES), torch.randn(BATCH, ACTIONS))
    torch.testing.assert_close(actual, expected)


def test_joint_cell_equals_a_block_cell_whose_matrices_are_its_own() -> None:
    torch.manual_seed(0)
    split = BlockCell(8, STOCH * CLASSES, ACTIONS, hidden=6, blocks=2)
    joint = JointCell(8, STOCH * CLASSES, ACTIONS, hidden=6, blocks=2)
    own, shared = joint.mix.weight.detach().split((4, 18), 1)
    state = {name: value for name, value in joint.state_dict().items() if not name.startswith("mix.")}
    state |= {"mix_deter.weight": own, "mix_inputs.weight": shared.transpose(1, 2).flatten(0, 1)}
    state |= {"mix_deter.bias": joint.mix.bias.detach(), "mix_inputs.bias": torch.zeros(8)}
    split.load_state_dict(state)
    inputs = torch.randn(BATCH, 8), torch.randn(BATCH, STOCH * CLASSES), torch.randn(BATCH, ACTIONS)
    torch.testing.assert_close(joint(*inputs), split(*inputs))


def test_joint_cell_starts_with_one_variance_for_state_and_inputs() -> None:
    torch.manual_seed(0)
    cell = JointCell(512, 128, 4, hidden=64, blocks=8)
    initialise(cell)
    assert cell.mix.weight.shape == (8, 64 + 3 * 64, 64)
    parts = cell.mix.weight.split((64, 3 * 64), 1)
    # All that the matrix reads counts, its zeros included: 512 numbers of the state, and 8 times 192 inputs.
    for part in parts:
        assert float(part.detach().var()) == pytest.approx(1 / (512 + 8 * 192), rel=0.05)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dense_cell_by_hand() -> None:
    cell = DenseCell(2, 1, 1, hidden=1)
    with torch.no_grad():
        cell.inputs.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        # Columns are the hidden unit and both numbers of the state; two rows each are for reset, candidate and update.
        cell.gates.weight.copy_(
            torch.tensor(
                [[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, -1.0, 0.0], [1.0, 1.0, 1.0]]
            )
        )
    actual = cell(torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    # 2 * 1 - 1 * 3 is -1, which the norm keeps but for its epsilon.
    normed = -1 / math.sqrt(1 + 1e-4)
    hidden = normed * sigmoid(normed)
    gates = [hidden - 2.0, 0.5, -3.0, 2 * hidden, -0.5, hidden - 0.5]
    size = math.sqrt(sum(gate**2 for gate in gates) / 6 + 1e-4)
    reset, candidate, update = ([gate / size for gate in gates[k : k + 2]] for k in (0, 2, 4))
    expected = []
    for r, c, u, old in zip(reset, candidate, update, (0.5, -1.0), strict=True):
        share = sigmoid(u - 1)
        expected.append(share * math.tanh(sigmoid(r) * c) + (1 - share) * old)
    torch.testing.assert_close(actual, torch.tensor([expected]))


def test_embed_actions_by_hand() -> None:
    discrete = embed_actions(ActionSpec("discrete", (3,)), torch.tensor([[2, 0]]))
    assert discrete.tolist() == [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    choices = embed_actions(ActionSpec("multi_discrete", (3, 2)), torch.tensor([[1, 0], [2, 1]]))
    assert choices.tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]]
    numbers = embed_actions(ActionSpec("continuous", (4,)), torch.tensor([[-3.0, -0.5, 1.0, 8.0]]))
    assert numbers.tolist() == [[-1.0, -0.5, 1.0, 1.0]]
