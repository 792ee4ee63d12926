"""Encoders, heads, actors and critic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from envs.tasks import ActionSpec
from networks import RSSM, MaskedActor, NodeHead, RoutingEncoder, TSPPointerActor
from parts import pointing
from parts.action_distributions import BoundedNormal, MultiOneHot
from parts.critics import LatentCritic, NodeCritic
from parts.layers import use_layer_norm
from parts.moves import MoveHead, move_geometry
from parts.pointing import Pointed
from parts.views import NodeSet, View, summarise, take_nodes
from tests.scenes import assert_gradient_reaches, without_zero_outputs
from tools import OneHotDist

BATCH, NODES, FEATURES, FEAT = 3, 6, 2, 12


def pointer(*, latent: int = 3, unimix: float = 0.01) -> TSPPointerActor:
    return TSPPointerActor(
        FEAT, FEATURES, width=8, layers=2, heads=2, hidden=16, latent=latent, clip=10.0, unimix=unimix
    )


def masked_actor() -> MaskedActor:
    return MaskedActor(FEAT, ActionSpec("discrete", (NODES,), masked=True), units=8, layers=2, unimix=0.01)


def routing_view(*queries: int) -> View:
    """Random routing states, each with at least one open node."""
    shape = (BATCH, *queries)
    mask = torch.rand(*shape, NODES) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    return View(mask, first=torch.randint(NODES, shape), current=torch.randint(NODES, shape))


def nodes_of(view: View) -> tuple[Tensor, Tensor]:
    """The first and the current node of routing states."""
    assert view.first is not None and view.current is not None
    return view.first, view.current


def mask_of(view: View) -> Tensor:
    """Which nodes are open in routing states."""
    assert view.action_mask is not None
    return view.action_mask


def permuted(view: View, order: Tensor) -> View:
    """The same states once node order[i] is called i."""
    new_name, (first, current) = order.argsort(), nodes_of(view)
    return View(mask_of(view)[..., order], first=new_name[first], current=new_name[current])


def test_use_layer_norm_leaves_no_other_norm() -> None:
    sizes = {"deter": 8, "stoch": 3, "classes": 4, "hidden": 6, "blocks": 2}
    block, dense = (RSSM(4, 5, cell=cell, unimix=0.01, **sizes) for cell in ("block", "dense"))
    models = nn.ModuleList([block, dense, pointer(), masked_actor(), routing_critic()])
    shapes = [tuple(part.normalized_shape) for part in models.modules() if isinstance(part, nn.RMSNorm)]
    use_layer_norm(models)
    assert not any(isinstance(part, nn.RMSNorm) for part in models.modules())
    norms = [part for part in models.modules() if isinstance(part, nn.LayerNorm)]
    assert shapes and [tuple(norm.normalized_shape) for norm in norms] == shapes
    assert all(norm.eps == 1e-3 for norm in norms)
    is_first = torch.ones(BATCH, 1, dtype=torch.bool)
    assert dense.observe(torch.randn(BATCH, 1, 5), torch.randn(BATCH, 1, 4), is_first, torch.rand(BATCH, 1, 3))


@pytest.mark.parametrize("queries", [(), (4,), (2, 4)])
def test_take_nodes_equals_gather(queries: tuple[int, ...]) -> None:
    nodes = torch.randn(BATCH, NODES, 7, requires_grad=True)
    index = torch.randint(NODES, (BATCH, *queries))
    expected = nodes.gather(1, index.view(BATCH, -1, 1).expand(-1, -1, 7)).view(*index.shape, 7)
    taken = take_nodes(nodes, index)
    assert torch.equal(taken, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((weights * rows).sum(), nodes)[0] for rows in (taken, expected)]
    torch.testing.assert_close(*gradients)


def test_summarise_by_hand() -> None:
    nodes = torch.tensor([[[1.0], [2.0], [6.0]]])
    view = View(
        first=torch.tensor([[0]]),
        current=torch.tensor([[2, 1]]),
        action_mask=torch.tensor([[[True, True, False], [True, False, False]]]),
    )
    assert summarise(nodes, view).tolist() == [[[6.0, 1.0, 1.5], [2.0, 1.0, 1.0]]]


def test_routing_encoder_gradient_reaches_every_parameter() -> None:
    encoder = RoutingEncoder(FEATURES, width=8, layers=2, heads=2, units=10)
    embed = encoder(encoder.nodes(torch.randn(BATCH, NODES, FEATURES)), routing_view(4))
    assert embed.shape == (BATCH, 4, encoder.embed_size)
    assert_gradient_reaches(list(encoder.named_parameters()), embed.square().sum())


@pytest.mark.parametrize("queries", [(), (4,), (2, 4)])
def test_node_head_equals_dot_product(queries: tuple[int, ...]) -> None:
    head = NodeHead(FEAT, 8, units=10)
    feat, nodes = torch.randn(BATCH, *queries, FEAT), torch.randn(BATCH, NODES, 8)
    expected = torch.einsum("b...e,bne->b...n", head.query(feat), head.key(nodes)) / math.sqrt(8)
    torch.testing.assert_close(head(feat, nodes), expected)
    assert_gradient_reaches(head.named_parameters(), head(feat, nodes).square().sum())


def move_head(*, latent_size: int = 0) -> MoveHead:
    return MoveHead(latent_size=latent_size, units=8, layers=2)


def test_move_head_starts_at_0() -> None:
    head = move_head(latent_size=5)
    assert (head(torch.rand(7, 2), torch.rand(7, 2), torch.randn(7, 5)) == 0).all()


def test_move_geometry_is_ends_difference_length_and_direction() -> None:
    geometry = move_geometry(torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(geometry, torch.tensor([0.1, 0.2, 0.4, 0.6, 0.3, 0.4, 0.5, 0.6, 0.8]))


def test_move_head_gives_a_share_of_the_length_and_a_rest() -> None:
    head = move_head()
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([-1.0, 3.0]))
    cost = head(torch.tensor([[0.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.3, 0.4], [0.5, 0.5]]), None)
    torch.testing.assert_close(cost, torch.tensor([[2.5, 3.0]]))


def test_move_head_gradient_is_finite_at_length_0() -> None:
    head = move_head()
    without_zero_outputs(head)
    origin, target = torch.full((3, 2), 0.5, requires_grad=True), torch.full((3, 2), 0.5, requires_grad=True)
    cost = head(origin, target, None)
    for gradient in torch.autograd.grad(cost.sum(), [origin, target, *head.parameters()]):
        assert gradient.isfinite().all()


def test_move_head_gradient_reaches_every_parameter() -> None:
    head = move_head(latent_size=5)
    inputs = torch.rand(7, 2), torch.rand(7, 2), torch.randn(7, 5)
    assert_gradient_reaches(head.output.named_parameters(), head(*inputs).sum())
    without_zero_outputs(head)
    assert_gradient_reaches(head.named_parameters(), head(*inputs).sum())


def naive_pointer(actor: TSPPointerActor, nodes: Tensor, feat: Tensor | None, view: View) -> Tensor:
    """Logits of one state of one instance by the textbook: query, attention per head, glimpse, score, clip."""
    nodes = actor.encoder(nodes[None])[0]
    width, heads = nodes.shape[-1], actor.heads
    first, current = nodes_of(view)
    query = actor.query_current(nodes[current]) + actor.query_first(nodes[first])
    if feat is not None:
        query = query + actor.query_latent(actor.project_latent(feat))
    key, value = actor.key(nodes), actor.value(nodes)
    glimpse = []
    for part in torch.arange(width).chunk(heads):
        scores = (key[:, part] @ query[part] / math.sqrt(width / heads)).masked_fill(~mask_of(view), -torch.inf)
        glimpse.append(torch.softmax(scores, -1) @ value[:, part])
    pointed = actor.pointer(nodes) @ torch.cat(glimpse) / math.sqrt(width)
    direct = actor.direct_to(nodes) @ actor.direct_from(nodes[current]) / math.sqrt(width)
    return actor.clip * torch.tanh(pointed + direct)


@pytest.mark.parametrize("latent", [0, 3])
def test_pointer_tables_equal_plain_attention(latent: int) -> None:
    actor = pointer(latent=latent, unimix=0.0)
    nodes, view = torch.randn(BATCH, NODES, FEATURES), routing_view(4)
    feat, (first, current) = torch.randn(BATCH, 4, FEAT) if latent else None, nodes_of(view)
    dist = actor(feat, actor.encode(nodes), view)
    for b in range(BATCH):
        for q in range(4):
            state = View(mask_of(view)[b, q], first=first[b, q], current=current[b, q])
            logits = naive_pointer(actor, nodes[b], None if feat is None else feat[b, q], state)
            expected = torch.softmax(logits.masked_fill(~mask_of(state), -torch.inf), -1)
            torch.testing.assert_close(dist.probs[b, q], expected)


def test_pointer_is_permutation_equivariant() -> None:
    actor, nodes, view = pointer(), torch.randn(BATCH, NODES, FEATURES), routing_view(4)
    feat, order = torch.randn(BATCH, 4, FEAT), torch.randperm(NODES)
    probs = actor(feat, actor.encode(nodes), view).probs
    torch.testing.assert_close(
        actor(feat, actor.encode(nodes[:, order]), permuted(view, order)).probs, probs[..., order]
    )


def test_pointer_depends_on_every_part_of_the_state() -> None:
    actor, nodes = pointer(), torch.randn(1, NODES, FEATURES)
    tables, feat = actor.encode(nodes), torch.randn(1, FEAT)
    mask = (torch.arange(NODES) > 1)[None]
    view = View(first=torch.tensor([0]), current=torch.tensor([1]), action_mask=mask)
    probs = actor(feat, tables, view).probs
    others = [
        actor(feat, tables, view._replace(first=torch.tensor([1]))),
        actor(feat, tables, view._replace(current=torch.tensor([0]))),
        actor(-feat, tables, view),
        actor(feat, actor.encode(nodes + torch.eye(NODES)[None, :, :2]), view),
    ]
    assert not any(torch.allclose(other.probs, probs) for other in others)


def test_pointer_scores_open_nodes_regardless_of_closed_ones() -> None:
    # With the mask inside attention, what a closed node offers cannot matter.
    actor, nodes = pointer(), torch.randn(BATCH, NODES, FEATURES)
    view = routing_view(4)._replace(action_mask=(torch.arange(NODES) > 1).expand(BATCH, 4, NODES))
    tables, feat = actor.encode(nodes), torch.randn(BATCH, 4, FEAT)
    assert isinstance(tables.pointed, Pointed)
    values = tables.pointed.whole.unflatten(1, (actor.heads, NODES)).clone()
    values[:, :, :2] = 1e6
    other = tables._replace(pointed=Pointed(values.flatten(1, 2)))
    torch.testing.assert_close(actor(feat, other, view).probs, actor(feat, tables, view).probs)


@pytest.mark.parametrize("queries", [(), (4,), (2, 4)])
def test_pointer_takes_any_number_of_states(queries: tuple[int, ...]) -> None:
    actor, view = pointer(), routing_view(*queries)
    tables, feat = actor.encode(torch.randn(BATCH, NODES, FEATURES)), torch.randn(BATCH, *queries, FEAT)
    probs = actor(feat, tables, view).probs
    first, current = nodes_of(view)
    flat = View(
        first=first.reshape(BATCH, -1),
        current=current.reshape(BATCH, -1),
        action_mask=mask_of(view).reshape(BATCH, -1, NODES),
    )
    expected = actor(feat.reshape(BATCH, -1, FEAT), tables, flat).probs
    torch.testing.assert_close(probs, expected.view(BATCH, *queries, NODES))


def test_pointer_shares_one_first_node_along_a_trajectory() -> None:
    actor, view = pointer(), routing_view(4)
    tables, feat = actor.encode(torch.randn(BATCH, NODES, FEATURES)), torch.randn(BATCH, 4, FEAT)
    first, _ = nodes_of(view)
    shared = view._replace(first=first[:, :1])
    repeated = view._replace(first=first[:, :1].expand(-1, 4))
    assert torch.equal(actor(feat, tables, shared).probs, actor(feat, tables, repeated).probs)


def test_pointer_clips_its_logits() -> None:
    actor, view = pointer(unimix=0.0), routing_view(4)
    with torch.no_grad():
        actor.direct_from.weight.mul_(1e4)
    view = view._replace(action_mask=torch.ones_like(mask_of(view)))
    probs = actor(torch.randn(BATCH, 4, FEAT), actor.encode(torch.randn(BATCH, NODES, FEATURES)), view).probs
    spread = probs.amax(-1).log() - probs.amin(-1).log()
    assert spread.max().item() == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("build", [pointer, masked_actor])
def test_actor_gives_illegal_actions_probability_0(build) -> None:
    actor, view = build(), routing_view(50)
    tables = actor.tables(NodeSet(torch.randn(BATCH, NODES, FEATURES), None))
    dist = actor(torch.randn(BATCH, 50, FEAT), tables, view)
    assert (dist.probs[~mask_of(view)] == 0).all() and (dist.probs[mask_of(view)] > 0).all()
    assert mask_of(view).gather(-1, dist.sample(torch.rand(BATCH, 50))[..., None]).all()


@pytest.mark.parametrize("build", [pointer, masked_actor])
def test_actor_survives_an_empty_mask(build) -> None:
    actor, view = build(), routing_view(4)
    mask_of(view)[0, 2] = False
    tables = actor.tables(NodeSet(torch.randn(BATCH, NODES, FEATURES), None))
    dist = actor(torch.randn(BATCH, 4, FEAT), tables, view)
    action = dist.mode()
    assert action[0, 2] == 0 and dist.log_prob(action)[0, 2] == 0 and dist.entropy()[0, 2] == 0
    alone = dist.log_prob(action)[0, 2] + dist.entropy()[0, 2]
    everything = dist.log_prob(action).sum() + dist.entropy().sum()
    for loss, vanishes in ((alone, True), (everything, False)):
        gradients = torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all((gradient == 0).all() for gradient in gradients) == vanishes


@pytest.mark.parametrize("latent", [0, 3])
def test_pointer_gradient_reaches_every_parameter(latent: int) -> None:
    actor, view = pointer(latent=latent), routing_view(4)
    feat = torch.randn(BATCH, 4, FEAT) if latent else None
    dist = actor(feat, actor.encode(torch.randn(BATCH, NODES, FEATURES)), view)
    assert_gradient_reaches(list(actor.named_parameters()), (dist.probs * torch.randn(BATCH, 4, NODES)).sum())


def test_pointer_tables_are_restored_from_what_acting_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for latent, most_whole in ((0, 100), (3, 100), (0, 1)):
        monkeypatch.setattr(pointing, "MOST_WHOLE", most_whole)
        actor = pointer(latent=latent)
        named = actor.named(actor.tables(NodeSet(torch.randn(BATCH, NODES, FEATURES), None)))
        again = actor.named(actor.restore(named))
        assert again.keys() == named.keys() and all(again[name] is part for name, part in named.items())


def test_masked_actor_gradient_reaches_every_parameter() -> None:
    actor = masked_actor()
    dist = actor(torch.randn(BATCH, 4, FEAT), None, routing_view(4))
    assert_gradient_reaches(actor.named_parameters(), dist.entropy().sum())


def test_masked_actor_without_view_allows_every_action() -> None:
    assert (masked_actor()(torch.randn(BATCH, FEAT), None, View(None)).probs > 0).all()


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (ActionSpec("discrete", (3,)), OneHotDist),
        (ActionSpec("multi_discrete", (3, 2)), MultiOneHot),
        (ActionSpec("continuous", (2,)), BoundedNormal),
    ],
    ids=["discrete", "multi_discrete", "continuous"],
)
def test_masked_actor_acts_in_every_kind_of_task(actions: ActionSpec, expected: type) -> None:
    actor = MaskedActor(FEAT, actions, units=8, layers=2, unimix=0.01)
    dist = actor(torch.randn(BATCH, 4, FEAT), None, View(None))
    action = dist.sample(torch.rand(BATCH, 4, *actions.shape))
    assert action.shape == (BATCH, 4, *actions.shape) and action.dtype == actions.dtype
    assert dist.embed(action).shape == (BATCH, 4, actions.embed_size)
    assert_gradient_reaches(actor.named_parameters(), (dist.log_prob(action) * torch.randn(BATCH, 4)).sum())
    assert type(dist) is expected


def routing_critic() -> NodeCritic:
    return NodeCritic(FEAT, FEATURES, units=8, layers=2, bins=15)


def test_critic_starts_at_0() -> None:
    critic, view = routing_critic(), routing_view(4)
    value = critic(torch.randn(BATCH, 4, FEAT), critic.tables(NodeSet(torch.randn(BATCH, NODES, FEATURES), None)), view)
    assert (value.mean() == 0).all()
    plain = LatentCritic(FEAT, units=8, layers=2, bins=255)
    assert (plain(torch.randn(BATCH, 4, FEAT), None, View(None)).mean() == 0).all()


def test_critic_is_permutation_invariant() -> None:
    critic, view, nodes = routing_critic(), routing_view(4), torch.randn(BATCH, NODES, FEATURES)
    without_zero_outputs(critic.mlp)
    feat, order = torch.randn(BATCH, 4, FEAT), torch.randperm(NODES)
    expected = critic(feat, critic.tables(NodeSet(nodes, None)), view).logits
    torch.testing.assert_close(
        critic(feat, critic.tables(NodeSet(nodes[:, order], None)), permuted(view, order)).logits, expected
    )


def test_critic_gradient_reaches_every_parameter() -> None:
    critic, view, nodes = routing_critic(), routing_view(4), torch.randn(BATCH, NODES, FEATURES)
    feat, target = torch.randn(BATCH, 4, FEAT), torch.randn(BATCH, 4)
    loss = -critic(feat, critic.tables(NodeSet(nodes, None)), view).log_prob(target).sum()
    assert_gradient_reaches(critic.mlp.output.named_parameters(), loss)
    without_zero_outputs(critic.mlp)
    loss = -critic(feat, critic.tables(NodeSet(nodes, None)), view).log_prob(target).sum()
    assert_gradient_reaches(list(critic.named_parameters()), loss)
