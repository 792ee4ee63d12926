from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from envs.tasks import ActionSpec
from layers import MLP, BlockCell, BlockLinear, DenseCell, embed_actions, use_layer_norm
from moves import MoveHead
from networks import (
    RSSM,
    Critic,
    Latent,
    MaskedActor,
    NodeHead,
    RoutingEncoder,
    TSPPointerActor,
    View,
    summarise,
    take_nodes,
)
from tools import BoundedNormal, MultiOneHot, OneHotDist

CPU = torch.device("cpu")
BATCH, STEPS, NODES, FEATURES, FEAT = 3, 5, 6, 2, 12
ACTIONS, EMBED, STOCH, CLASSES = 4, 5, 3, 4


# Both recurrent cells: whatever holds of the RSSM holds with either.
CELLS = pytest.mark.parametrize("cell", ["block", "dense"])


def rssm(cell: str = "block", *, unimix: float = 0.01) -> RSSM:
    return RSSM(ACTIONS, EMBED, cell=cell, deter=8, stoch=STOCH, classes=CLASSES, hidden=6, blocks=2, unimix=unimix)


class Sequence:
    """The arguments of `RSSM.observe`, where only row 1 has a second episode, from step 3 on."""

    def __init__(self) -> None:
        self.embed = torch.randn(BATCH, STEPS, EMBED)
        self.prev_action = torch.randn(BATCH, STEPS, ACTIONS)
        self.is_first = torch.zeros(BATCH, STEPS, dtype=torch.bool)
        self.is_first[:, 0] = self.is_first[1, 3] = True
        self.noise = torch.rand(BATCH, STEPS, STOCH)

    def observed_by(self, model: RSSM, initial: Latent | None = None) -> Latent:
        return model.observe(self.embed, self.prev_action, self.is_first, self.noise, initial)[0]

    def rows(self, begin: int, end: int) -> Sequence:
        """The rows from `begin` to before `end`."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[:, begin:end])
        return part


def random_latent() -> Latent:
    return Latent(deter=torch.randn(BATCH, 8), stoch=torch.randn(BATCH, STOCH, CLASSES))


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


def permuted(view: View, order: Tensor) -> View:
    """The same states once node order[i] is called i."""
    new_name, (first, current) = order.argsort(), nodes_of(view)
    return View(view.action_mask[..., order], first=new_name[first], current=new_name[current])


def assert_gradient_reaches(named_parameters: Iterable[tuple[str, nn.Parameter]], loss: Tensor) -> None:
    """Every parameter gets a finite gradient that is more than rounding noise."""
    parameters = dict(named_parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None, f"{name} is no part of the loss"
        assert gradient.isfinite().all(), f"{name} has a gradient that is not finite"
        assert gradient.abs().max() > 1e-5, f"{name} has no gradient"


def without_zero_output(module: nn.Module) -> None:
    """Undo an output that starts at zero, behind which no gradient passes before the first update."""
    assert isinstance(module.output, nn.Linear)
    nn.init.normal_(module.output.weight, std=0.1)


def test_latent_feat_holds_both_parts() -> None:
    latent = Latent(deter=torch.randn(2, 3, 4), stoch=torch.randn(2, 3, 2, 5))
    assert torch.equal(latent.feat(), torch.cat((latent.deter, latent.stoch.reshape(2, 3, 10)), -1))


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
    without_zero_output(mlp)
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


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dense_cell_by_hand() -> None:
    cell = DenseCell(2, 1, 1, hidden=1)
    with torch.no_grad():
        cell.inputs.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        # Of the hidden unit, and of both numbers of the state: two rows each for reset, candidate and update.
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


def test_rssm_refuses_an_unknown_cell() -> None:
    with pytest.raises(ValueError, match="rssm.cell is 'lstm'; choose block or dense"):
        rssm("lstm")


@CELLS
def test_rssm_recur_depends_on_all_its_inputs(cell: str) -> None:
    model = rssm(cell)
    inputs = [torch.randn(1, size, requires_grad=True) for size in (8, STOCH * CLASSES, ACTIONS)]
    deter = model.recur(Latent(deter=inputs[0], stoch=inputs[1].unflatten(-1, (STOCH, CLASSES))), inputs[2])
    for gradient in torch.autograd.grad(deter.square().sum(), inputs):
        assert (gradient != 0).all()


def test_rssm_initial_is_0() -> None:
    latent = rssm().initial((2, 3))
    assert latent.deter.shape == (2, 3, 8) and latent.stoch.shape == (2, 3, STOCH, CLASSES)
    assert (latent.feat() == 0).all() and latent.feat().shape[-1] == rssm().feat_size


def test_rssm_stoch_is_one_hot() -> None:
    stoch = Sequence().observed_by(rssm()).stoch
    assert ((stoch == 0) | (stoch == 1)).all() and (stoch.sum(-1) == 1).all()


@CELLS
@pytest.mark.parametrize("with_initial", [False, True])
def test_rssm_is_first_cuts_memory(cell: str, with_initial: bool) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    # Row 0 is the first of an episode, so that what came before it doesn't count either.
    initial = random_latent() if with_initial else None
    sequence.embed[:, :3] = torch.randn(BATCH, 3, EMBED)
    sequence.noise[:, :3] = torch.rand(BATCH, 3, STOCH)
    sequence.prev_action[:, :4] = torch.randn(BATCH, 4, ACTIONS)  # an action that leads into a first row counts too
    changed = (sequence.observed_by(model, initial).feat() != before).any(-1)[:, 1:]  # row 0 may draw the same
    assert changed.tolist() == [[True] * 4, [True] * 2 + [False] * 2, [True] * 4]


@CELLS
def test_rssm_is_first_stops_nan(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    sequence.embed[1, :3] = sequence.prev_action[1, :4] = torch.nan
    after = sequence.observed_by(model).feat()
    assert after[1, :3].isnan().any(-1).all()
    assert torch.equal(after[1, 3:], before[1, 3:])
    sequence = Sequence()
    sequence.prev_action[:, 0] = torch.nan
    assert sequence.observed_by(model, Latent(*(part * torch.nan for part in random_latent()))).feat().isfinite().all()


@CELLS
def test_rssm_is_first_cuts_gradients(cell: str) -> None:
    model, sequence, initial = rssm(cell), Sequence(), random_latent()
    sequence.is_first[0, 0] = False
    inputs = [sequence.embed, sequence.prev_action, *initial]
    for tensor in inputs:
        tensor.requires_grad_()
    later = sequence.observed_by(model, initial).feat()[:, 3:]
    embed, action, deter, stoch = torch.autograd.grad((later * torch.randn_like(later)).sum(), inputs)
    assert (embed[1, :3] == 0).all() and (action[1, :4] == 0).all()
    assert (embed[0, :3] != 0).any(-1).all() and (action[0] != 0).any(-1).all()
    assert (embed[1, 3:] != 0).any(-1).all() and (action[1, 4] != 0).any()
    # Only row 0 goes on from the initial latent.
    assert (deter[1:] == 0).all() and (stoch[1:] == 0).all()
    assert deter[0].any() and stoch[0].any()


@CELLS
def test_rssm_observe_goes_on_from_a_latent(cell: str) -> None:
    model, sequence, initial = rssm(cell), Sequence(), random_latent()
    sequence.is_first[0, 0] = False
    whole = sequence.observed_by(model, initial)
    half = sequence.rows(0, 2).observed_by(model, initial)
    rest = sequence.rows(2, STEPS).observed_by(model, Latent(*(part[:, -1] for part in half)))
    for all_rows, first, second in zip(whole, half, rest, strict=True):
        torch.testing.assert_close(torch.cat((first, second), 1), all_rows)
    forgetful = sequence.rows(2, STEPS).observed_by(model)
    assert not torch.allclose(forgetful.deter, rest.deter)


@CELLS
def test_rssm_first_row_forgets_the_action_before_it(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    sequence.prev_action[:, 0] += 1
    assert torch.equal(sequence.observed_by(model).feat(), before)


@CELLS
def test_rssm_imagine_step_agrees_with_observe(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    latents, _, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    for t in range(1, STEPS):
        latent = Latent(deter=latents.deter[:, t - 1], stoch=latents.stoch[:, t - 1])
        imagined = model.imagine_step(latent, sequence.prev_action[:, t], sequence.noise[:, t])
        goes_on = ~sequence.is_first[:, t]
        torch.testing.assert_close(imagined.deter[goes_on], latents.deter[goes_on, t])
        probs = model.distribution(model.prior(imagined.deter)).probs
        torch.testing.assert_close(probs[goes_on], prior.probs[goes_on, t])
        drawn = prior.one_hot(prior.sample(sequence.noise))[:, t]
        assert torch.equal(imagined.stoch[goes_on], drawn[goes_on])


@CELLS
def test_rssm_same_noise_gives_the_same_latents(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    first = sequence.observed_by(model)
    torch.rand(100)  # the global stream has no part in it
    assert torch.equal(sequence.observed_by(model).feat(), first.feat())
    sequence.noise = 1 - sequence.noise
    assert not torch.equal(sequence.observed_by(model).stoch, first.stoch)


def test_rssm_without_noise_takes_the_mode() -> None:
    model, latent, action = rssm(), rssm().initial((BATCH,)), torch.randn(BATCH, ACTIONS)
    imagined = model.imagine_step(latent, action, None)
    expected = model.prior(imagined.deter).unflatten(-1, (STOCH, CLASSES)).argmax(-1)
    assert torch.equal(imagined.stoch.argmax(-1), expected)


def test_rssm_distributions_mix_in_uniform() -> None:
    dist = rssm(unimix=0.2).distribution(torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(STOCH)[None])
    torch.testing.assert_close(dist.probs[0, 0], torch.tensor([0.85, 0.05, 0.05, 0.05]))


@CELLS
def test_rssm_gradient_reaches_every_parameter(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    latents, posterior, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    feat = latents.feat()
    assert_gradient_reaches(model.named_parameters(), posterior.kl(prior).sum() + (feat * torch.randn_like(feat)).sum())


@CELLS
@pytest.mark.parametrize("side", ["prior", "posterior"])
def test_rssm_prior_and_posterior_each_train_the_recurrence(side: str, cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    _, posterior, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    kl = posterior.detach().kl(prior) if side == "prior" else posterior.kl(prior.detach())
    assert_gradient_reaches(model.cell.named_parameters(), kl.sum())


def test_use_layer_norm_leaves_no_other_norm() -> None:
    dense = rssm("dense")
    models = nn.ModuleList([rssm("block"), dense, pointer(), masked_actor(), routing_critic()])
    sizes = [tuple(part.normalized_shape) for part in models.modules() if isinstance(part, nn.RMSNorm)]
    use_layer_norm(models)
    assert not any(isinstance(part, nn.RMSNorm) for part in models.modules())
    norms = [part for part in models.modules() if isinstance(part, nn.LayerNorm)]
    assert sizes and [tuple(norm.normalized_shape) for norm in norms] == sizes
    assert all(norm.eps == 1e-3 for norm in norms)
    Sequence().observed_by(dense)


def test_embed_actions_by_hand() -> None:
    discrete = embed_actions(ActionSpec("discrete", (3,)), torch.tensor([[2, 0]]))
    assert discrete.tolist() == [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    choices = embed_actions(ActionSpec("multi_discrete", (3, 2)), torch.tensor([[1, 0], [2, 1]]))
    assert choices.tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]]
    numbers = embed_actions(ActionSpec("continuous", (4,)), torch.tensor([[-3.0, -0.5, 1.0, 8.0]]))
    assert numbers.tolist() == [[-1.0, -0.5, 1.0, 1.0]]


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


def test_move_head_sees_the_geometry_of_the_move() -> None:
    head, seen = move_head(latent_size=1), []
    head.hidden.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head(torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.6]), torch.tensor([9.0]))
    torch.testing.assert_close(seen[0], torch.tensor([0.1, 0.2, 0.4, 0.6, 0.3, 0.4, 0.5, 0.6, 0.8, 9.0]))


def test_move_head_gives_a_share_of_the_length_and_a_rest() -> None:
    head = move_head()
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([-1.0, 3.0]))
    cost = head(torch.tensor([[0.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.3, 0.4], [0.5, 0.5]]), None)
    torch.testing.assert_close(cost, torch.tensor([2.5, 3.0]))


def test_move_head_gradient_is_finite_at_length_0() -> None:
    head = move_head()
    without_zero_output(head)
    origin, target = torch.full((3, 2), 0.5, requires_grad=True), torch.full((3, 2), 0.5, requires_grad=True)
    cost = head(origin, target, None)
    for gradient in torch.autograd.grad(cost.sum(), [origin, target, *head.parameters()]):
        assert gradient.isfinite().all()


def test_move_head_gradient_reaches_every_parameter() -> None:
    head = move_head(latent_size=5)
    inputs = torch.rand(7, 2), torch.rand(7, 2), torch.randn(7, 5)
    assert_gradient_reaches(head.output.named_parameters(), head(*inputs).sum())
    without_zero_output(head)
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
        scores = (key[:, part] @ query[part] / math.sqrt(width / heads)).masked_fill(~view.action_mask, -torch.inf)
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
            state = View(view.action_mask[b, q], first=first[b, q], current=current[b, q])
            logits = naive_pointer(actor, nodes[b], None if feat is None else feat[b, q], state)
            expected = torch.softmax(logits.masked_fill(~state.action_mask, -torch.inf), -1)
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
    values = tables.logits.unflatten(1, (actor.heads, NODES)).clone()
    values[:, :, :2] = 1e6
    other = tables._replace(logits=values.flatten(1, 2))
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
        action_mask=view.action_mask.reshape(BATCH, -1, NODES),
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
    view = view._replace(action_mask=torch.ones_like(view.action_mask))
    probs = actor(torch.randn(BATCH, 4, FEAT), actor.encode(torch.randn(BATCH, NODES, FEATURES)), view).probs
    spread = probs.amax(-1).log() - probs.amin(-1).log()
    assert spread.max().item() == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("build", [pointer, masked_actor])
def test_actor_gives_illegal_actions_probability_0(build) -> None:
    actor, view = build(), routing_view(50)
    tables = actor.encode(torch.randn(BATCH, NODES, FEATURES)) if actor.needs_nodes else None
    dist = actor(torch.randn(BATCH, 50, FEAT), tables, view)
    assert (dist.probs[~view.action_mask] == 0).all() and (dist.probs[view.action_mask] > 0).all()
    assert view.action_mask.gather(-1, dist.sample(torch.rand(BATCH, 50))[..., None]).all()


@pytest.mark.parametrize("build", [pointer, masked_actor])
def test_actor_survives_an_empty_mask(build) -> None:
    actor, view = build(), routing_view(4)
    view.action_mask[0, 2] = False
    tables = actor.encode(torch.randn(BATCH, NODES, FEATURES)) if actor.needs_nodes else None
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


def test_pointer_tables_detach_keeps_the_numbers() -> None:
    for latent in (0, 3):
        tables = pointer(latent=latent).encode(torch.randn(BATCH, NODES, FEATURES))
        for part, detached in zip(tables, tables.detach(), strict=True):
            assert (part is None) == (detached is None)
            if part is not None and detached is not None:
                assert part.requires_grad and not detached.requires_grad and torch.equal(part, detached)


def test_masked_actor_gradient_reaches_every_parameter() -> None:
    actor = masked_actor()
    dist = actor(torch.randn(BATCH, 4, FEAT), None, routing_view(4))
    assert_gradient_reaches(actor.named_parameters(), dist.entropy().sum())


def test_masked_actor_without_view_allows_every_action() -> None:
    assert (masked_actor()(torch.randn(BATCH, FEAT), None, None).probs > 0).all()


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
    dist = actor(torch.randn(BATCH, 4, FEAT), None, None)
    action = dist.sample(torch.rand(BATCH, 4, *actions.shape))
    assert action.shape == (BATCH, 4, *actions.shape) and action.dtype == actions.dtype
    assert dist.embed(action).shape == (BATCH, 4, actions.embed_size)
    assert_gradient_reaches(actor.named_parameters(), (dist.log_prob(action) * torch.randn(BATCH, 4)).sum())
    assert type(dist) is expected


def routing_critic() -> Critic:
    return Critic(FEAT, FEATURES, units=8, layers=2, bins=15)


def test_critic_starts_at_0() -> None:
    critic, view = routing_critic(), routing_view(4)
    value = critic(torch.randn(BATCH, 4, FEAT), critic.encode(torch.randn(BATCH, NODES, FEATURES)), view)
    assert (value.mean() == 0).all()
    plain = Critic(FEAT, None, units=8, layers=2, bins=255)
    assert plain.encode(None) is None
    assert (plain(torch.randn(BATCH, 4, FEAT), None, None).mean() == 0).all()


def test_critic_is_permutation_invariant() -> None:
    critic, view, nodes = routing_critic(), routing_view(4), torch.randn(BATCH, NODES, FEATURES)
    without_zero_output(critic.mlp)
    feat, order = torch.randn(BATCH, 4, FEAT), torch.randperm(NODES)
    expected = critic(feat, critic.encode(nodes), view).logits
    torch.testing.assert_close(critic(feat, critic.encode(nodes[:, order]), permuted(view, order)).logits, expected)


def test_critic_gradient_reaches_every_parameter() -> None:
    critic, view, nodes = routing_critic(), routing_view(4), torch.randn(BATCH, NODES, FEATURES)
    feat, target = torch.randn(BATCH, 4, FEAT), torch.randn(BATCH, 4)
    loss = -critic(feat, critic.encode(nodes), view).log_prob(target).sum()
    assert_gradient_reaches(critic.mlp.output.named_parameters(), loss)
    without_zero_output(critic.mlp)
    loss = -critic(feat, critic.encode(nodes), view).log_prob(target).sum()
    assert_gradient_reaches(list(critic.named_parameters()), loss)
