"""What the training loop and the evaluators know of an agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from config import Config
from guard import Guard
from parts.acting import Sight
from parts.moves import Moves
from tools import Bounds
from training.replay import Replay

# What agents call the player that they are themselves.
POLICY = "policy"


@runtime_checkable
class Player(Protocol):
    """Whatever plays episodes: it acts, and carries a state from step to step."""

    def initial_state(self, num_envs: int) -> dict[str, Any]: ...

    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Any]]: ...


@runtime_checkable
class Trained(Protocol):
    """Whatever a run trains, evaluates and saves.

    `players` are the ways in which it can play, by name: `policy`, which is the agent itself, and maybe others.
    """

    @property
    def players(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Agent(Player, Trained, Protocol):
    """Four verbs (`initial_state`, `act`, `update`, `state_dict`), and what replay must know.

    `memory_spaces` names what replay keeps of the state that `act` returns, and `memory` picks it out; both may be
    empty. An update trains on `rows_per_update` rows, drawn in sequences of `batch_length`.
    """

    rows_per_update: int
    batch_length: int

    @property
    def memory_spaces(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]: ...

    def memory(self, state: dict[str, Any]) -> dict[str, Tensor]: ...

    def update(self, replay: Replay, *, progress: float) -> dict[str, Tensor]: ...


@runtime_checkable
class Portable(Agent, Protocol):
    """An agent that other processes can act for: `acting_modules` are all that it acts by, each under a name."""

    @property
    def acting_modules(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class Practitioner(Trained, Protocol):
    """An agent that makes what it learns from itself: `practise` draws samples, learns from them, and keeps none.

    It gives metrics, and how many steps of the run that was, 0-d. `sees` says what samples are of, in lines to read,
    and `faults` what of it could not be used.
    """

    @property
    def sees(self) -> list[str]: ...

    @property
    def faults(self) -> Sequence[str]: ...

    def practise(self, *, progress: float) -> tuple[dict[str, Tensor], Float[Tensor, ""]]: ...


@runtime_checkable
class MoveLog(Protocol):
    """Moves that somebody has made: a student draws from them, and knows the range of what they earned."""

    @property
    def rewards(self) -> Bounds: ...

    def sample(self, count: int, *, generator: torch.Generator) -> Moves: ...


@runtime_checkable
class Student(Agent, Protocol):
    """An agent that can learn from a log of moves, without any environment.

    `study` is one update, on moves drawn from the log; `expected` is what each member of its ensemble expects moves to
    earn. `require_study` raises a UserError where its settings ask for more than a log has.
    """

    def require_study(self) -> None: ...

    def study(self, log: MoveLog, *, progress: float) -> dict[str, Tensor]: ...

    def expected(self, moves: Moves) -> Float[Tensor, "K M"]: ...


@runtime_checkable
class AgentClass(Protocol):
    """A class of agents, made for the kinds of tasks in `tasks`, each with what it reads of a config."""

    tasks: tuple[type, ...]

    def of(
        self, task: Any, config: Config, *, device: torch.device, generators: dict[str, torch.Generator], guard: Guard
    ) -> Trained: ...
