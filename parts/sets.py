"""Maths over sets with a validity mask, exact for rows that have no valid member."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from config import UserError
from parts.precision import ExactLinear


def scrub(members: Float[Tensor, "*B N E"], valid: Bool[Tensor, "*B N"] | None) -> Float[Tensor, "*B N E"]:
    """0 with gradient 0 for members that are padding, whatever stands there; without `valid` there is no padding."""
    # The padding is filled, since a product with 0 would let a NaN pass.
    return members if valid is None else members.masked_fill(~valid[..., None], 0.0)


def masked_max(values: Float[Tensor, "B N E"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
    """The largest of each feature among the members that are True in `mask`; zero where there is none."""
    largest = values.masked_fill(~mask[..., None], -math.inf).amax(1)
    return largest.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def masked_mean(values: Float[Tensor, "B N E"], mask: Bool[Tensor, "B *Q N"]) -> Float[Tensor, "B *Q E"]:
    """Mean over the members that are True in `mask`, for any number of masks of each set; zero where there is none."""
    weight = mask.to(values.dtype).flatten(1, -2) if mask.ndim > 2 else mask.to(values.dtype)[:, None]
    total = torch.bmm(weight, values)
    mean = total / weight.sum(-1, keepdim=True).clamp(min=1)
    return mean.view(*mask.shape[:-1], values.shape[-1])


def masked_share(values: Bool[Tensor, "B *Q N"], valid: Bool[Tensor, "B N"] | None) -> Float[Tensor, "B *Q"]:
    """The share of each set's members that are True; those that are not `valid` count neither way."""
    if valid is None:
        return values.float().mean(-1)
    valid = valid.view(valid.shape[0], *[1] * (values.ndim - 2), valid.shape[-1])
    return (values & valid).sum(-1) / valid.sum(-1).clamp(min=1)


