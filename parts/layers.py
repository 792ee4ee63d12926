"""The layers that networks are built of: normed and block-diagonal ones, MLPs, recurrent cells, and how they start."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from config import UserError
from envs.tasks import ActionSpec
from parts.latents import Chosen, ClassLinear, as_one_hot
from parts.precision import ExactLinear, rounded


class Normed(nn.Module):
    """A linear layer, RMSNorm and SiLU.

    Without the bias the norm would hide how large a small input is: a torque of 0.5 would look like one of 1.
    An `exact` one is never of half precision.
    """

    def __init__(self, size_in: int, size_out: int, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.linear = ClassLinear(size_in, size_out)
        self.norm = nn.RMSNorm(size_out, eps=1e-4)

    def forward(self, x: Float[Tensor, "*B I"] | Int[Tensor, "*B S"] | Chosen) -> Float[Tensor, "*B O"]:
        return functional.silu(self.norm(self.linear(x)))


class BlockLinear(nn.Module):
    """A linear layer whose matrix is block-diagonal: block i of the output sees block i of the input only."""

    def __init__(self, size_in: int, size_out: int, *, blocks: int) -> None:
        super().__init__()
        if size_in % blocks or size_out % blocks:
            raise UserError(f"sizes {size_in} and {size_out} must both be multiples of {blocks} blocks")
        self.blocks, self.compute = blocks, torch.float32
        bound = math.sqrt(blocks / size_in)
        self.weight = nn.Parameter(
            torch.empty(blocks, size_in // blocks, size_out // blocks, device=torch.get_default_device())
        )
        self.bias = nn.Parameter(torch.zeros(size_out, device=torch.get_default_device()))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        blocked = x.to(self.compute).view(x.shape[0], self.blocks, -1).transpose(0, 1)
        product = torch.bmm(blocked, rounded(self.weight, self.compute))
        return product.transpose(0, 1).flatten(1) + rounded(self.bias, self.compute)


class MLP(nn.Module):
    """Hidden layers of linear, RMSNorm and SiLU, then a linear output, which may start at zero.

    `output_scale` is what `initialise` multiplies the output's weights by. An `exact_output` is never of half
    precision.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        units: int,
        layers: int,
        zero_output: bool = False,
        output_scale: float = 1.0,
        exact_output: bool = False,
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        sizes = [size_in] + [units] * layers
        self.hidden = nn.Sequential(*(Normed(a, b) for a, b in itertools.pairwise(sizes)))
        self.output = (ExactLinear if exact_output else nn.Linear)(sizes[-1], size_out)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: Float[Tensor, "*B I"] | Chosen) -> Float[Tensor, "*B O"]:
        return self.output(self.hidden(x))


def embed_actions(actions: ActionSpec, action: Tensor) -> Float[Tensor, "*B A"]:
    """What a world model sees of actions [*B, *shape]: one-hot vectors, or numbers squashed into [-1, 1]."""
    if actions.kind == "continuous":
        return action / action.abs().clamp(min=1.0)
    if actions.kind == "multi_discrete":
        parts = zip(action.unbind(-1), actions.sizes, strict=True)
        return torch.cat([functional.one_hot(part, size) for part, size in parts], -1).float()
    return functional.one_hot(action, actions.sizes[0]).float()


