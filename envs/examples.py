"""Small tasks that an agent must be able to learn: one for memory, one for pixels, one for action masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from envs.tasks import MaskRules

WALL, FLOOR, AGENT, GOAL = np.array([[44, 48, 56], [226, 228, 232], [40, 100, 220], [50, 170, 80]], dtype=np.uint8)


class TMazeEpisode(NamedTuple):
    """A walk through the T-maze: the cued turn, the cell reached, the turn taken, and the moves so far."""

    cue: int
    cell: int = 0
    turn: int | None = None
    moves: int = 0


class PixelGridEpisode(NamedTuple):
    """Where agent and goal are, as [row, column], and the moves so far."""

    agent: list[int]
    goal: list[int]
    moves: int = 0


class SwitchesEpisode(NamedTuple):
    """What each switch is worth, and which are pressed."""

    values: list[float]
    pressed: list[bool]


class DeepSeaEpisode(NamedTuple):
    """Where the diver is."""

    row: int = 0
    column: int = 0


Episode = TypeVar("Episode", TMazeEpisode, PixelGridEpisode, SwitchesEpisode, DeepSeaEpisode)


class ExampleEnv(gymnasium.Env, ABC, Generic[Episode]):
    """What the examples share: refusing what cannot be done, and resuming exactly.

    A subclass says how an episode begins, moves and looks; one NamedTuple of plain values is all that it is.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_space: spaces.Discrete
    episode_type: type[Episode]

    def __init__(self, *, render_mode: str | None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}; it can be None or 'rgb_array'")
        self.render_mode = render_mode
        self._running_episode: Episode | None = None
        self._ended = False

    @abstractmethod
    def _begin(self) -> Episode:
        """A new episode, drawn from `self.np_random`."""

    @abstractmethod
    def _move(self, episode: Episode, action: int) -> tuple[Episode, float, bool, bool]:
        """The episode after a legal action, the reward, and whether it is terminated and whether truncated."""

    @abstractmethod
    def _observe(self) -> Any:
        """What the agent sees now."""

    @abstractmethod
    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """What a person sees now."""

    def _info(self) -> dict[str, Any]:
        return {}

    def _legal_actions(self) -> list[int]:
        return list(range(int(self.action_space.n)))

    @property
    def episode(self) -> Episode:
        """The episode that runs or has just ended; ResetNeeded where none has begun."""
        if self._running_episode is None:
            raise ResetNeeded("no episode has begun: call reset()")
        return self._running_episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. There are no options: any is a ValueError."""
        if options:
            raise ValueError(f"reset() has no options, got {sorted(options)}")
        super().reset(seed=seed)
        self._running_episode, self._ended = self._begin(), False
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action.

        Raises:
            ResetNeeded: no episode has begun, or it is over.
            ValueError: the action is not legal now; the state is unchanged.
        """
        episode = self.episode
        if self._ended:
            raise ResetNeeded("step() after the end of the episode: call reset()")
        if not self.action_space.contains(action) or int(action) not in self._legal_actions():
            raise ValueError(f"action {action!r} is not legal now; legal actions: {self._legal_actions()}")
        self._running_episode, reward, terminated, truncated = self._move(episode, int(action))
        self._ended = terminated or truncated
        return self._observe(), reward, terminated, truncated, self._info()

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Draw the state; ValueError in an environment made without a render mode."""
        if self.render_mode is None:
            raise ValueError('render() needs an environment made with render_mode="rgb_array"')
        return self._draw()

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, in plain numbers, strings, lists and dicts."""
        episode = None if self._running_episode is None else self._running_episode._asdict()
        return {"rng": self.np_random.bit_generator.state, "episode": episode, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, in an environment made with the same arguments."""
        episode = state_dict["episode"]
        self.np_random.bit_generator.state = state_dict["rng"]
        self._running_episode = None if episode is None else self.episode_type(**episode)
        self._ended = state_dict["ended"]


class TMazeEnv(ExampleEnv[TMazeEpisode]):
    """To be learnt: to remember. Registered as `TMaze-v0`.

    A corridor of `length` cells ends at a junction. The first observation, and no other, holds a cue: left or right.
    Turning that way at the junction gives 1, the other way 0, and ends the episode; it is truncated after
    `4 * length` moves. So the mean return is the share of successes: 1 at best, and 0.5 at best without memory, since
    all that is seen at the junction is that it is the junction, and nothing done before leaves a trace in the maze.

    Observation: [cue is left, cue is right, at the junction], each 0 or 1.
    Actions: 0 left, 1 right, 2 forward. What leads into a wall (turning in the corridor, going on at the junction) is a
    move that stays.
    """

    LEFT, RIGHT, FORWARD = range(3)
    CELL_PIXELS = 16
    episode_type = TMazeEpisode

    def __init__(self, *, length: int = 6, render_mode: str | None = None):
        if length < 1:
            raise ValueError(f"length is {length}; the corridor needs at least 1 cell")
        super().__init__(render_mode=render_mode)
        self.length = length
        self.observation_space = spaces.Box(0, 1, (3,), np.float32)
        self.action_space = spaces.Discrete(3)

    def _begin(self) -> TMazeEpisode:
        return TMazeEpisode(cue=int(self.np_random.integers(2)))

    def _move(self, episode: TMazeEpisode, action: int) -> tuple[TMazeEpisode, float, bool, bool]:
        moves = episode.moves + 1
        if episode.cell == self.length and action != self.FORWARD:
            return episode._replace(turn=action, moves=moves), float(action == episode.cue), True, False
        cell = episode.cell + (episode.cell < self.length and action == self.FORWARD)
        return episode._replace(cell=cell, moves=moves), 0.0, False, moves == 4 * self.length

    def _observe(self) -> Float[np.ndarray, "3"]:
        cue, cell, _, moves = self.episode
        return np.array([moves == 0 and cue == side for side in range(2)] + [cell == self.length], dtype=np.float32)

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """The maze from above, walked from left to right. The cued arm is green, for the person who watches."""
        cue, cell, turn, _ = self.episode
        rows = {self.LEFT: 0, None: 1, self.RIGHT: 2}
        cells = np.tile(WALL, (3, self.length + 1, 1))
        cells[1] = cells[:, -1] = FLOOR
        cells[rows[cue], -1] = GOAL
        cells[rows[turn], cell] = AGENT
        return _enlarge(cells, self.CELL_PIXELS)


class PixelGridEnv(ExampleEnv[PixelGridEpisode]):
    """To be learnt: to find a goal on a picture. Registered as `PixelGrid-v0`.

    An agent (blue) and a goal (green) start on two different random cells of 5x5. Every move costs 0.01, reaching the
    goal gives 1 and ends the episode, which is truncated after 50 moves. Shortest paths have 10/3 moves on average,
    so that the best mean return is 1 - 0.01 * 10/3 = 0.967; actions drawn uniformly have 0.299.

    Observation: the picture, 64x64x3 of uint8.
    Actions: 0 up, 1 right, 2 down, 3 left. A move into the wall stays.
    """

    SIZE, CELL_PIXELS, BORDER_PIXELS = 5, 12, 2
    SIDE_PIXELS = SIZE * CELL_PIXELS + 2 * BORDER_PIXELS
    TIME_LIMIT = 50
    MOVE_COST = 0.01
    DIRECTIONS = ((-1, 0), (0, 1), (1, 0), (0, -1))
    episode_type = PixelGridEpisode

    def __init__(self, *, render_mode: str | None = None):
        super().__init__(render_mode=render_mode)
        self.observation_space = spaces.Box(0, 255, (self.SIDE_PIXELS, self.SIDE_PIXELS, 3), np.uint8)
        self.action_space = spaces.Discrete(4)

    def _begin(self) -> PixelGridEpisode:
        agent, goal = self.np_random.choice(self.SIZE**2, size=2, replace=False).tolist()
        return PixelGridEpisode(agent=[*divmod(agent, self.SIZE)], goal=[*divmod(goal, self.SIZE)])

    def _move(self, episode: PixelGridEpisode, action: int) -> tuple[PixelGridEpisode, float, bool, bool]:
        steps = zip(episode.agent, self.DIRECTIONS[action], strict=True)
        agent = [min(max(place + change, 0), self.SIZE - 1) for place, change in steps]
        moves = episode.moves + 1
        found = agent == episode.goal
        timed_out = moves == self.TIME_LIMIT and not found
        return episode._replace(agent=agent, moves=moves), found - self.MOVE_COST, found, timed_out

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        agent, goal, _ = self.episode
        image = np.tile(WALL, (self.SIDE_PIXELS, self.SIDE_PIXELS, 1))
        cells = np.tile(FLOOR, (self.SIZE, self.SIZE, 1))
        cells[*goal] = GOAL
        cells[*agent] = AGENT
        inside = slice(self.BORDER_PIXELS, -self.BORDER_PIXELS)
        image[inside, inside] = _enlarge(cells, self.CELL_PIXELS)
        return image

    _observe = _draw


class SwitchesState(NamedTuple):
    """A batch of episodes, as far as their masks go."""

    pressed: Bool[Tensor, "*B n"]


class SwitchesRules:
    """A switch can be pressed once. When all are pressed every action is open, and changes nothing."""

    def restore(self, obs: dict[str, Tensor]) -> SwitchesState:
        """The state that an observation shows."""
        return SwitchesState(pressed=obs["pressed"].bool())

    def action_mask(self, state: SwitchesState) -> Bool[Tensor, "*B n"]:
        """True where a switch can be pressed; all True at the end."""
        return ~state.pressed | state.pressed.all(-1, keepdim=True)

    def step(self, state: SwitchesState, action: Int[Tensor, "*B"]) -> SwitchesState:
        """The state after pressing switch `action`."""
        return SwitchesState(pressed=state.pressed.scatter(-1, action[..., None], True))


class SwitchesEnv(ExampleEnv[SwitchesEpisode]):
    """To be learnt: the best order, under a mask. Registered as `Switches-v0` and, without rules, `SwitchesNoRules-v0`.

    Each of n switches has a value, uniform in [-1, 1]; each step presses one that is not pressed yet, and the episode
    ends when all are. Pressing is rewarded with the value times a weight that falls with every press:
    6 k / (n (n - 1)) with k switches still open. So the best order is by falling value, and the weights are such
    that its mean return is 1 for every n; a random order has mean return 0, the worst -1.

    Observation: `values`, `pressed` and `action_mask` (True where a switch can be pressed), which `info["action_mask"]`
    and `action_masks()` repeat. When all are pressed the mask is all True, so that it is never empty.
    Actions: the switch to press. A switch that is pressed already is refused.

    Args:
        num_switches: n.
        rules: whether the environment says by which rules its mask changes, in `mask_rules`.
        render_mode: None, or "rgb_array".
    """

    CELL_PIXELS = 16
    episode_type = SwitchesEpisode
    mask_rules: MaskRules | None = SwitchesRules()

    def __init__(self, *, num_switches: int = 6, rules: bool = True, render_mode: str | None = None):
        if num_switches < 2:
            raise ValueError(f"num_switches is {num_switches}; an order needs at least 2")
        super().__init__(render_mode=render_mode)
        if not rules:
            self.mask_rules = None
        self.num_switches = num_switches
        # Box takes bool when running; its annotations know floats only.
        self.observation_space = spaces.Dict(
            {
                "values": spaces.Box(-1, 1, (num_switches,), np.float32),
                "pressed": spaces.MultiBinary(num_switches),
                "action_mask": spaces.Box(0, 1, (num_switches,), np.bool_),  # type: ignore[arg-type]
            }
        )
        self.action_space = spaces.Discrete(num_switches)

    def action_masks(self) -> Bool[np.ndarray, " n"]:
        """True where a switch can be pressed; all True at the end."""
        pressed = np.array(self.episode.pressed)
        return ~pressed | pressed.all()

    def _legal_actions(self) -> list[int]:
        return np.flatnonzero(self.action_masks()).tolist()

    def _begin(self) -> SwitchesEpisode:
        values = self.np_random.uniform(-1, 1, self.num_switches).tolist()
        return SwitchesEpisode(values=values, pressed=[False] * self.num_switches)

    def _move(self, episode: SwitchesEpisode, action: int) -> tuple[SwitchesEpisode, float, bool, bool]:
        weight = 6 * episode.pressed.count(False) / (self.num_switches * (self.num_switches - 1))
        pressed = [was or switch == action for switch, was in enumerate(episode.pressed)]
        return episode._replace(pressed=pressed), weight * episode.values[action], all(pressed), False

    def _observe(self) -> dict[str, np.ndarray]:
        values, pressed = self.episode
        return {
            "values": np.array(values, dtype=np.float32),
            "pressed": np.array(pressed, dtype=np.int8),
            "action_mask": self.action_masks(),
        }

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks()}

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """Values from black to white, and below them in green what is pressed."""
        values, pressed = self.episode
        greys = (np.array(values)[:, None] + 1) / 2 * np.full(3, 255)
        lamps = np.where(np.array(pressed)[:, None], GOAL, WALL)
        return _enlarge(np.stack((greys.astype(np.uint8), lamps)), self.CELL_PIXELS)


def _enlarge(cells: UInt8[np.ndarray, "R C 3"], pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """Every cell as a square of that many pixels."""
    return cells.repeat(pixels, axis=0).repeat(pixels, axis=1)
