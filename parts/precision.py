"""Half precision: dense layers, attention and norms compute in bfloat16, from weights that stay in float32.

Gradients of weights are added up in float32, and so are optimiser, distributions, losses and statistics kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Weights, by their identity, with what they are in half precision; None outside of `halves_kept`.
_halves: dict[int, tuple[Tensor, Tensor]] | None = None


@contextmanager
def halves_kept() -> Iterator[None]:
    """Within, each weight is rounded once however often it is used; none of them may change meanwhile."""
    global _halves
    if _halves is not None:
        yield
        return
    _halves = {}
    try:
        yield
    finally:
        _halves = None


class _Rounded(torch.autograd.Function):
    """A weight in half precision, made before; each use hands its gradient back in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, half: list[Tensor]) -> Tensor:
        return half[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.float(), None


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in the type to compute in."""
    if weight.dtype == dtype:
        return weight
    # A compiler sees by itself what has been computed before.
    if _halves is None or torch.compiler.is_compiling():
        return weight.to(dtype)
    if id(weight) not in _halves:
        # The weight is held, too: another tensor could get its identity.
        _halves[id(weight)] = weight, weight.detach().to(dtype)
    half = _halves[id(weight)][1]
    return _Rounded.apply(weight, [half]) if weight.requires_grad and torch.is_grad_enabled() else half


class HalfLinear(nn.Linear):
    """A linear layer whose product is of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else rounded(self.bias, torch.bfloat16)
        return functional.linear(x.to(torch.bfloat16), rounded(self.weight, torch.bfloat16), bias)


class ExactLinear(nn.Linear):
    """A linear layer of float32 whatever computes in half precision around it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight, self.bias)


class HalfConv2d(nn.Conv2d):
    """A convolution of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else rounded(self.bias, torch.bfloat16)
        return self._conv_forward(x.to(torch.bfloat16), rounded(self.weight, torch.bfloat16), bias)


class HalfRMSNorm(nn.RMSNorm):
    """RMSNorm of numbers in half precision; the mean square itself is summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, rounded(self.weight, x.dtype), self.eps)


class HalfLayerNorm(nn.LayerNorm):
    """LayerNorm of numbers in half precision; mean and variance are summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = rounded(self.weight, x.dtype), rounded(self.bias, x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


HALVES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: HalfLinear,
    nn.Conv2d: HalfConv2d,
    nn.RMSNorm: HalfRMSNorm,
    nn.LayerNorm: HalfLayerNorm,
}


def use_half_precision(module: nn.Module) -> None:
    """Let all layers below `module` compute in bfloat16. Parameters, their names and their values stay as they are.

    A layer of this project says by its attribute `compute` in which type it computes, and a module whose outputs need
    more than three digits opts out with all that is below it by an attribute `exact`.
    """
    if getattr(module, "exact", False):
        return
    if type(module) in HALVES:
        # Its class is all that differs, so whoever holds the layer or its parameters holds the right ones.
        module.__class__ = HALVES[type(module)]
    elif hasattr(module, "compute"):
        module.compute = torch.bfloat16  # type: ignore[assignment]
    for child in module.children():
        use_half_precision(child)