class BlockCell(nn.Module):
    """A GRU whose matrices are block-diagonal, as DreamerV3's; its first layer is in two parts.

    Every block sees all inputs, and its own part of the state. Inputs and state have a matrix each, with an initial
    variance and a limit of gradients of its own. `stoch` comes as one-hot vectors or as their classes.
    """

    def __init__(self, deter: int, stoch_size: int, action_size: int, *, hidden: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.from_deter = Normed(deter, hidden)
        self.from_stoch = Normed(stoch_size, hidden)
        self.from_action = Normed(action_size, hidden)
        self._make_mix(3 * hidden, deter)
        self.mix_norm = nn.RMSNorm(deter, eps=1e-4)
        self.gates = BlockLinear(deter, 3 * deter, blocks=blocks)

    def _make_mix(self, inputs: int, deter: int) -> None:
        self.mix_inputs = nn.Linear(inputs, deter)
        self.mix_deter = BlockLinear(deter, deter, blocks=self.blocks)

    def _mix(self, inputs: Float[Tensor, "B I"], deter: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return self.mix_inputs(inputs) + self.mix_deter(deter)

    def forward(
        self,
        deter: Float[Tensor, "B D"],
        stoch: Float[Tensor, "B L"] | Int[Tensor, "B S"],
        action: Float[Tensor, "B A"],
    ) -> Float[Tensor, "B D"]:
        inputs = torch.cat((self.from_deter(deter), self.from_stoch(stoch), self.from_action(action)), -1)
        mixed = functional.silu(self.mix_norm(self._mix(inputs, deter)))
        gates = self.gates(mixed).view(deter.shape[0], self.blocks, 3, -1)
        reset, candidate, update = (part.flatten(1) for part in gates.unbind(2))
        return gated(deter, reset, candidate, update)


class JointCell(BlockCell):
    """The recurrent cell of DreamerV3 (Nature 2025): its first layer has one matrix for inputs and state together."""

    def _make_mix(self, inputs: int, deter: int) -> None:
        self.mix = BlockLinear(deter + self.blocks * inputs, deter, blocks=self.blocks)

    def _mix(self, inputs: Float[Tensor, "B I"], deter: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        own = deter.to(inputs.dtype).unflatten(-1, (self.blocks, -1))
        shared = inputs[:, None].expand(-1, self.blocks, -1)
        return self.mix(torch.cat((own, shared), -1).flatten(1))


class DenseCell(nn.Module):
    """The recurrent cell of DreamerV3 as of 2023: an input layer, then a GRU with one norm over all its gates.

    `stoch` comes as one-hot vectors or as their classes.
    """

    def __init__(self, deter: int, stoch_size: int, action_size: int, *, hidden: int) -> None:
        super().__init__()
        self.stoch_size = stoch_size
        self.inputs = Normed(stoch_size + action_size, hidden)
        self.gates = nn.Linear(hidden + deter, 3 * deter, bias=False)
        self.norm = nn.RMSNorm(3 * deter, eps=1e-4)

    def forward(
        self,
        deter: Float[Tensor, "B D"],
        stoch: Float[Tensor, "B L"] | Int[Tensor, "B S"],
        action: Float[Tensor, "B A"],
    ) -> Float[Tensor, "B D"]:
        if not stoch.is_floating_point():
            stoch = as_one_hot(stoch, self.stoch_size)
        inputs = self.inputs(torch.cat((stoch, action), -1))
        reset, candidate, update = self.norm(self.gates(torch.cat((inputs, deter), -1))).chunk(3, -1)
        return gated(deter, reset, candidate, update)


def gated(
    deter: Float[Tensor, "B D"],
    reset: Float[Tensor, "B D"],
    candidate: Float[Tensor, "B D"],
    update: Float[Tensor, "B D"],
) -> Float[Tensor, "B D"]:
    """The GRU's next state, in float32; its update gate is biased towards keeping the old one."""
    # A state that changes little in each step would not change at all in half precision.
    reset, candidate, update = reset.float(), candidate.float(), update.float()
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter


def use_layer_norm(module: nn.Module) -> None:
    """Replace every RMSNorm below `module` by a LayerNorm of the same size, as DreamerV3 had it in 2023."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RMSNorm):
                norm = nn.LayerNorm(list(child.normalized_shape), eps=1e-3, device=child.weight.device)
                setattr(parent, name, norm)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Draw the weights of all linear and convolutional layers below `module` as DreamerV3's published code does.

    A normal distribution of variance 1 / fan_in, truncated at two standard deviations of the one it is cut from, and
    zero biases. A layer whose weights are all zero keeps them; an `MLP` scales those of its output.
    The published code counts all blocks of a block-diagonal layer into its fan_in, though each output sees but one.
    """
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, BlockLinear)):
            continue
        weight = layer.weight
        # A device without memory has no numbers to read or to draw.
        if not weight.is_meta and weight.any():
            fan_in = weight.shape[:2].numel() if isinstance(layer, BlockLinear) else weight[0].numel()
            # Cutting leaves 1 / 1.1368 of the standard deviation.
            std = 1.1368 * math.sqrt(1 / fan_in)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for mlp in module.modules():
        if isinstance(mlp, MLP):
            mlp.output.weight.mul_(mlp.output_scale)
