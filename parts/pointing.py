"""How a pointer scores nodes: by tables made once for each instance, and without holding the attention of many states.

The attention of Q states over N nodes by A heads is Q x A x N numbers for each instance, many more than all the rest.
Gradients of states that a roll-out has scored are computed some states at a time, from the tables alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from parts.views import take_nodes
from routing.rules import each_part
from tools import LOGIT_FLOOR

# Numbers of attention to work on at once: on a CPU so many stay in a core's cache, while a GPU wants much to do.
CHUNK = {"cpu": 2**18}
LARGE_CHUNK = 2**26
# Beyond so many nodes, what attention means for the nodes' scores is kept in two factors.
MOST_WHOLE = 100


class Pointed(NamedTuple):
    """What attention to each head's nodes gives the nodes as scores, multiplied out; G is heads x N."""

    whole: Float[Tensor, "B G N"]

    def scores(self, attention: Float[Tensor, "B Q A N"]) -> Float[Tensor, "B Q N"]:
        """The scores that attention stands for."""
        return torch.bmm(attention.flatten(2).to(self.whole.dtype), self.whole)

    def multiplied(self) -> Pointed:
        """Itself."""
        return self

    def backward(
        self, attention: Float[Tensor, "B Q A N"], gradient: Float[Tensor, "B Q N"], sums: Pointed
    ) -> Float[Tensor, "B Q A N"]:
        """The gradient of attention from that of scores; that of the tables is added to `sums`."""
        gradient = gradient.to(self.whole.dtype)
        sums.whole.add_(torch.bmm(attention.flatten(2).to(gradient.dtype).transpose(1, 2), gradient))
        return torch.bmm(gradient, self.whole.transpose(1, 2)).view_as(attention)


class FactoredPointed(NamedTuple):
    """The same in its two factors: a glimpse of D numbers for each head, and how well each node fits it."""

    value: Float[Tensor, "B A N D"]
    pointer: Float[Tensor, "B A N D"]

    def scores(self, attention: Float[Tensor, "B Q A N"]) -> Float[Tensor, "B Q N"]:
        """The scores that attention stands for."""
        glimpse, pointer = (each.transpose(1, 2).flatten(2) for each in (self._glimpse(attention), self.pointer))
        return torch.bmm(glimpse, pointer.transpose(1, 2))

    def multiplied(self) -> Pointed:
        """Both factors in one."""
        return Pointed((self.value @ self.pointer.transpose(-1, -2)).flatten(1, 2))

    def backward(
        self, attention: Float[Tensor, "B Q A N"], gradient: Float[Tensor, "B Q N"], sums: FactoredPointed
    ) -> Float[Tensor, "B Q A N"]:
        """The gradient of attention from that of scores; that of the tables is added to `sums`."""
        gradient = gradient.to(self.value.dtype)[:, None]
        sums.pointer.add_(gradient.transpose(-1, -2) @ self._glimpse(attention))
        of_glimpse = gradient @ self.pointer
        sums.value.add_(attention.permute(0, 2, 3, 1).to(of_glimpse.dtype) @ of_glimpse)
        return (of_glimpse @ self.value.transpose(-1, -2)).transpose(1, 2)

    def _glimpse(self, attention: Float[Tensor, "B Q A N"]) -> Float[Tensor, "B A Q D"]:
        return attention.transpose(1, 2).to(self.value.dtype) @ self.value


def pointed_by(value: Float[Tensor, "B A N D"], pointer: Float[Tensor, "B A N D"]) -> Pointed | FactoredPointed:
    """What a glimpse's values and the pointer's keys make together, in the form that is cheaper for so many nodes."""
    factors = FactoredPointed(value, pointer)
    return factors if value.shape[2] > MOST_WHOLE else factors.multiplied()


class PointerTables(NamedTuple):
    """All that a pointer actor needs of B instances, so that a decision is a few look-ups and one product.

    The glimpse's attention scores are linear in the query, and the query is a sum over the current node, the first
    node, the state's features and the latent. So each part's scores are computed once per instance, and a decision
    adds up rows; G is heads x N.
    """

    current: Float[Tensor, "B N G"]
    first: Float[Tensor, "B N G"]
    direct: Float[Tensor, "B N N"]
    features: Float[Tensor, "B X G"] | None
    latent: Float[Tensor, "B J G"] | None
    pointed: Pointed | FactoredPointed

    def named(self) -> dict[str, Tensor]:
        """Those there are, by name, as an agent keeps them for an episode; `of` takes them back."""
        parts = {**self._asdict(), **self.pointed._asdict()}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> PointerTables:
        """The tables among `named`."""
        pointed: Pointed | FactoredPointed
        if "whole" in named:
            pointed = Pointed(named["whole"])
        else:
            pointed = FactoredPointed(named["value"], named["pointer"])
        return cls(
            current=named["current"],
            first=named["first"],
            direct=named["direct"],
            features=named.get("features"),
            latent=named.get("latent"),
            pointed=pointed,
        )


