"""An agent of a gymnasium task as one graph: from what is observed, and the latent before it, to the action."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamer import Dreamer
from envs.tasks import ACTION_MASK, ObservationKey, ObservationTask
from exporting.graphs import NEXT, VERIFIED_STEPS, Agreement, Export, Graph, Run, compared, together
from networks import Latent
from parts.views import View

# What is observed, apart from what an agent remembers.
OBS = "obs/"
ENVIRONMENTS = 5
# Rows to compare with at a time, of which the first shows what a batch of one does.
COMPARED = (1, 9)


class Act(nn.Module):
    """One step of acting by the likeliest action, and the distribution that it is the likeliest of."""

    def __init__(self, agent: Dreamer) -> None:
        super().__init__()
        self.model, self.actor = agent.model, agent.behavior.actor

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Observations by key, the latent and action before them, and `is_first` where nothing comes before."""
        obs = {name.removeprefix(OBS): value for name, value in inputs.items() if name.startswith(OBS)}
        mask = obs.get(ACTION_MASK)
        view = View(None if mask is None else mask[:, None])
        embed = self.model.encode(obs, None, view)
        action = self.model.embed_action(inputs["prev_action"][:, None], None)[:, 0]
        before = Latent(inputs["deter"], inputs["stoch"])
        latent, _ = self.model.rssm.observe_step(before, action, embed, inputs["is_first"], None)
        dist = self.actor(latent.feat()[:, None], None, view)
        told = {name: part[:, 0] for name, part in dist.named().items()}
        return {"action": dist.mode()[:, 0], **told, f"{NEXT}deter": latent.deter, f"{NEXT}stoch": latent.stoch}


class ObservationExport(Export):
    """One graph, `act`, for any number of environments."""

    def __init__(self, agent: Dreamer) -> None:
        """Take the agent."""
        assert isinstance(agent.task, ObservationTask)
        self._agent, self._task = agent, agent.task

    @property
    def graphs(self) -> Sequence[Graph]:
        inputs = {**self._observed(ENVIRONMENTS, seed=0), **self._before(ENVIRONMENTS)}
        return (Graph("act", Act(self._agent), inputs, dict.fromkeys(inputs, (0,))),)

    @torch.no_grad()
    def verify(self, runs: Mapping[str, Run]) -> Agreement:
        found: list[Agreement] = []
        module = self.graphs[0].module
        for rows in COMPARED:
            known = self._before(rows)
            for step in range(VERIFIED_STEPS // sum(COMPARED)):
                inputs = {**self._observed(rows, seed=step), **known}
                ours = module(inputs)
                theirs = runs["act"]({name: part.numpy() for name, part in inputs.items()})
                # The mean of continuous actions is the likeliest one.
                told = ["logits"] if "logits" in ours else ["action", "std"]
                found.append(compared(ours, theirs, told=told, latent=[f"{NEXT}stoch"]))
                known = {name: ours[f"{NEXT}{name}"] for name in ("deter", "stoch")}
                known |= {"prev_action": ours["action"], "is_first": torch.zeros_like(inputs["is_first"])}
        return together(found)

    def facts(self) -> dict[str, Any]:
        keys = {
            f"{OBS}{name}": {"kind": key.kind, "shape": list(key.shape), "dtype": str(key.dtype).removeprefix("torch.")}
            for name, key in self._task.observations.items()
        }
        return {"observations": keys, "actions": {"kind": self._task.actions.kind, "sizes": self._task.actions.sizes}}

    def _before(self, rows: int) -> dict[str, Tensor]:
        """What stands before an episode's first step."""
        state = self._agent.initial_state(rows)
        is_first = torch.ones(rows, dtype=torch.bool, device=self._agent.device)
        return {"deter": state["deter"], "stoch": state["stoch"], "prev_action": state["action"], "is_first": is_first}

    def _observed(self, rows: int, *, seed: int) -> dict[str, Tensor]:
        """Observations such as there may be; of those that are never like these, the graph does the same sums."""
        generator = torch.Generator(self._agent.device).manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand((rows, *shape), generator=generator, device=self._agent.device)

        def drawn(key: ObservationKey) -> Tensor:
            if key.kind == "classes":
                most = torch.tensor(key.classes, device=self._agent.device)
                return (uniform(*key.shape) * most).long()
            if key.dtype == torch.bool:
                return uniform(*key.shape) < 0.5
            if key.dtype == torch.uint8:
                return (256 * uniform(*key.shape)).to(torch.uint8)
            return 4 * uniform(*key.shape) - 2

        obs = {f"{OBS}{name}": drawn(key) for name, key in self._task.observations.items()}
        if self._task.actions.masked:
            mask = uniform(self._task.num_actions) < 0.5
            mask[:, -1] |= ~mask.any(-1)
            obs[f"{OBS}{ACTION_MASK}"] = mask
        return obs
