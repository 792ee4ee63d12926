"""Any gymnasium environment, many at once: in this process or one process each, with tensors on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Float
from torch import Tensor

from config import UserError
from envs.bad_inputs import REWARD, BadInputs
from envs.cases import Cases
from envs.crashes import Crash, EnvironmentCrashed, Restarts
from envs.spaces import ALL_KEYS, NUMPY_DTYPES, action_spec, flattener, left_out, observation_keys, to_env_action
from envs.tasks import ACTION_MASK, BAD_INPUT, NOTICE
from envs.workers import LocalWorker, MakeEnv, ProcessWorker, Worker, WorkerFailure

Transition = tuple[dict[str, Tensor], Float[Tensor, " E"], Bool[Tensor, " E"], Bool[Tensor, " E"], dict[str, Any]]

# The first spawn key of training's seeds. It makes them differ from the seeds of evaluations, whatever the run's seed.
TRAINING = 1

# So many crashes of one environment without a completed step in between end the run, whatever `env_restarts` is.
MAX_CRASHES = 5


class GymVectorEnv:
    """Environments whose observations, rewards and flags are tensors on `device`, one row for each environment.

    Autoreset is NEXT_STEP, as in `RoutingVectorEnv`: the step after a row's episode has ended ignores the row's
    action and returns the first observation of its next episode, with reward 0. Every `info` holds

    - `is_first`: a bool tensor, and `action_mask` where actions are masked (it is in the observation as well);
    - `decisions`: int, the rows that took an action in this step (rows that were reset did not);
    - `any_first`: bool, whether any observation is the first of its episode;
    - `returns` and `lengths`: undiscounted returns and decisions of the episodes that ended in this step;
    - `crashed` and `bad_inputs`: the rows whose episode a crash ended in this step, and those that gave a number that
      was set to 0 or dropped.

    An environment that raises, or whose process dies, raises `EnvironmentCrashed`; or, while `restarts` allows it, is
    replaced by a new one: its episode ends as truncated with the last observation and reward 0, and the next step
    begins another. Every episode begins with
    `env.reset(seed=...)`; the seed comes from (seed, environment, episode number), and is another in an evaluation.

    No number that is NaN, infinite or beyond float32 comes out of here: one in an observation of floats or in a reward
    is refused, set to 0, or dropped with the rest of its episode, which then ends as one that crashed does, in an
    environment that stays. Where a first observation is to be dropped, the row's next episode begins at once.

    Args:
        make_env: makes one environment.
        num_envs: rows.
        device: where the tensors live.
        seed: not negative.
        first_row: which environment of the run the first row is, where others are stepped by other ranks.
        evaluation: begin the episodes of an evaluation, which no training has, whatever its seed.
        processes: run each environment in a process of its own.
        timeout: seconds after which a process that has not answered counts as dead (5 times as many for its first
            answer); 0: none. In this process a call that never returns cannot be ended.
        restarts: how many crashed environments may be replaced; counts on, and may be shared with other vector
            environments of the same run. None: none may.
        zero_keys: a regular expression; where it matches a whole key of the observation, or "reward", numbers that
            are not finite are set to 0.
        drop_keys: the same for episodes to be dropped; comes before `zero_keys`.
        wanted_keys: regular expressions over keys of the observation. What cannot be read is refused where one of them
            matches the whole key, and left out otherwise.

    Attributes:
        spaces: of observations and of actions, as the environments have them.
        observations: what is seen, by flat key, without the action mask.
        left_out: what is not, by flat key, each with the reason.
        actions: what can be done.
        mask_rules: the attribute of this name of the environment, or None.
        name: of the environment: its id, or its class where it has none.
        restarts: how many crashed environments were replaced so far.
        crashes: what is known of each of them. Whoever writes it down empties the list.
        notices: lines that the user should read, such as an environment's first crash. Whoever prints them empties
            the list.

    Raises:
        UserError: no environments, spaces that are not supported, or another argument that cannot be used.
        EnvironmentCrashed: an environment cannot be made.
    """

    # Its state is taken up environment by environment.
    tensor_parts = ()
    crashes: list[Crash]

    def __init__(
        self,
        make_env: MakeEnv,
        *,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        first_row: int = 0,
        evaluation: bool = False,
        processes: bool = False,
        timeout: float = 60.0,
        restarts: Restarts | None = None,
        zero_keys: str = "",
        drop_keys: str = "",
        wanted_keys: Sequence[str] = ALL_KEYS,
    ):
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; at least one environment is needed")
        if timeout < 0:
            raise UserError(f"timeout is {timeout}; it takes seconds, or 0 for none")
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.restarts = Restarts() if restarts is None else restarts
        self.crashes = []
        self.notices: list[str] = []
        self._noticed: set[str] = set()
        self._seed, self._first_row = seed, first_row
        self._cases = Cases(num_envs, seed=seed) if evaluation else None
        self._lost = np.zeros(num_envs, np.bool_)
        self._new_worker: Callable[[], Worker] = (
            functools.partial(ProcessWorker, make_env, timeout=timeout)
            if processes
            else functools.partial(LocalWorker, make_env)
        )
        self._workers: list[Worker] = [self._new_worker() for _ in range(num_envs)]
        try:
            # Spaces come from the first environment: what is wrong with them shows before training.
            space, self._action_space, self.mask_rules, self.name = self._workers[0].call("describe")
            self._bad = BadInputs(
                zero_keys=zero_keys, drop_keys=drop_keys, notice_once=self._notice_once, where=self._where
            )
            self.spaces = space, self._action_space
            self.observations, self._flatten = observation_keys(space, wanted=wanted_keys), flattener(space)
            self.left_out = left_out(space)
            self.actions = action_spec(self._action_space, space)
        except WorkerFailure as failure:
            self.close()
            if failure.mistake is not None:
                raise UserError(failure.mistake) from failure
            message = f"the environment cannot be made: {failure}"
            raise EnvironmentCrashed(message, Crash(0, failure.trace)) from failure
        except UserError:
            self.close()
            raise
        self._buffers = {
            name: np.zeros((num_envs, *key.shape), NUMPY_DTYPES[key.dtype]) for name, key in self.observations.items()
        }
        if self.actions.masked:
            self._buffers[ACTION_MASK] = np.zeros((num_envs, *self.actions.sizes), np.bool_)
        # A step writes into one set of buffers; the other holds the observations before it.
        self._buffers_before = {name: buffer.copy() for name, buffer in self._buffers.items()}
        self._number_keys = [name for name, key in self.observations.items() if key.dtype == torch.float32]
        self._begun = False
        # False from the beginning of a step to its end, so that it stays False where a step raises.
        self._settled = True
        self._ended = np.ones(num_envs, np.bool_)
        self._episodes = [0] * num_envs
        self._seeds = [0] * num_envs
        self._returns = np.zeros(num_envs)
        self._lengths = [0] * num_envs
        self._crashes = [0] * num_envs
        self._crashed: list[int] = []

    def reset(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Begin a new episode in every row.

        Raises:
            EnvironmentCrashed: an environment cannot begin its first episode, or crashed too often.
            BadInput: a number is not finite, and its key is in neither `zero_keys` nor `drop_keys`.
            UserError: an observation does not fit its space.
        """
        self._crashed = []
        self._bad.begin_step()
        for row in range(self.num_envs):
            self._ask_reset(row)
        for row in range(self.num_envs):
            self._finish_reset(row)
        for row in self._mend(np.zeros(self.num_envs, np.float32)):
            self._begin_another(row)
        self._ended[:] = False
        self._begun = self._settled = True
        self._note_empty_masks()
        obs = self.observe()
        return obs, self._info(obs, is_first=np.ones_like(self._ended), returns=[], lengths=[])

    def step(self, actions: Tensor) -> Transition:
        """Take every row's action; rows whose episode has ended begin their next one instead.

        Args:
            actions: `[E, ...]`, shaped as `actions.shape`.

        Raises:
            ResetNeeded: no episode has begun.
            EnvironmentCrashed: an environment crashed too often.
            BadInput: a number is not finite, and its key is in neither `zero_keys` nor `drop_keys`.
            UserError: an observation does not fit its space.
        """
        if not self._begun:
            raise ResetNeeded("step() before the first episode: call reset()")
        self._settled = False
        self._crashed = []
        self._bad.begin_step()
        self._buffers, self._buffers_before = self._buffers_before, self._buffers
        is_first = self._ended
        rewards = [0.0] * self.num_envs
        terminated, truncated = np.zeros_like(is_first), np.zeros_like(is_first)
        # All are asked before the first answer is read, so that processes step at the same time.
        for row, action in enumerate(actions.cpu().numpy()):
            if is_first[row]:
                self._ask_reset(row)
            else:
                self._workers[row].send("step", to_env_action(self._action_space, action))
        for row in range(self.num_envs):
            if is_first[row]:
                self._finish_reset(row)
            else:
                rewards[row], terminated[row], truncated[row] = self._finish_step(row)
        with np.errstate(over="ignore"):
            reward = np.array(rewards, np.float32)
        for row in self._mend(reward):
            if is_first[row]:
                self._begin_another(row)
            else:
                self._keep_observation(row)
                reward[row], terminated[row], truncated[row] = 0.0, False, True
        self._returns += reward
        self._ended = terminated | truncated
        self._settled = True
        self._note_empty_masks()
        obs = self.observe()
        ended_rows = np.flatnonzero(self._ended).tolist()
        info = self._info(
            obs,
            is_first=is_first,
            returns=[float(self._returns[row]) for row in ended_rows],
            lengths=[self._lengths[row] for row in ended_rows],
        )
        return obs, self._tensor(reward), self._tensor(terminated), self._tensor(truncated), info

    def observe(self) -> dict[str, Tensor]:
        """The observation that the last `reset` or `step` returned, or that `load_state_dict` restored.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no observation before the first episode: call reset()")
        return {name: self._tensor(buffer) for name, buffer in self._buffers.items()}

    @property
    def bad_inputs(self) -> dict[str, int]:
        """How many observations and rewards were not finite and were set to 0 or dropped so far, by key."""
        return self._bad.counts

    @property
    def all_ended(self) -> bool:
        """Whether the episode of every row has ended."""
        return bool(self._ended.all())

    def state_dict(self) -> dict[str, Any]:
        """What going on needs, as `checkpoint.save` takes it.

        An environment is part of it where `env.unwrapped` has `state_dict()` and `load_state_dict(state)`; a state
        may hold arrays, tensors and plain values, in dicts, lists and tuples. Of the wrappers, the step count of a
        time limit is kept, and the state of those that have the same two methods. After a step that raised, it is the
        state before that step, without the environments.

        Raises:
            ResetNeeded: no episode has begun.
        """
        if not self._begun:
            raise ResetNeeded("no state before the first episode: call reset()")
        environments: list[dict[str, Any] | None] = [None] * self.num_envs
        if self._settled:
            for worker in self._workers:
                worker.send("state")
            environments = [self._finish_state(row) for row in range(self.num_envs)]
        buffers = self._buffers if self._settled else self._buffers_before
        return {
            "num_envs": self.num_envs,
            "environments": environments,
            "obs": {name: torch.from_numpy(buffer.copy()) for name, buffer in buffers.items()},
            "ended": self._ended.tolist(),
            "episodes": list(self._episodes),
            "seeds": list(self._seeds),
            "returns": self._returns.tolist(),
            "lengths": list(self._lengths),
            "restarts": self.restarts.used,
            "bad_inputs": dict(self.bad_inputs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> Bool[Tensor, " E"]:
        """Go on from where `state_dict` was taken. Returns the rows whose running episode is lost.

        Lost are those of environments without a saved state; the next step begins their next episode.

        Raises:
            UserError: it was taken with another number of environments.
        """
        if state_dict["num_envs"] != self.num_envs:
            raise UserError(f"the saved state has {state_dict['num_envs']} environments, not {self.num_envs}")
        self.restarts.used = state_dict["restarts"]
        lost = self._take_up(state_dict)
        if lost.any():
            rows = ", ".join(map(str, np.flatnonzero(lost)))
            self.notices.append(f"running episodes of environments {rows} could not be resumed and end as truncated")
        return self._tensor(lost)

    def _take_up(self, state_dict: dict[str, Any]) -> Bool[np.ndarray, " E"]:
        """Go on from a state. Returns the rows whose running episode is lost."""
        self._episodes, self._lengths = list(state_dict["episodes"]), list(state_dict["lengths"])
        self._returns = np.array(state_dict["returns"], np.float64)
        self._bad.counts = dict(state_dict["bad_inputs"])
        for name, value in state_dict["obs"].items():
            self._buffers[name][:] = value.cpu().numpy()
        saved = state_dict["environments"]
        # Older states have no seeds: their episodes began with seeds that only evaluations use now.
        old = [_seed_of(self._seed, row, episode) for row, episode in enumerate(self._episodes)]
        self._seeds = list(state_dict.get("seeds", old))
        for row, state in enumerate(saved):
            if state is not None:
                self._workers[row].send("load", self._seeds[row], state)
        restored = np.array([state is not None and self._finish_load(row) for row, state in enumerate(saved)])
        ended = np.array(state_dict["ended"])
        lost = ~ended & ~restored
        self._ended = ended | lost
        self._crashes = [0] * self.num_envs
        self._begun = self._settled = True
        return lost

    @property
    def cases(self) -> list[int]:
        """Of an evaluation, which of its episodes each row plays or has ended, counted from 0."""
        assert self._cases is not None, "no evaluation plays here"
        return list(self._cases.of_row)

    def give_up(self, row: int) -> None:
        """Let a row begin its next episode with the next step, though the running one has not ended."""
        self._ended[row] = True

    @contextmanager
    def lent(self, seed: int) -> Iterator[None]:
        """Let an evaluation with this seed play in these environments; then each row goes on from where it was.

        Environments without a saved state lose their running episode, as when a run is resumed; see `take_lost`. What
        is noticed, and which environments crash, is the evaluation's, and forgotten afterwards.
        """
        state = self.state_dict() if self._begun else None
        told = self.notices, self._noticed, self.crashes
        self.notices, self._noticed, self.crashes = [], set(), []
        self._cases = Cases(self.num_envs, seed=seed)
        restored = False
        try:
            yield
            restored = True
        finally:
            self._cases = None
            self.notices, self._noticed, self.crashes = told
            if state is None:
                self._begun, self._episodes, self._bad.counts = False, [0] * self.num_envs, {}
                self._ended[:] = True
            else:
                # An evaluation that was cut short may have left the environments in any state.
                self._lost |= self._take_up(state if restored else {**state, "environments": [None] * self.num_envs})

    def counters(self) -> dict[str, int]:
        """What has gone wrong so far, by the name of its metric."""
        return {"env_restarts": self.restarts.used, "bad_inputs": sum(self.bad_inputs.values())}

    def take_lost(self) -> Bool[Tensor, " E"]:
        """The rows whose running episode was lost to an evaluation since this was last asked."""
        lost, self._lost = self._lost, np.zeros_like(self._lost)
        return self._tensor(lost)

    def close(self) -> None:
        """Close every environment, and end its process."""
        for worker in self._workers:
            worker.close()

    def _ask_reset(self, row: int, *, again: bool = False) -> None:
        """Ask for a row's next episode, or `again` for one that could not begin."""
        self._episodes[row] += 1
        self._returns[row], self._lengths[row] = 0.0, 0
        if self._cases is None:
            self._seeds[row] = _seed_of(self._seed, TRAINING, self._first_row + row, self._episodes[row])
        else:
            self._seeds[row] = _seed_of(self._cases.seed, *self._cases.begin(row, again=again))
        self._workers[row].send("reset", self._seeds[row])

    def _finish_reset(self, row: int) -> None:
        while True:
            try:
                obs = self._workers[row].receive()
                break
            except WorkerFailure as failure:
                if self._episodes[row] == 1:
                    message = f"{self._environment(row)} cannot begin its first episode: {failure}"
                    raise EnvironmentCrashed(message, Crash(row, failure.trace)) from failure
                self._replace(row, failure)
                self._ask_reset(row, again=True)
        self._store(row, obs)

    def _begin_another(self, row: int) -> None:
        """Begin the row's next episode in place of one whose first observation was to be dropped."""
        no_rewards = np.zeros(self.num_envs, np.float32)
        for attempt in range(1, MAX_CRASHES + 1):
            self._ask_reset(row, again=True)
            self._finish_reset(row)
            begun = MAX_CRASHES + 1 if attempt == MAX_CRASHES else None
            if not self._bad.mend_row(row, self._numbers(no_rewards), begun=begun):
                return

    def _finish_step(self, row: int) -> tuple[float, bool, bool]:
        """Reward, terminated and truncated; at most one of the flags holds."""
        self._lengths[row] += 1
        try:
            obs, reward, terminated, truncated, told = self._workers[row].receive()
        except WorkerFailure as failure:
            self._replace(row, failure)
            self._keep_observation(row)
            self._crashed.append(row)
            return 0.0, False, True
        self._crashes[row] = 0
        self._store(row, obs)
        if BAD_INPUT in told:
            key, line = told[BAD_INPUT]
            self._bad.note(row, key, f"{self._where(row)}: {line}")
        if NOTICE in told:
            topic, line = told[NOTICE]
            self._notice_once(topic, f"{self._where(row)}: {line}")
        return reward, terminated, truncated and not terminated

    def _finish_state(self, row: int) -> dict[str, Any] | None:
        try:
            return self._workers[row].receive()
        except WorkerFailure as failure:
            self._notice_once("state", f"{self._environment(row)} counts as one without state_dict(): {failure}")
            return None

    def _finish_load(self, row: int) -> bool:
        try:
            self._workers[row].receive()
        except WorkerFailure as failure:
            self._notice_once("load", f"{self._environment(row)} cannot take up its saved state: {failure}")
            self._renew(row)
            return False
        return True

    def _environment(self, row: int) -> str:
        return f"environment {row} of {self.name}"

    def _where(self, row: int) -> str:
        return f"{self._environment(row)}, step {self._lengths[row]} of its episode"

    def _store(self, row: int, obs: Any) -> None:
        try:
            flat = self._flatten(obs)
        except UserError as error:
            raise UserError(f"{self._where(row)}: {error}") from error
        for name, value in flat.items():
            self._buffers[name][row] = value

    def _keep_observation(self, row: int) -> None:
        """Let the row show what it showed before this step."""
        for name, buffer in self._buffers.items():
            buffer[row] = self._buffers_before[name][row]

    def _note_empty_masks(self) -> None:
        """Tell of a mask without a legal action in an episode that goes on: the agent then takes the first action."""
        if self.actions.masked:
            for row in np.flatnonzero(~self._ended & ~self._buffers[ACTION_MASK].any(-1)).tolist():
                self._notice_once("mask", f"{self._where(row)}: its mask leaves no action; the first one is taken")

    def _mend(self, reward: np.ndarray) -> list[int]:
        """See to numbers that are not finite, in the observations and in `reward`. Returns the rows to be dropped."""
        return self._bad.mend(self._numbers(reward))

    def _numbers(self, reward: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._buffers[name] for name in self._number_keys} | {REWARD: reward}

    def _replace(self, row: int, failure: WorkerFailure) -> None:
        """Put a new environment in the place of one that crashed; it is made when its episode begins.

        Raises:
            EnvironmentCrashed: no other may be replaced, or this one crashed too often.
        """
        crash = Crash(row, failure.trace)
        self._crashes[row] += 1
        if self.restarts.used >= self.restarts.allowed:
            restarted = f", after {self.restarts.used} restarts" if self.restarts.used else ""
            raise EnvironmentCrashed(f"{self._where(row)}{restarted}: {failure}", crash) from failure
        if self._crashes[row] == MAX_CRASHES:
            times = f"crashed {MAX_CRASHES} times without completing a step"
            raise EnvironmentCrashed(
                f"{self._where(row)}: it {times}, the last time with {failure}", crash
            ) from failure
        self._notice_once(f"crash {row}", f"{self._where(row)}: crashed and is restarted: {failure}")
        self.crashes.append(crash)
        self.restarts.used += 1
        self._renew(row)

    def _renew(self, row: int) -> None:
        self._workers[row].close()
        self._workers[row] = self._new_worker()

    def _notice_once(self, topic: str, line: str) -> None:
        if topic not in self._noticed:
            self._noticed.add(topic)
            self.notices.append(line)

    def _info(
        self, obs: dict[str, Tensor], *, is_first: np.ndarray, returns: list[float], lengths: list[int]
    ) -> dict[str, Any]:
        info = {
            "is_first": self._tensor(is_first),
            "decisions": int((~is_first).sum()),
            "any_first": bool(is_first.any()),
            "returns": returns,
            "lengths": lengths,
            "crashed": self._crashed,
            "bad_inputs": sorted(self._bad.rows),
        }
        return info | ({ACTION_MASK: obs[ACTION_MASK]} if self.actions.masked else {})

    def _tensor(self, array: np.ndarray) -> Tensor:
        # A copy also on the CPU: the buffers are written again in the next step.
        return torch.from_numpy(array).to(self.device, copy=True)


def _seed_of(seed: int, *spawn_key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1)[0])