class Queries(NamedTuple):
    """Q states of each of B instances: where they stand and began, which nodes are open, and what else they ask by."""

    current: Int[Tensor, "B Q"]
    first: Int[Tensor, "B Q"]
    open: Bool[Tensor, "B Q N"]
    features: Float[Tensor, "B Q X"] | None
    latent: Float[Tensor, "B Q J"] | None


def attend(queries: Queries, tables: PointerTables, *, heads: int) -> Float[Tensor, "B Q A N"]:
    """Attention of every head over the open nodes."""
    scores = take_nodes(tables.current, queries.current) + take_nodes(tables.first, queries.first)
    for asked, table in ((queries.features, tables.features), (queries.latent, tables.latent)):
        if table is not None:
            assert asked is not None, "this pointer is asked by features of the state, or by the latent"
            scores = scores + torch.bmm(asked.to(table.dtype), table)
    scores = scores.float().unflatten(-1, (heads, -1))
    closed = (~queries.open).to(scores.dtype) * LOGIT_FLOOR
    return torch.softmax(scores + closed[:, :, None], -1)


def point(queries: Queries, tables: PointerTables, *, heads: int) -> Float[Tensor, "B Q N"]:
    """How well each node fits each state."""
    pointed = tables.pointed.scores(attend(queries, tables, heads=heads))
    return pointed.float() + take_nodes(tables.direct, queries.current)


def point_again(
    known: Float[Tensor, "B Q N"], queries: Queries, tables: PointerTables, *, heads: int
) -> Float[Tensor, "B Q N"]:
    """Scores that `point` has given before, without a graph, with the gradients that it would have given them.

    Attention is computed again on the way back, some states at a time.
    """
    named = tables.named()
    return _PointAgain.apply(known, heads, tuple(named), *queries, *named.values())


class _PointAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Tensor, heads: int, names: tuple[str, ...], *parts: Tensor | None) -> Tensor:
        ctx.heads, ctx.names = heads, names
        ctx.save_for_backward(*parts)
        # A view, since a function that hands its input on as it is would not be noted.
        return known.view_as(known)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries = Queries(*ctx.saved_tensors[: len(Queries._fields)])
        named = dict(zip(ctx.names, ctx.saved_tensors[len(Queries._fields) :], strict=True))
        # Many small gradients are added up, in float32.
        sums = {name: torch.zeros(part.shape, device=part.device) for name, part in named.items()}
        asked = {
            name: torch.zeros_like(part)
            for name, part in queries._asdict().items()
            if part is not None and part.is_floating_point()
        }
        for rows, states in _chunks(gradient.shape, size=gradient.shape[-1] * ctx.heads, device=gradient.device):
            part = each_part(queries, itemgetter((rows, states)))
            tables, into = (
                PointerTables.of({name: each[rows] for name, each in parts.items()}) for parts in (named, sums)
            )
            scores = _backward(gradient[rows, states], part, tables, into, heads=ctx.heads)
            for name, of_asked in asked.items():
                table = named[name][rows]
                of_asked[rows, states] = torch.bmm(scores.to(table.dtype), table.transpose(1, 2)).to(of_asked.dtype)
                sums[name][rows] += torch.bmm(getattr(part, name).float().transpose(1, 2), scores)
        of_tables = (sums[name].to(part.dtype) for name, part in named.items())
        return (None, None, None, *(asked.get(name) for name in Queries._fields), *of_tables)


def _backward(
    gradient: Float[Tensor, "B Q N"], queries: Queries, tables: PointerTables, sums: PointerTables, *, heads: int
) -> Float[Tensor, "B Q G"]:
    """The gradient of attention scores from that of a pointer's; that of the tables of nodes is added to `sums`."""
    attention = attend(queries, tables, heads=heads)
    of_attention = tables.pointed.backward(attention, gradient, sums.pointed).float()  # type: ignore[arg-type]
    scores = torch._softmax_backward_data(of_attention, attention, -1, torch.float32).flatten(2)
    _add_rows(sums.current, queries.current, scores)
    _add_rows(sums.first, queries.first, scores)
    _add_rows(sums.direct, queries.current, gradient)
    return scores


def _add_rows(nodes: Float[Tensor, "B N E"], index: Int[Tensor, "B Q"], rows: Float[Tensor, "B Q E"]) -> None:
    """Add to the row that each index names: the gradient of `take_nodes`."""
    offset = torch.arange(nodes.shape[0], device=nodes.device)[:, None] * nodes.shape[1]
    nodes.view(-1, nodes.shape[-1]).index_add_(0, (index + offset).flatten(), rows.flatten(0, 1))


def _chunks(shape: torch.Size, *, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of instances and of states that cover [B, Q] in chunks of states that take `size` numbers each."""
    batch, states = shape[:2]
    most = max(1, CHUNK.get(device.type, LARGE_CHUNK) // size)
    together, length = max(1, most // states), min(most, states)
    for row in range(0, batch, together):
        for state in range(0, states, length):
            yield slice(row, row + together), slice(state, state + length)
