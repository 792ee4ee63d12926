"""An agent of a routing problem as two graphs: one reads an instance, the other steps the rules and points at nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from config import UserError
from dreamer import Dreamer
from envs.tasks import RoutingTask
from exporting.graphs import NEXT, VERIFIED_STEPS, Agreement, Export, Graph, Run, compared, together
from imagining.routing_model import RoutingModel
from networks import Latent
from parts.pointing import PointerTables
from parts.views import View, take_nodes
from routing.rules import Instance, State, expand_instance

# Of the example by which graphs are made, all different, and other than what is fixed: instances, tours of each, nodes.
INSTANCES, TOURS, NODES = 5, 3, 13
# Axes whose size is the network's own, whatever it is.
FIXED = {
    ("coords", 2),
    ("nodes", 2),
    ("deter", 2),
    ("stoch", 2),
    ("stoch", 3),
    ("table_features", 1),
    ("table_latent", 1),
}
# Instances and tours of each, to compare with.
COMPARED = ((1, 1), (3, 2))


class Encode(nn.Module):
    """From instances to all that a tour needs of them: tables of their nodes, and states in which tours begin."""

    def __init__(self, agent: Dreamer) -> None:
        super().__init__()
        self.model, self.actor = _model(agent), agent.behavior.actor

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Instances by the names of their parts, and `start` [B, Q]: where tours begin that can begin anywhere."""
        rules, start = self.model.rules, inputs["start"]
        instance = rules.instance_of({name: part for name, part in inputs.items() if name != "start"})
        spread = expand_instance(instance, start.shape)
        state = rules.reset(spread, start if rules.starts_anywhere else None)
        tables = self.actor.tables(self.model.node_set(instance, self.model.first_belief(instance)))
        if isinstance(tables, PointerTables):
            # One form for any number of nodes.
            tables = tables._replace(pointed=tables.pointed.multiplied())
        outputs = {f"table_{name}": part for name, part in self.actor.named(tables).items()}
        # Parts of an instance that states repeat would be the same tensor twice.
        outputs |= {f"{NEXT}{name}": part.clone() for name, part in state._asdict().items()}
        if self.actor.latent_size:
            outputs["nodes"] = self.model.context(instance).embedded()
            latent = self.model.rssm.initial((start.shape[0], start.shape[1]))
            outputs |= {f"{NEXT}{name}": part for name, part in latent._asdict().items()}
        return outputs


