"""Where tours are imagined from: the beginning of replayed or freshly drawn instances' episodes, or replayed rows."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from imagining.imagination import Start, repeated
from imagining.routing_model import RoutingModel
from imagining.world_model import Observed
from routing.rules import Instance, Rules, each_part, expand_instance
from tools import uniform


def episode_starts(
    model: RoutingModel,
    instance: Instance,
    *,
    tours: int,
    spread: bool = False,
    needs_latent: bool,
    generator: torch.Generator | None,
) -> Start:
    """The beginnings of each instance's episodes.

    Args:
        model: has the rules, and encodes what they give.
        instance: wherever it comes from.
        tours: trajectories of each instance.
        spread: let the tours of one instance begin at nodes spread over it, rather than where the rules say; where all
            of them begin at the depot, let half of them begin with moves that are given.
        needs_latent: whether anybody reads the latents.
        generator: draws the latents; None takes their mode.
    """
    context = model.context(instance, embedded=needs_latent)
    count, num_nodes = instance.coords.shape[:2]
    device = instance.coords.device
    shape, first = torch.Size((count, tours)), None
    anywhere = model.rules.starts_anywhere
    if spread and anywhere:
        # A closed tour is the same wherever it begins, but never in padding.
        nodes = num_nodes if instance.valid is None else instance.valid.sum(-1, keepdim=True)
        first = (torch.arange(tours, device=device) * nodes // tours).expand(shape)
    state = model.rules.reset(expand_instance(instance, shape), first)
    latent = None
    if needs_latent:
        noise = None if generator is None else uniform((*shape, model.rssm.stoch_size), generator)
        latent = model.begin(context, state, noise)
    belief = model.first_belief(instance)
    context = context._replace(belief=None if belief is None else belief.detach())
    given = first_moves(model.rules, instance, tours // 2, generator) if spread and not anywhere else None
    return Start(latent, state, context, torch.ones(shape, device=device), given)


def first_moves(
    rules: type[Rules], instance: Instance, count: int, generator: torch.Generator | None
) -> Int[Tensor, "B G"]:
    """Legal first moves drawn for each instance, all of them different as long as there are enough.

    A plan is as good with any of its routes first, so that there is much to learn from what the actor would not begin
    with (Kwon et al. 2020, "POMO").

    Args:
        rules: of plans that begin at a depot.
        instance: B of them.
        count: moves of each.
        generator: draws them; None takes the last ones.
    """
    mask = rules.action_mask(rules.reset(instance))
    draws = torch.ones(mask.shape, device=mask.device) if generator is None else uniform(mask.shape, generator)
    order = draws.masked_fill(~mask, -1.0).argsort(-1, descending=True)
    # Where there are fewer, they come again.
    column = torch.arange(count, device=mask.device) % mask.sum(-1, keepdim=True)
    return order.gather(-1, column)


def with_generated(rules: type[Rules], instance: Instance, *, share: float, generator: torch.Generator) -> Instance:
    """Replayed instances, of which the last ones give way to a share of freshly drawn ones of the full size.

    They need not have been walked: the rules are known, and the model predicts what moves cost.
    A share below one instance is one.
    """
    count, num_nodes = instance.coords.shape[:2]
    device = instance.coords.device
    drawn = max(1, round(share * count))
    fresh = rules.random(drawn, num_nodes, generator=generator, device=device)
    if instance.valid is not None:
        fresh = rules.pad(fresh, num_nodes)
    drawn_parts = iter(part for part in fresh if part is not None)
    return each_part(instance, lambda part: torch.cat((part[: count - drawn], next(drawn_parts))))


def generated_of_size(
    rules: type[Rules], batch: int, num_nodes: int, *, least: int, most: int, generator: torch.Generator
) -> Instance:
    """Freshly drawn instances of one size, as many as have together the nodes of a batch of the full size.

    Args:
        rules: of the problem.
        batch: instances of a full batch.
        num_nodes: of each of them.
        least: nodes that they may have.
        most: likewise; the logarithm of their number is uniform, so that small ones are likelier.
        generator: draws the size and the instances.
    """
    size = min(most, int(least * ((most + 1) / least) ** float(uniform((), generator))))
    count = max(1, round(batch * num_nodes / size))
    return rules.random(count, size, generator=generator, device=generator.device)


def drawn_rows(batch: dict[str, Tensor], generator: torch.Generator) -> Int[Tensor, " B"]:
    """One row of each replayed episode in which a decision was made; early ones are likelier."""
    decisions = ((batch["is_first"].cumsum(1) <= 1) & ~batch["is_terminal"]).sum(1)
    # The smaller of two uniform draws has a density that falls to 0.
    drawn = uniform((len(decisions), 2), generator).amin(-1)
    return (drawn * decisions).long()


def row_starts(
    model: RoutingModel,
    batch: dict[str, Tensor],
    observed: Observed | None,
    *,
    tours: int,
    generator: torch.Generator,
) -> Start:
    """One row of each replayed episode, drawn with a density that falls from the first to none at the last.

    What is chosen early in a tour decides most, and is chosen while the belief forms.

    Args:
        model: has the rules, and encodes what they give.
        batch: replayed sequences that begin at an episode's first row.
        observed: their latents; None where nothing reads them.
        tours: trajectories of each row.
        generator: draws the rows.
    """
    row = drawn_rows(batch, generator)
    rows = torch.arange(len(row), device=row.device)
    count = len(row)
    instance, state = model.rules.restore({key: value[rows, row] for key, value in batch.items() if value.ndim > 1})
    shape = torch.Size((count, tours))
    states = each_part(state, lambda part: part[:, None].expand(*shape, *part.shape[1:]))
    latent = None
    if observed is not None:
        latent = each_part(
            observed.latents, lambda part: part.detach()[rows, row][:, None].expand(*shape, *part.shape[2:])
        )
    belief = None if model.belief is None else model.believe(batch, instance)[rows, row]
    context = model.context(instance, belief, embedded=observed is not None)
    return Start(latent, states, context, torch.ones(shape, device=rows.device))


def replayed_starts(model: RoutingModel, batch: dict[str, Tensor], observed: Observed | None, *, tours: int) -> Start:
    """Every row of replayed sequences; rows beyond the first episode's end do not count.

    Args:
        model: has the rules, and encodes what they give.
        batch: replayed sequences that begin at an episode's first row.
        observed: their latents; None where nothing reads them.
        tours: trajectories of each row, side by side.
    """
    weight = (~batch["is_terminal"]).float() * (batch["is_first"].cumsum(1) <= 1)
    _, state = model.rules.restore(batch)
    latent, context = None, None
    if observed is None:
        context = model.context(model.first_instance(batch), embedded=False)
    else:
        latent = repeated(observed.latents, tours)
        context = observed.context._replace(nodes=observed.context.embedded().detach())
    states = each_part(state, lambda part: part.repeat_interleave(tours, 1))
    return Start(latent, states, context, weight.repeat_interleave(tours, 1))
