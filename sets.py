"""Maths over sets with a validity mask, exact for rows that have no valid member."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional


def masked_mean(values: Float[Tensor, "B N E"], mask: Bool[Tensor, "B *Q N"]) -> Float[Tensor, "B *Q E"]:
    """Mean over the members that are True in `mask`, for any number of masks of each set; zero where there is none."""
    weight = mask.to(values.dtype).flatten(1, -2) if mask.ndim > 2 else mask.to(values.dtype)[:, None]
    total = torch.bmm(weight, values)
    mean = total / weight.sum(-1, keepdim=True).clamp(min=1)
    return mean.view(*mask.shape[:-1], values.shape[-1])


class SetNorm(nn.Module):
    """Normalises each feature over the members of its own set (instance normalisation), then scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, device="cpu"))
        self.shift = nn.Parameter(torch.zeros(width, device="cpu"))

    def forward(
        self, members: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        # Plain means: torch.var_mean over a middle dimension is ten times slower on a CPU.
        if valid is None:
            centred = members - members.mean(1, keepdim=True)
            variance = (centred * centred).mean(1, keepdim=True)
        else:
            weight = valid[..., None].to(members.dtype)
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
            centred = members - (members * weight).sum(1, keepdim=True)
            variance = (centred * centred * weight).sum(1, keepdim=True)
        return centred * (self.scale * torch.rsqrt(variance + 1e-5)) + self.shift


class SetLayer(nn.Module):
    """Attention among the members of a set, then a hidden layer for each; both residual and normalised over the set.

    Normalising over the set rather than over features is what routing encoders learn fastest with (Kwon et al. 2020).
    """

    def __init__(self, width: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a set encoder's width must be a multiple of its heads, got width {width}, heads {heads}")
        self.heads = heads
        # No biases before a norm over the set, which would take them out again.
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.attention_norm = SetNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.hidden_out = nn.Linear(hidden, width, bias=False)
        self.hidden_norm = SetNorm(width)

    def forward(
        self, members: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        projected = self.query_key_value(members).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if valid is not None:
            # A set without members attends to its padding, which nobody reads: attention to nothing would be NaN.
            mask = (valid | ~valid.any(-1, keepdim=True))[:, None, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        members = self.attention_norm(members + self.attention_out(attended.transpose(1, 2).flatten(-2)), valid)
        return self.hidden_norm(members + self.hidden_out(functional.relu(self.hidden(members))), valid)


class SetEncoder(nn.Module):
    """Attention over a set: each member's embedding knows of all the others, in no order.

    With `valid`, members where it is False are padding: what stands there changes nothing elsewhere, and comes out 0.
    """

    def __init__(self, features: int, *, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList(SetLayer(width, heads=heads, hidden=hidden) for _ in range(layers))

    def forward(
        self, members: Float[Tensor, "B N F"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        if valid is not None:
            # Filled rather than multiplied by 0, which would let a NaN in the padding pass.
            members = members.masked_fill(~valid[..., None], 0.0)
        embedded = self.embed(members)
        for layer in self.layers:
            embedded = layer(embedded, valid)
        return embedded if valid is None else embedded.masked_fill(~valid[..., None], 0.0)
