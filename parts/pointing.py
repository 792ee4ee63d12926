"""How a pointer scores nodes: by tables made once for each instance, and without holding the attention of many states.

The attention of Q states over N nodes by A heads is Q x A x N numbers for each instance, many more than all the rest.
Gradients of states that a roll-out has scored are computed some states at a time, from the tables alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from parts.views import take_nodes
from tools import LOGIT_FLOOR

# Numbers of attention to work on at once: on a CPU so many stay in a core's cache, while a GPU wants much to do.
CHUNK = {"cpu": 2**18}
LARGE_CHUNK = 2**26


class PointerTables(NamedTuple):
    """All that a pointer actor needs of B instances, so that a decision is a few look-ups and one product.

    The glimpse's attention scores are linear in the query, and the query is a sum over the current node, the first
    node, the state's features and the latent. So each part's scores are computed once per instance, and a decision
    adds up rows; G is heads x N.

    What the glimpse then adds to the nodes' scores is linear in the attention: `pointed`. Where there are many nodes
    its two factors, `value` and `pointer`, take fewer products, and are held instead.
    """

    current: Float[Tensor, "B N G"]
    first: Float[Tensor, "B N G"]
    direct: Float[Tensor, "B N N"]
    features: Float[Tensor, "B X G"] | None
    latent: Float[Tensor, "B J G"] | None
    pointed: Float[Tensor, "B G N"] | None
    value: Float[Tensor, "B A N D"] | None = None
    pointer: Float[Tensor, "B A N D"] | None = None

    def detach(self) -> PointerTables:
        """The same numbers without a graph."""
        return self._replace(**{name: part.detach() for name, part in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """Those there are, by name, as an agent keeps them for an episode; `of` takes them back."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> PointerTables:
        """The tables among `named`."""
        return cls(**{name: named.get(name) for name in cls._fields})  # type: ignore[arg-type]


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
    attention = attend(queries, tables, heads=heads)
    if tables.pointed is not None:
        pointed = torch.bmm(attention.flatten(2).to(tables.pointed.dtype), tables.pointed)
    else:
        glimpse = _glimpse(attention, tables)
        pointed = _merge(glimpse) @ _merge(tables.pointer).transpose(-1, -2)
    return pointed.float() + take_nodes(tables.direct, queries.current)


def _glimpse(attention: Float[Tensor, "B Q A N"], tables: PointerTables) -> Float[Tensor, "B A Q D"]:
    assert tables.value is not None
    return attention.transpose(1, 2).to(tables.value.dtype) @ tables.value


def _merge(parts: Tensor | None) -> Float[Tensor, "B M E"]:
    """Heads [B, A, M, D] side by side."""
    assert parts is not None
    return parts.transpose(1, 2).flatten(2)


def point_again(
    known: Float[Tensor, "B Q N"], queries: Queries, tables: PointerTables, *, heads: int
) -> Float[Tensor, "B Q N"]:
    """Scores that `point` has given before, without a graph, with the gradients that it would have given them.

    Attention is computed again on the way back, some states at a time.
    """
    return _PointAgain.apply(known, heads, *queries, *tables)


class _PointAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Tensor, heads: int, *parts: Tensor | None) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(*parts)
        # A view, since a function that hands its input on as it is would not be noted.
        return known.view_as(known)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count = len(Queries._fields)
        queries, tables = Queries(*ctx.saved_tensors[:count]), PointerTables(*ctx.saved_tensors[count:])
        # Many small gradients are added up, in float32.
        asked = Queries(*(None if part is None or not part.is_floating_point() else _zeros(part) for part in queries))
        sums = PointerTables(*(None if part is None else _zeros(part) for part in tables))
        for rows, states in _chunks(gradient.shape, gradient.shape[-1] * ctx.heads, gradient.device):
            part = Queries(*(None if each is None else each[rows, states] for each in queries))
            table = PointerTables(*(None if each is None else each[rows] for each in tables))
            into = PointerTables(*(None if each is None else each[rows] for each in sums))
            scores = _backward_of_scores(gradient[rows, states], part, table, into, heads=ctx.heads)
            for kind in ("features", "latent"):
                by, rows_of = getattr(part, kind), getattr(table, kind)
                if rows_of is not None:
                    getattr(asked, kind)[rows, states] = torch.bmm(scores.to(rows_of.dtype), rows_of.transpose(1, 2))
                    getattr(into, kind).add_(torch.bmm(by.to(scores.dtype).transpose(1, 2), scores))
        given = zip((*queries, *tables), (*asked, *sums), strict=True)
        return (None, None, *(each if each is None or part is None else each.to(part.dtype) for part, each in given))


def _backward_of_scores(
    gradient: Float[Tensor, "b q N"], queries: Queries, tables: PointerTables, sums: PointerTables, *, heads: int
) -> Float[Tensor, "b q G"]:
    """The gradient of attention scores; what it means for tables of nodes is added to `sums`."""
    attention = attend(queries, tables, heads=heads)
    if tables.pointed is not None:
        near = gradient.to(tables.pointed.dtype)
        sums.pointed.add_(torch.bmm(attention.flatten(2).to(near.dtype).transpose(1, 2), near))
        of_attention = torch.bmm(near, tables.pointed.transpose(1, 2)).view_as(attention)
    else:
        near = gradient.to(tables.value.dtype)[:, None]
        sums.pointer.add_(near.transpose(-1, -2) @ _glimpse(attention, tables))
        of_glimpse = near @ tables.pointer
        sums.value.add_(attention.permute(0, 2, 3, 1).to(near.dtype) @ of_glimpse)
        of_attention = (of_glimpse @ tables.value.transpose(-1, -2)).transpose(1, 2)
    scores = torch._softmax_backward_data(of_attention.float(), attention, -1, torch.float32).flatten(2)
    _add_rows(sums.current, queries.current, scores)
    _add_rows(sums.first, queries.first, scores)
    _add_rows(sums.direct, queries.current, gradient)
    return scores


def _add_rows(nodes: Float[Tensor, "b N E"], index: Int[Tensor, "b q"], rows: Float[Tensor, "b q E"]) -> None:
    """Add to the row that each index names: the gradient of `take_nodes`."""
    offset = torch.arange(nodes.shape[0], device=nodes.device)[:, None] * nodes.shape[1]
    nodes.view(-1, nodes.shape[-1]).index_add_(0, (index + offset).flatten(), rows.flatten(0, 1))


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _chunks(shape: torch.Size, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of instances and of states that cover [B, Q] in chunks of `size` numbers for each state."""
    batch, states = shape[:2]
    most = max(1, CHUNK.get(device.type, LARGE_CHUNK) // size)
    together, length = max(1, most // states), min(most, states)
    for row in range(0, batch, together):
        for state in range(0, states, length):
            yield slice(row, row + together), slice(state, state + length)