def attend(
    query: Float[Tensor, "B A Q D"],
    key: Float[Tensor, "B A N D"],
    value: Float[Tensor, "B A N D"],
    valid: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B Q E"]:
    """What each query gathers from the values of A heads, side by side; padding has to have values of exactly 0."""
    mask = None
    if valid is not None:
        # A set without members attends to its padding, whose values are exactly 0 as projections have no bias;
        # what attention to nothing gives depends on the device, and may be NaN.
        mask = (valid | ~valid.any(-1, keepdim=True))[:, None, None]
    if query.device.type == "cpu":
        # A CPU's attention in half precision is ten times slower on its way back.
        query, key, value = query.float(), key.float(), value.float()
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(-2)


def require_heads(width: int, heads: int) -> None:
    """Raise a UserError where a width cannot be shared out among heads."""
    if width % heads:
        raise UserError(f"a set encoder's width must be a multiple of its heads, got width {width}, heads {heads}")


class SetNorm(nn.Module):
    """Normalises each feature over the members of its own set (instance normalisation), then scales and shifts.

    With `valid`, padding has no part in that, and comes out 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, device=torch.get_default_device()))
        self.shift = nn.Parameter(torch.zeros(width, device=torch.get_default_device()))

    def forward(
        self, members: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        # These are plain means, since torch.var_mean over a middle dimension is ten times slower on a CPU.
        if valid is None:
            centred = members - members.mean(1, keepdim=True)
            variance = (centred * centred).mean(1, keepdim=True)
        else:
            members = scrub(members, valid)
            count = valid.sum(1)[:, None, None].clamp(min=1)
            # Padding that lies far from a set of little spread would grow with each norm, until it overflows.
            centred = scrub(members - members.sum(1, keepdim=True) / count, valid)
            variance = (centred * centred).sum(1, keepdim=True) / count
        return scrub(centred * (self.scale * torch.rsqrt(variance + 1e-5)) + self.shift, valid)


class SetLayer(nn.Module):
    """Attention among the members of a set, then a hidden layer for each; both residual and normalised over the set.

    Normalising over the set rather than over features is what routing encoders learn fastest with (Kwon et al. 2020).
    Padding comes in as 0 and goes out as 0.
    """

    def __init__(self, width: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        require_heads(width, heads)
        self.heads = heads
        # There are no biases here, since the norm over the set that follows would take them out again.
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.attention_norm = SetNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.hidden_out = nn.Linear(hidden, width, bias=False)
        self.hidden_norm = SetNorm(width)

    def forward(
        self, members: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        query, key, value = self.project(members)
        attended = attend(query, key, value, valid)
        return self.finish(members, self.attention_out(attended), valid)

    def project(self, members: Float[Tensor, "B N E"]) -> Sequence[Float[Tensor, "B A N D"]]:
        """Queries, keys and values of every head."""
        projected = self.query_key_value(members).unflatten(-1, (3, self.heads, -1))
        return projected.permute(2, 0, 3, 1, 4).unbind(0)

    def finish(
        self, members: Float[Tensor, "B N E"], gathered: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None
    ) -> Float[Tensor, "B N E"]:
        """The layer's output, of its input and of what attention has gathered."""
        members = self.attention_norm(members + gathered, valid)
        return self.hidden_norm(members + self.hidden_out(functional.relu(self.hidden(members))), valid)


class SetEncoder(nn.Module):
    """Attention over a set: each member's embedding knows of all the others, in no order.

    With `valid`, members where it is False are padding: what stands there changes nothing elsewhere, and comes out 0.
    """

    def __init__(self, features: int, *, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        # Two points closer than half precision tells apart would be one.
        self.embed = ExactLinear(features, width)
        self.layers = nn.ModuleList(SetLayer(width, heads=heads, hidden=hidden) for _ in range(layers))

    def forward(
        self, members: Float[Tensor, "B N F"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        return self.attend(scrub(self.embed(scrub(members, valid)), valid), valid)

    def attend(
        self, embedded: Float[Tensor, "B N E"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N E"]:
        """The layers alone, for members that are embedded already."""
        for layer in self.layers:
            embedded = layer(embedded, valid)
        return embedded


class CrossAttention(nn.Module):
    """What each query gathers from the members of a set, in no order; exactly 0 where that has no valid member.

    Members may be queries themselves, and gather from one another then. Padding among members changes nothing; queries
    that are padding gather as the others do. There are no biases, so that nothing comes of nothing.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        require_heads(width, heads)
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "*B Q E"],
        members: Float[Tensor, "*B N E"],
        valid: Bool[Tensor, "*B N"] | None = None,
    ) -> Float[Tensor, "*B Q E"]:
        lead = queries.shape[:-2]
        # Queries, members and their mask are laid out in one order, so that no row meets another's mask.
        query = self.query(queries).reshape(-1, *queries.shape[-2:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        members = scrub(members, valid).reshape(-1, *members.shape[-2:])
        projected = self.key_value(members).unflatten(-1, (2, self.heads, -1))
        key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        rows = None if valid is None else valid.reshape(-1, valid.shape[-1])
        return self.out(attend(query, key, value, rows)).view(*lead, *queries.shape[-2:])


class Gathering(nn.Module):
    """Queries, with what they gather from a set added to them: their own, or another that is normalised already."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-4)
        self.attention = CrossAttention(width, heads=heads)

    def forward(
        self,
        queries: Float[Tensor, "*B Q E"],
        valid: Bool[Tensor, "*B N"],
        members: Float[Tensor, "*B N E"] | None = None,
    ) -> Float[Tensor, "*B Q E"]:
        normed = self.norm(queries)
        return queries + self.attention(normed, normed if members is None else members, valid)


class Hidden(nn.Module):
    """A hidden layer for each vector, added to it."""

    def __init__(self, width: int, *, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-4)
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        return x + self.out(functional.silu(self.hidden(self.norm(x))))


class PointsEncoder(nn.Module):
    """A set of points as one vector, in no order: mean and maximum of its points, each told of the rest by attention.

    Attention is normalised over the set, so that its own mean would be the same whatever the set holds. A set without
    a valid point is exactly 0, and adds exactly 0 to every gradient.
    """

    def __init__(self, features: int, *, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SetEncoder(features, width=width, layers=layers, heads=heads, hidden=hidden)
        self.point = nn.Linear(features + width, width)
        # There is no bias, so that an empty set gives zeros.
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(
        self, points: Float[Tensor, "*B N F"], valid: Bool[Tensor, "*B N"] | None = None
    ) -> Float[Tensor, "*B E"]:
        lead = points.shape[:-2]
        points = points.reshape(-1, *points.shape[-2:])
        valid = None if valid is None else valid.reshape(points.shape[:-1])
        points = scrub(points, valid)
        embedded = functional.silu(self.point(torch.cat((points, self.attention(points, valid)), -1)))
        if valid is None:
            mean, largest = embedded.mean(1), embedded.amax(1)
        else:
            mean, largest = masked_mean(embedded, valid), masked_max(embedded, valid)
        return self.out(torch.cat((mean, largest), -1)).view(*lead, self.out.out_features)
