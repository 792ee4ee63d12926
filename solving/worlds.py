"""A user's instances in the cost world that a run learnt: where its nodes are there, and what moves truly cost."""

from __future__ import annotations

import numpy as np
import torch

from config import UserError
from routing.costs import EUCLIDEAN
from routing.files import RoutingInstance
from routing.matrices import as_costs
from routing.metrics import GIVEN, GREAT_CIRCLE, is_paid
from routing.rules import Rules
from solving.frames import as_instance


def costs_distances(rules: type[Rules]) -> bool:
    """Whether moves cost distances, so that an instance's own positions tell what a tour costs."""
    return rules.costs.name == EUCLIDEAN.name


def tells_costs(rules: type[Rules]) -> bool:
    """Whether an instance itself tells what moves cost, by its positions or its matrix, and no model has to."""
    return costs_distances(rules) or rules.shows_costs


def in_world(rules: type[Rules], instance: RoutingInstance) -> RoutingInstance:
    """The instance as the rules' cost world has it; as it is where moves cost distances, or where it gives a matrix.

    For a run that reads matrices, positions are one, too.
    Its `costs` are the true ones, which no model is shown: tours are measured and compared by them. Where an episode
    hides something, they are those on average over that; where nobody knows them, there are none.

    Raises:
        UserError: the world does not know its nodes.
    """
    if instance.metric == GIVEN or is_paid(instance.metric):
        return instance
    if tells_costs(rules):
        require_positions(instance)
        if not rules.shows_costs:
            return instance
        return instance._replace(costs=as_costs(instance.cost_matrix()), metric=GIVEN)
    if instance.metric == "GEO":
        raise UserError("gives degrees and minutes, which no cost world reads; give columns lat and lon, in degrees")
    costs, place = rules.costs, instance.place
    # In a world whose places have names, numbers are names, too.
    if instance.called is not None and (named := costs.numbers_of(instance.called)) is not None:
        place = named
    nodes = costs.locate(instance.coords, are_degrees=instance.metric == GREAT_CIRCLE, place=place)
    coords = nodes.coords[0].numpy()
    place = None if nodes.place is None else nodes.place[0].numpy().astype(np.int64)
    return at_home(rules, instance._replace(coords=coords, place=place))


def at_home(rules: type[Rules], instance: RoutingInstance) -> RoutingInstance:
    """The same for an instance whose nodes are those of the world already."""
    if tells_costs(rules):
        return instance
    costs = rules.costs
    found = instance._replace(metric=costs.metric, reference=None)
    if not costs.known:
        return found
    posed = as_instance([found], torch.from_numpy(instance.coords)[None])
    matrix = costs.mean_matrix(posed) if costs.hidden else costs.matrix(posed)
    return found._replace(costs=costs.unit * matrix[0].numpy())


def require_positions(instance: RoutingInstance) -> None:
    """Check that an instance says where its nodes are, or what moves cost.

    Raises:
        UserError: it names places alone.
    """
    if instance.costs is None and not instance.coords.shape[1]:
        raise UserError("names places of a cost world; give a run that learnt what moves between them cost")
