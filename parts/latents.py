"""Latents by the classes that were drawn, and the linear layer that gathers its weights for them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from parts.precision import rounded

# Rows and classes from which on gathering gains more than its own operators take.
LEAST_ROWS, LEAST_CLASSES = 1024, 16
# Rows whose gradients are summed at a time: 256 numbers of each stay in a core's cache.
ROWS_AT_A_TIME = 1024


class Chosen(NamedTuple):
    """A latent by the class that each of its variables took, instead of by one-hot vectors; it carries no gradient.

    It is its own feature: who reads it with a `ClassLinear` needs no more.
    """

    deter: Float[Tensor, "B *Q D"]
    classes: Int[Tensor, "B *Q S"]

    def feat(self) -> Chosen:
        """What heads, actor and critic read."""
        return self

    def at(self, steps: slice) -> Chosen:
        """Those at some steps of trajectories [B, Q, H]."""
        return Chosen(self.deter[:, :, steps], self.classes[:, :, steps])

    def detach(self) -> Chosen:
        """Itself, as there is no graph; like a tensor's."""
        return self

    def contiguous(self) -> Chosen:
        """The same, in one piece of memory each; like a tensor's."""
        return Chosen(self.deter.contiguous(), self.classes.contiguous())


# What heads, actor and critic read of latents.
Feat = Float[Tensor, "B *Q F"] | Chosen


def gathering_pays(one_hot: Float[Tensor, "R S K"]) -> bool:
    """Whether layers are faster by gathering weights than by products with such one-hot vectors.

    A GPU waits for operators and not for products, and gathering takes some more of them.
    """
    return one_hot.device.type == "cpu" and len(one_hot) >= LEAST_ROWS and one_hot.shape[-1] >= LEAST_CLASSES


def as_one_hot(classes: Int[Tensor, "B S"], size: int) -> Float[Tensor, "B L"]:
    """One-hot vectors of `size` numbers in all, one after another."""
    rows = classes + _offsets(classes, size)
    return torch.zeros(len(rows), size, device=rows.device).scatter_(-1, rows, 1.0)


class ClassLinear(nn.Linear):
    """A linear layer that also reads classes, for the one-hot vectors that they stand for, after numbers or alone.

    A product with a one-hot vector is a look-up: each class takes one row of the transposed weight.
    """

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(size_in, size_out)
        self.compute = torch.float32

    def forward(self, x: Float[Tensor, "*B I"] | Int[Tensor, "*B S"] | Chosen) -> Float[Tensor, "*B O"]:
        weight, bias = rounded(self.weight, self.compute), rounded(self.bias, self.compute)
        if isinstance(x, Chosen):
            dense, table = weight.split((x.deter.shape[-1], weight.shape[1] - x.deter.shape[-1]), 1)
            return functional.linear(x.deter.to(self.compute), dense, bias) + gathered(table, x.classes)
        if not x.is_floating_point():
            return gathered(weight, x) + bias
        return functional.linear(x.to(self.compute), weight, bias)


def gathered(weight: Float[Tensor, "O L"], classes: Int[Tensor, "*B S"]) -> Float[Tensor, "*B O"]:
    """The product of one-hot vectors with the transposed weight, by their classes."""
    rows = (classes + _offsets(classes, weight.shape[1])).flatten(0, -2)
    return _Gathered.apply(weight, rows).unflatten(0, classes.shape[:-1])


def _offsets(classes: Int[Tensor, "*B S"], size: int) -> Int[Tensor, " S"]:
    """Where the numbers of each variable begin, among `size` numbers in all."""
    return torch.arange(0, size, size // classes.shape[-1], device=classes.device)


class _Gathered(torch.autograd.Function):
    """Sums of the weight's columns that each of R rows [R, S] names."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = weight.shape[1]
        return functional.embedding_bag(rows, weight.t().contiguous(), mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return _summed_by_class(gradient, rows, ctx.size).to(gradient.dtype).t(), None


def _summed_by_class(gradient: Float[Tensor, "R O"], rows: Int[Tensor, "R S"], size: int) -> Float[Tensor, "L O"]:
    """For each of `size` classes the sum of the gradients of all rows that name it, in float32.

    The other way round it is a look-up again: sorted by class, what names one lies side by side.
    """
    pieces = math.ceil(len(rows) / ROWS_AT_A_TIME)
    piece = torch.arange(len(rows), device=rows.device) // ROWS_AT_A_TIME
    names, order = (rows + size * piece[:, None]).flatten().sort()
    begins = torch.searchsorted(names, torch.arange(pieces * size, device=rows.device))
    sums = functional.embedding_bag(order // rows.shape[1], gradient.contiguous(), begins, mode="sum")
    return sums.view(pieces, size, -1).sum(0, dtype=torch.float32)
