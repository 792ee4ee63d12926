"""What the gymnasium environments of all routing problems share, on top of their batched rules."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from jaxtyping import Bool
from torch import Tensor

from envs.legal_actions import LegalActions
from routing.cost_world import Hidden, hidden_factors
from routing.rules import MIN_NODES, Instance, Rules, State


class RoutingEnv(gymnasium.Env, ABC):
    """One routing instance at a time, stepped by the batched rules with a batch of one.

    An action is the next node. The reward is minus the leg's cost, so that the return of an episode is minus the
    length of its tour. `info["action_mask"]` and `action_masks()` repeat the observation's `action_mask`.

    A problem is added by a subclass that says where instances come from: `_own_instance` and `_random_instance`.
    Factors that the rules' cost world hides are drawn at every reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    _instance: Instance
    _state: State
    _hidden: Hidden | None
    _tour: list[int]
    _first_mask: np.ndarray

    def __init__(self, rules: type[Rules], *, num_nodes: int, seed: int | None, render_mode: str | None):
        if num_nodes < MIN_NODES:
            raise ValueError(f"num_nodes is {num_nodes}; a tour needs at least {MIN_NODES} nodes")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode is {render_mode!r}; it can be None or one of {self.metadata['render_modes']}"
            )
        self.rules = rules
        self.num_nodes = num_nodes
        self.render_mode = render_mode
        self.observation_space = rules.costs.observation_space(rules.observation_space(num_nodes), num_nodes)
        self.action_space = LegalActions(
            num_nodes, action_masks=self.action_masks, first_masks=self._first_masks, seed=seed
        )
        self._first_seed = seed
        self._begun = False

    @abstractmethod
    def _own_instance(self, options: dict[str, Any]) -> Instance | None:
        """The instance given to `reset(options=...)`, a batch of one; None where the options hold none."""

    @abstractmethod
    def _random_instance(self) -> Instance:
        """A new instance, a batch of one, drawn from `self.np_random`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode: on the instance in `options` if there is one, else on a random one.

        Raises:
            ValueError: the options hold an unknown key or an impossible instance; the episode in progress goes on.
        """
        own_instance = self._own_instance(options or {})
        if own_instance is not None:
            self.rules.costs.validate(own_instance)
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        super().reset(seed=seed)
        self._instance = self._random_instance() if own_instance is None else own_instance
        self._state = self.rules.reset(self._instance)
        factors = None
        if self.rules.costs.hidden:
            drawn = self.np_random.uniform(size=(1, self.rules.costs.hidden))
            factors = torch.from_numpy(drawn.astype(np.float32))
        self._hidden = Hidden.begin(factors, self._state.current)
        self._tour = [int(self._state.current)]
        self._begun = True
        self._first_mask = self.action_masks()
        return self._observe()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move to node `action`.

        Raises:
            ResetNeeded: no episode has begun, or it is over.
            ValueError: the action is not a legal node; the state is unchanged.
        """
        if not self._begun:
            raise ResetNeeded("step() before the first episode: call reset()")
        if bool(self.rules.finished(self._state)):
            raise ResetNeeded("step() after the end of the episode: call reset()")
        node = self._legal_node(action)
        moves = torch.tensor([node], device=self._state.current.device)
        cost = self.rules.cost(self._instance, self._state, moves, *hidden_factors(self._hidden))
        if self._hidden is not None:
            factors = self.rules.costs.drifted(self._hidden.factors, self._noise)
            self._hidden = Hidden(factors, self._state.current, cost)
        self._state, finished = self.rules.step(self._state, moves)
        self._tour.append(node)
        obs, info = self._observe()
        return obs, -float(cost), bool(finished), False, info

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.from_numpy(self.np_random.standard_normal(shape).astype(np.float32))

    def action_masks(self) -> Bool[np.ndarray, " N"]:
        """True where a node may be visited next.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no action is legal before the first episode: call reset()")
        return self.rules.action_mask(self._state)[0].numpy()

    def _first_masks(self) -> Bool[np.ndarray, " N"]:
        return self._first_mask

    def render(self) -> np.ndarray:
        """Draw the tour so far, as an image `[H, W, 3]` of uint8.

        Raises:
            ValueError: the environment was made without a render mode.
            ResetNeeded: no episode has begun.
        """
        # matplotlib takes half a second to import, and most environments are never drawn.
        from routing.drawing import draw_tour

        if self.render_mode is None:
            raise ValueError('render() needs an environment made with render_mode="rgb_array"')
        if not self._begun:
            raise ResetNeeded("nothing to draw before the first episode: call reset()")
        return draw_tour(self._instance.coords[0].numpy(), np.array(self._tour), visited_only=True)

    def _legal_node(self, action: Any) -> int:
        legal_nodes = np.flatnonzero(self.action_masks()).tolist()
        try:
            node = operator.index(action)
        except TypeError:
            raise ValueError(f"action {action!r} is not an integer; legal nodes: {legal_nodes}") from None
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node {node} is outside 0..{self.num_nodes - 1}; legal nodes: {legal_nodes}")
        if node not in legal_nodes:
            raise ValueError(f"node {node} is not legal now; legal nodes: {legal_nodes}")
        return node

    def _observe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # Copies, since callers keep what they are given; `[()]` turns an array without dimensions into a scalar.
        shown = self.rules.observe(self._instance, self._state)
        shown |= self.rules.costs.evidence(self._hidden)
        obs = {key: value[0].numpy().copy()[()] for key, value in shown.items()}
        return obs, {"action_mask": self.action_masks()}


def require_known(options: dict[str, Any], *known: str) -> None:
    """Refuse options of `reset` that nobody knows.

    Raises:
        ValueError: there are some.
    """
    unknown = options.keys() - set(known)
    if unknown:
        there_is = f"there is only '{known[0]}'" if len(known) == 1 else f"there are {', '.join(known)}"
        raise ValueError(f"reset() has no options {sorted(unknown)}; {there_is}")