class Step(nn.Module):
    """Moves tours on by their last actions, and says how good each node is to go to next."""

    def __init__(self, agent: Dreamer) -> None:
        super().__init__()
        self.model, self.actor = _model(agent), agent.behavior.actor

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `Encode` gave or the last step, `prev_action` [B, Q], and `is_first` [B, Q]: no action comes before."""
        rules, is_first, action = self.model.rules, inputs["is_first"], inputs["prev_action"]
        state = self._moved(inputs, is_first, action)
        view = View.of(rules, state, rules.action_mask(state))
        outputs: dict[str, Tensor] = {}
        feat = None
        if self.actor.latent_size:
            latent = self._inferred(inputs, view, is_first, action)
            feat = latent.feat()
            outputs |= latent._asdict()
        named = {name.removeprefix("table_"): part for name, part in inputs.items() if name.startswith("table_")}
        dist = self.actor(feat, self.actor.restore(named), view)
        outputs = {f"{NEXT}{name}": part for name, part in (state._asdict() | outputs).items()}
        return {**dist.named(), "finished": rules.finished(state), **outputs}

    def _moved(self, inputs: dict[str, Tensor], is_first: Tensor, action: Tensor) -> State:
        rules = self.model.rules
        before = rules.state_type(**{name: inputs[name] for name in rules.state_type._fields})
        moved, _ = rules.step(before, action)
        pairs = zip(before, moved, strict=True)
        return rules.state_type(*(_where(is_first, was, now) for was, now in pairs))

    def _inferred(self, inputs: dict[str, Tensor], view: View, is_first: Tensor, action: Tensor) -> Latent:
        nodes, shape = inputs["nodes"], action.shape
        embed = self.model.routing_encoder(nodes, view).flatten(0, 1)
        before = Latent(inputs["deter"].flatten(0, 1), inputs["stoch"].flatten(0, 1))
        moved = take_nodes(nodes, action).flatten(0, 1)
        after, _ = self.model.rssm.observe_step(before, moved, embed, is_first.flatten(), None)
        return Latent(*(part.unflatten(0, shape) for part in after))


class RoutingExport(Export):
    """Two graphs, `encode` and `step`, for any number of instances, of tours of each and of nodes."""

    def __init__(self, agent: Dreamer) -> None:
        """Take the agent.

        Raises:
            UserError: it trained no policy.
        """
        if not agent.trains_policy:
            raise UserError("this run trained no policy (imag_policy: 0), and a solver is no graph")
        assert isinstance(agent.task, RoutingTask)
        self._agent, self._rules = agent, agent.task.rules
        self._takes_any = agent.behavior.actor.takes(NODES) and agent.behavior.actor.takes(NODES + 1)
        self.beside = Path(__file__).with_name("solve_onnx.py") if self._rules.name == "tsp" else None

    @property
    def graphs(self) -> Sequence[Graph]:
        encode, step = Encode(self._agent), Step(self._agent)
        instance = self._drawn(INSTANCES, NODES if self._takes_any else self._agent.task.num_actions)
        start = torch.zeros((INSTANCES, TOURS), dtype=torch.long, device=instance.coords.device)
        read = {**self._rules.parts_of(instance), "start": start}
        with torch.no_grad():
            known = _known(encode(read)) | _first(start)
        return (
            Graph("encode", encode, read, self._varying(read)),
            Graph("step", step, known, self._varying(known)),
        )

    def _varying(self, parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Instances and tours, and nodes where the actor takes any number: known by their sizes in the example."""
        sizes = {INSTANCES, TOURS}
        if self._takes_any:
            sizes |= {NODES, NODES * self._agent.behavior.actor.heads}
        return {
            name: tuple(axis for axis, size in enumerate(part.shape) if size in sizes and (name, axis) not in FIXED)
            for name, part in parts.items()
        }

    def verify(self, runs: Mapping[str, Run]) -> Agreement:
        found: list[Agreement] = []
        encode, step = (graph.module for graph in self.graphs)
        own = self._agent.task.num_actions
        while sum(each.steps for each in found) < VERIFIED_STEPS:
            instances, tours = COMPARED[len(found) % len(COMPARED)]
            instance = self._drawn(instances, own + len(found) % 5 if self._takes_any else own, seed=len(found))
            start = torch.arange(tours, device=instance.coords.device).expand(instances, tours).contiguous()
            read = {**self._rules.parts_of(instance), "start": start}
            found += self._compare(runs, encode, step, read)
        return together(found)

    @torch.no_grad()
    def _compare(
        self, runs: Mapping[str, Run], encode: nn.Module, step: nn.Module, read: dict[str, Tensor]
    ) -> list[Agreement]:
        """Tours of some instances: at each step, graph and module see the same."""
        known = _known(encode(read)) | _first(read["start"])
        theirs = runs["encode"]({name: part.numpy() for name, part in read.items()})
        fixed = {name: part for name, part in theirs.items() if not name.startswith(NEXT)}
        found = []
        while True:
            ours = step(known)
            told = runs["step"]({**{name: part.numpy() for name, part in known.items()}, **fixed})
            latent = [f"{NEXT}stoch"] if f"{NEXT}stoch" in ours else []
            found.append(compared(ours, told, told=["logits"], latent=latent))
            for name in self._rules.state_type._fields:
                assert (ours[f"{NEXT}{name}"].numpy() == told[f"{NEXT}{name}"]).all(), "rules are exact"
            if bool(ours["finished"].all()):
                return found
            known |= _known(ours)
            known["prev_action"] = ours["logits"].argmax(-1)
            known["is_first"] = torch.zeros_like(known["is_first"])

    def facts(self) -> dict[str, Any]:
        return {
            "problem": self._rules.name,
            "nodes": "any number" if self._takes_any else self._agent.task.num_actions,
            "trained_on_nodes": self._agent.task.num_actions,
            "starts_anywhere": self._rules.starts_anywhere,
            **self._units(),
        }

    def _units(self) -> dict[str, str]:
        if self._rules.shows_costs:
            return {"costs": "float32, from each node (row) to each (column), in any unit; 0 from a node to itself"}
        return {"coordinates": "float32, scaled so that the instance fills the unit square"}

    def _drawn(self, count: int, nodes: int, *, seed: int = 0) -> Instance:
        generator = torch.Generator(self._agent.device).manual_seed(seed)
        return self._rules.random(count, nodes, generator=generator, device=self._agent.device)


def _model(agent: Dreamer) -> RoutingModel:
    assert isinstance(agent.model, RoutingModel)
    return agent.model


def _where(condition: Bool[Tensor, "B Q"], chosen: Tensor, other: Tensor) -> Tensor:
    """One or the other, of [B, Q, ...]."""
    condition = condition.view(*condition.shape, *[1] * (chosen.ndim - 2))
    # ONNX Runtime chooses among numbers, but not among truth values.
    if chosen.dtype == torch.bool:
        return (condition & chosen) | (~condition & other)
    return torch.where(condition, chosen, other)


def _first(start: Int[Tensor, "B Q"]) -> dict[str, Tensor]:
    """What a first step takes in place of an action."""
    return {"prev_action": start, "is_first": torch.ones_like(start, dtype=torch.bool)}


def _known(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step takes of the outputs before it."""
    return {name.removeprefix(NEXT): part for name, part in outputs.items() if name not in ("logits", "finished")}
