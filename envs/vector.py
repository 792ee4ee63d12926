"""Thousands of routing instances at once, stepped as tensors on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from config import UserError
from envs.crashes import Crash
from routing.cost_world import Hidden, hidden_factors
from routing.rules import MIN_NODES, Instance, Parts, Rules, State, each_part, single_precision
from system.arrivals import Arrival

Transition = tuple[dict[str, Tensor], Float[Tensor, " E"], Bool[Tensor, " E"], Bool[Tensor, " E"], dict[str, Any]]


class RoutingVectorEnv(VectorEnv):
    """A gymnasium vector environment whose observations, rewards and flags are tensors on `device`.

    Autoreset is NEXT_STEP: the step after a row's episode has ended ignores the row's action and returns the first
    observation of its next instance, with reward 0. Every `info` holds

    - `action_mask` and `is_first`: tensors with one row per environment;
    - `decisions`: int, the rows that moved in this step (rows that were reset did not);
    - `any_first`: bool, whether any observation is the first of its episode.

    The last two are known without asking the device wherever every episode has the same length, because all rows then
    run in lockstep. Under other rules one number comes to the host with every step and is read in the next, when the
    device has long had other work.

    Args:
        rules: the problem.
        num_envs: rows.
        num_nodes: nodes of every instance.
        curriculum: nodes of the instances drawn, with how many decisions they last; None: for ever. All are padded to
            `num_nodes`, and observations have `valid`. Empty: every instance has `num_nodes`.
        device: where everything lives.
        generator: draws the instances, of the field's usual distribution. It lives on `device` and belongs to the
            caller; only `reset(seed=...)` reseeds it.
        instances: what to use in every episode instead of drawing any: an instance of each row, or its coordinates
            where they are all there is to it.
        factors: with instances, what their costs depend on where the rules' cost world hides anything; otherwise it is
            drawn for every episode.
        check_actions: refuse illegal actions, at the price of one wait for the device per step.

    Raises:
        ValueError: too few nodes, neither or both of generator and instances, a curriculum with instances or with more
            nodes, or instances of another shape or that are impossible.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    # Parts of `state_dict` that must have the shapes of this environment's own; later versions added counts.
    tensor_parts = ("instance", "state", "hidden", "ended")
    # Nothing ever goes wrong, so that there is nothing to read.
    notices: list[str]
    crashes: list[Crash]

    _instance: Instance
    _state: State
    _hidden: Hidden | None

    def __init__(
        self,
        rules: type[Rules],
        *,
        num_envs: int,
        num_nodes: int,
        curriculum: Sequence[tuple[int, int | None]] = (),
        device: torch.device | str,
        generator: torch.Generator | None = None,
        instances: Instance | Float[Tensor, "E N 2"] | None = None,
        factors: Float[Tensor, "E F"] | None = None,
        check_actions: bool = False,
    ):
        if num_nodes < MIN_NODES:
            raise UserError(f"num_nodes is {num_nodes}; a tour needs at least {MIN_NODES} nodes")
        if (generator is None) == (instances is None):
            raise ValueError("give either a generator, to draw instances with, or the instances themselves")
        sizes = [nodes for nodes, _ in curriculum]
        if curriculum and (instances is not None or not MIN_NODES <= min(sizes) <= max(sizes) <= num_nodes):
            raise ValueError(
                f"curriculum is {list(curriculum)}: it draws instances of {MIN_NODES} to {num_nodes} nodes, and takes"
                " none that are given"
            )
        fixed: Instance = rules.instance_type(coords=instances) if isinstance(instances, Tensor) else instances
        if fixed is not None and fixed.coords.shape != (num_envs, num_nodes, 2):
            raise ValueError(f"instances has shape {tuple(fixed.coords.shape)}, not {(num_envs, num_nodes, 2)}")
        if fixed is not None:
            rules.validate(fixed)
            rules.costs.validate(fixed)
            fixed = single_precision(each_part(fixed, lambda part: part.to(device)))
        expected = (num_envs, rules.costs.hidden) if rules.costs.hidden and fixed is not None else None
        given = None if factors is None else tuple(factors.shape)
        if given != expected:
            raise ValueError(f"factors has shape {given}, not {expected}, for costs of {rules.costs.name}")
        self.notices, self.crashes = [], []
        self.rules = rules
        self.num_envs = num_envs
        self.num_nodes = num_nodes
        self.device = torch.device(device)
        self.generator = generator
        self.check_actions = check_actions
        self.curriculum = tuple(curriculum)
        for nodes in sizes:
            # A size that the problem does not have is refused here, and not in mid-run.
            rules.observation_space(nodes)
        shown = rules.costs.observation_space(rules.observation_space(num_nodes), num_nodes)
        if self.curriculum:
            validity = spaces.Box(0, 1, (num_nodes,), np.bool_)  # type: ignore[arg-type]
            assert isinstance(shown, spaces.Dict)
            shown = spaces.Dict({**shown.spaces, "valid": validity})
        self.single_observation_space = shown
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = spaces.Discrete(num_nodes)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._fixed = fixed
        self._fixed_factors = None if factors is None else factors.to(self.device, torch.float32)
        # The costs of given episodes drift in the same way each time, on any device.
        self._drifts = torch.Generator("cpu").manual_seed(0) if generator is None else generator
        self._begun = False
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._note_ended()
        self._lockstep_moves = 0
        # The nodes of the running episodes, where all have one length.
        self._lockstep_nodes = num_nodes
        self._decisions = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Begin a new episode in every row.

        Raises:
            ValueError: options were given; there are none.
        """
        if options:
            raise ValueError(f"reset() has no options, got {sorted(options)}; pass instances to the constructor")
        if seed is not None and self.generator is not None:
            self.generator.manual_seed(seed)
        self._begin_all()
        self._note_ended()
        obs = self.observe()
        return obs, _info(obs, is_first=torch.ones_like(self._ended), decisions=0, any_first=True)

    def step(self, actions: Int[Tensor, " E"]) -> Transition:
        """Move every row to its node in `actions`; rows whose episode has ended begin their next one instead.

        Raises:
            ResetNeeded: no episode has begun.
            ValueError: with `check_actions`, an action is illegal; the state is unchanged.
        """
        if not self._begun:
            raise ResetNeeded("step() before the first episode: call reset()")
        if self.check_actions:
            self._refuse_illegal(actions)
        ended = self._ended
        num_ended = self._count_ended()
        if num_ended == self.num_envs:
            self._begin_all()
            reward = torch.zeros(self.num_envs, device=self.device)
        elif num_ended == 0:
            reward = self._move(actions)
        else:
            # Rows about to be replaced stay where they are: their action may be anything.
            reward = self._move(torch.where(ended, self._state.current, actions)).masked_fill(ended, 0.0)
            instance, state, hidden = self._next_episodes()
            self._instance = _select(ended, instance, self._instance)
            self._state = _select(ended, state, self._state)
            self._hidden = hidden and self._hidden and _select(ended, hidden, self._hidden)
            self._ended = self._ended & ~ended
        self._note_ended()
        self._decisions += self.num_envs - num_ended
        obs = self.observe()
        info = _info(obs, is_first=ended, decisions=self.num_envs - num_ended, any_first=num_ended > 0)
        return obs, reward, self._ended, torch.zeros_like(ended), info

    def observe(self) -> dict[str, Tensor]:
        """The observation that the last `reset` or `step` returned, or that `load_state_dict` restored.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no observation before the first episode: call reset()")
        return self.rules.observe(self._instance, self._state) | self.rules.costs.evidence(self._hidden)

    @property
    def all_ended(self) -> bool:
        """Whether the episode of every row has ended; known without waiting where episodes have one length."""
        return self._count_ended() == self.num_envs

    def action_masks(self) -> Bool[Tensor, "E N"]:
        """True where a row may go next."""
        return self.observe()["action_mask"]

    def counters(self) -> dict[str, int]:
        """What has gone wrong so far, by the name of its metric: nothing ever does."""
        return {}

    def take_lost(self) -> Bool[Tensor, " E"]:
        """The rows whose running episode was lost to an evaluation: evaluations play in instances of their own."""
        return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def ended_episodes(self, rows: Int[Tensor, " R"]) -> tuple[Instance, Float64[np.ndarray, "R N N"]]:
        """Instances of rows whose episodes have ended, and what every move would have cost there: for the log alone."""
        instance = each_part(self._instance, lambda part: part[rows])
        factors = None if self._hidden is None else self._hidden.factors[rows]
        return instance, self.rules.costs.matrix(instance, factors).double().cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, except the generator, which is the caller's to save.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no state before the first episode: call reset()")
        return {
            "instance": self._instance._asdict(),
            "state": self._state._asdict(),
            "hidden": None if self._hidden is None else self._hidden._asdict(),
            "ended": self._ended,
            "lockstep_moves": self._lockstep_moves,
            "lockstep_nodes": self._lockstep_nodes,
            "decisions": self._decisions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: it was taken with another number of environments or nodes, or in another cost world.
        """
        saved_size = tuple(state_dict["instance"]["coords"].shape[:2])
        if saved_size != (self.num_envs, self.num_nodes):
            raise UserError(
                f"the saved state has (environments, nodes) = {saved_size}, "
                f"this environment {(self.num_envs, self.num_nodes)}"
            )

        def on_device(part: Tensor) -> Tensor:
            return part.to(self.device)

        instance = self.rules.instance_type(**state_dict["instance"])
        if (instance.valid is not None) != bool(self.curriculum):
            raise UserError("the saved state has a curriculum and this environment none, or the other way round")
        self.rules.costs.validate(instance)
        self._instance = each_part(instance, on_device)
        self._state = each_part(self.rules.state_type(**state_dict["state"]), on_device)
        # A checkpoint of a version without cost worlds has none.
        hidden = state_dict.get("hidden")
        self._hidden = None if hidden is None else each_part(Hidden(**hidden), on_device)
        self._ended = state_dict["ended"].to(self.device)
        self._note_ended()
        self._lockstep_moves = state_dict["lockstep_moves"]
        # Checkpoints of versions without a curriculum lack these.
        self._lockstep_nodes = state_dict.get("lockstep_nodes", self.num_nodes)
        self._decisions = state_dict.get("decisions", 0)
        self._begun = True

    def _begin_all(self) -> None:
        self._lockstep_nodes = self.next_nodes
        self._instance, self._state, self._hidden = self._next_episodes()
        self._ended = torch.zeros_like(self._ended)
        self._lockstep_moves = 0
        self._begun = True

    def _move(self, actions: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
        """Step every row, and return the rewards."""
        actions = actions.long()
        cost = self.rules.cost(self._instance, self._state, actions, *hidden_factors(self._hidden))
        if self._hidden is not None:
            factors = self.rules.costs.drifted(self._hidden.factors, self._noise)
            self._hidden = Hidden(factors, self._state.current, cost)
        self._state, self._ended = self.rules.step(self._state, actions)
        self._lockstep_moves += 1
        return -cost

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._drifts, device=self._drifts.device).to(self.device)

    def _next_episodes(self) -> tuple[Instance, State, Hidden | None]:
        instance, factors = self._fixed, self._fixed_factors
        if instance is None:
            assert self.generator is not None
            instance = self.rules.random(self.num_envs, self.next_nodes, generator=self.generator, device=self.device)
            if self.curriculum:
                instance = self.rules.pad(instance, self.num_nodes)
            factors = self.rules.costs.draw(self.num_envs, generator=self.generator, device=self.device)
        state = self.rules.reset(instance)
        return instance, state, Hidden.begin(factors, state.current)

    @property
    def next_nodes(self) -> int:
        """Nodes of the next instance that is drawn, padding not counted."""
        left = self._decisions
        for nodes, steps in self.curriculum:
            if steps is None or left < steps:
                return nodes
            left -= steps
        return self.curriculum[-1][0] if self.curriculum else self.num_nodes

    def _count_ended(self) -> int:
        if self.rules.fixed_length:
            return self.num_envs if self._lockstep_moves == self.rules.episode_steps(self._lockstep_nodes) else 0
        return self._num_ended.read()

    def _note_ended(self) -> None:
        """Send the number of rows whose episode has ended to the host, where it will be asked for."""
        if not self.rules.fixed_length:
            self._num_ended = Arrival(self._ended.sum())

    def _refuse_illegal(self, actions: Int[Tensor, " E"]) -> None:
        in_range = (actions >= 0) & (actions < self.num_nodes)
        mask = self.action_masks()
        legal = in_range & mask.gather(-1, actions.long().clamp(0, self.num_nodes - 1)[:, None])[:, 0]
        refused = (~legal & ~self._ended).nonzero()[:, 0]
        if len(refused):
            row = int(refused[0])
            legal_nodes = mask[row].nonzero()[:, 0].tolist()
            raise ValueError(f"action {int(actions[row])} of row {row} is illegal; legal nodes: {legal_nodes}")


def _info(obs: dict[str, Tensor], *, is_first: Bool[Tensor, " E"], decisions: int, any_first: bool) -> dict[str, Any]:
    return {"action_mask": obs["action_mask"], "is_first": is_first, "decisions": decisions, "any_first": any_first}


def _select(condition: Bool[Tensor, " E"], chosen: Parts, other: Parts) -> Parts:
    """Row by row, `chosen` where the condition holds and `other` elsewhere."""
    others = iter(part for part in other if part is not None)
    return each_part(chosen, lambda a: torch.where(condition.view(-1, *(1,) * (a.dim() - 1)), a, next(others)))
