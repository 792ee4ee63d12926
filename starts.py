"""Where imagination starts: at the beginning of replayed or freshly drawn instances' episodes, or at replayed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.rules import Instance, Rules, each_part
from envs.tasks import ACTION_MASK
from imagination import Imagination, Start, expand_instance
from networks import Latent
from tools import uniform
from world_model import Observed, WorldModel


@torch.no_grad()
def start_from(
    model: WorldModel,
    batch: dict[str, Tensor],
    observed: Observed | None,
    *,
    imagination: Imagination,
    needs_latent: bool,
    generator: torch.Generator,
) -> Start:
    """`imag_tours` trajectories from where `imag_start` says.

    Args:
        model: encodes what is started from.
        batch: replayed sequences; whole episodes in routing.
        observed: the batch's latents where they are known already.
        imagination: the choice of start, and what goes with it.
        needs_latent: whether anybody reads the latents of episodes' beginnings.
        generator: draws symmetries and latents.
    """
    if model.rules is None or imagination.start == "replay":
        return replayed_starts(model, batch, observed, tours=imagination.tours, generator=generator)
    if imagination.start == "rows":
        return row_starts(
            model, batch, observed, tours=imagination.tours, needs_latent=needs_latent, generator=generator
        )
    instance, _ = model.rules.restore({key: value[:, 0] for key, value in batch.items()})
    if imagination.augment:
        instance = model.rules.augment(instance, generator)
    if imagination.start == "generated":
        instance = with_generated(model.rules, instance, share=imagination.generated, generator=generator)
    return episode_starts(
        model,
        instance,
        tours=imagination.tours,
        spread=imagination.first == "any",
        needs_latent=needs_latent,
        generator=generator,
    )


def episode_starts(
    model: WorldModel,
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
        spread: let the tours of one instance begin at nodes spread over it, rather than where the rules say.
        needs_latent: whether anybody reads the latents.
        generator: draws the latents; None takes their mode.
    """
    assert model.rules is not None, "only routing has instances"
    context = model.context(instance)
    count, num_nodes = instance.coords.shape[:2]
    device = instance.coords.device
    shape, first = torch.Size((count, tours)), None
    if spread:
        # A closed tour is the same wherever it begins, but never in padding.
        nodes = num_nodes if instance.valid is None else instance.valid.sum(-1, keepdim=True)
        first = (torch.arange(tours, device=device) * nodes // tours).expand(shape)
    state = model.rules.reset(expand_instance(instance, shape), first)
    latent = None
    if needs_latent:
        noise = None if generator is None else uniform((*shape, model.rssm.stoch_size), generator)
        latent = model.begin(context, state, noise)
    belief = model.first_belief(instance)
    return Start(latent, state, context, torch.ones(shape, device=device), None if belief is None else belief.detach())


def with_generated(rules: type[Rules], instance: Instance, *, share: float, generator: torch.Generator) -> Instance:
    """Replayed instances, of which the last ones give way to a share of freshly drawn ones of the full size.

    Nobody has walked them, and nobody needs to: the rules are known, and what their moves cost is the model's guess.
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


def row_starts(
    model: WorldModel,
    batch: dict[str, Tensor],
    observed: Observed | None,
    *,
    tours: int,
    needs_latent: bool,
    generator: torch.Generator,
) -> Start:
    """One row of each replayed episode, drawn with a density that falls from the first to none at the last.

    What is chosen early in a tour decides most, and is chosen while the belief forms.

    Args:
        model: observes the batch.
        batch: replayed sequences that begin at an episode's first row.
        observed: the batch's latents where they are known already.
        tours: trajectories of each row.
        needs_latent: whether anybody reads the latents.
        generator: draws the rows, and latents that are not known yet.
    """
    assert model.rules is not None, "only routing has whole episodes"
    if observed is None and needs_latent:
        observed = model.observe(batch, uniform((*batch["reward"].shape, model.rssm.stoch_size), generator))
    count = batch["reward"].shape[0]
    rows = torch.arange(count, device=batch["reward"].device)
    decisions = ((batch["is_first"].cumsum(1) <= 1) & ~batch["is_terminal"]).sum(1)
    # The smaller of two uniform draws.
    drawn = uniform((count, 2), generator).amin(-1)
    row = (drawn * decisions).long()
    instance, state = model.rules.restore({key: value[rows, row] for key, value in batch.items() if value.ndim > 1})
    shape = torch.Size((count, tours))
    states = type(state)(*(part[:, None].expand(*shape, *part.shape[1:]) for part in state))
    latent, belief = None, None
    if observed is not None and needs_latent:
        parts = (part.detach()[rows, row][:, None].expand(*shape, *part.shape[2:]) for part in observed.latents)
        latent = Latent(*parts)
    with torch.no_grad():
        context = model.context(instance)
        if model.belief is not None:
            belief = model.believe(batch, instance)[rows, row]
    return Start(latent, states, context, torch.ones(shape, device=rows.device), belief)


def replayed_starts(
    model: WorldModel,
    batch: dict[str, Tensor],
    observed: Observed | None,
    *,
    tours: int,
    generator: torch.Generator,
) -> Start:
    """Every row of replayed sequences; rows beyond the first episode's end do not count.

    Args:
        model: observes the batch.
        batch: replayed sequences.
        observed: the batch's latents where they are known already.
        tours: trajectories of each row, side by side.
        generator: draws latents that are not known yet.
    """
    if observed is None:
        observed = model.observe(batch, uniform((*batch["reward"].shape, model.rssm.stoch_size), generator))
    weight = (~batch["is_terminal"]).float()
    state = None
    if model.rules is not None:
        _, state = model.rules.restore(batch)
        weight = weight * (batch["is_first"].cumsum(1) <= 1)
    elif model.task.mask_rules is not None:
        state = model.task.mask_rules.restore(batch)
    if state is not None:
        state = type(state)(*(part.repeat_interleave(tours, 1) for part in state))
    latent = Latent(*(part.detach().repeat_interleave(tours, 1) for part in observed.latents))
    context = observed.context
    if context is not None:
        context = context._replace(nodes=context.nodes.detach())
    mask = batch[ACTION_MASK].repeat_interleave(tours, 1) if model.rules is None and model.task.actions.masked else None
    return Start(latent, state, context, weight.repeat_interleave(tours, 1), mask=mask)
