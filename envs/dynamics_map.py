"""The dynamics map: how a vehicle answers each command at each speed, inferred while it is driven, as a small vector.

A map is a grid of accelerations over (command, speed). Randomly drawn vehicles span a space of maps with few principal
components; their coefficients get an exact linear-Gaussian posterior, which forgets.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from envs.longitudinal import TOP_SPEED, acceleration, draw_plants
from envs.tasks import BAD_INPUT, NOTICE

CONTEXT_KEY = "dynamics_map"
# The name of the environment's plain observation beside the context.
OBSERVATION_KEY = "observation"

GRID = 100
COMPONENTS = 6
PLANTS, PLANT_SEED = 500, 2024
# Standard deviation of a measured acceleration about its map, m/s^2: sensors, and speed that changes within a step.
MEASUREMENT_STD = 0.2
# Each step the evidence so far counts for this much less, and the prior fills the gap.
FORGETTING = 0.998
# Posterior means are squashed at about so many standard deviations of the prior.
MEAN_LIMIT = 3.0


class Basis(NamedTuple):
    """The prior over maps: `mean` + `components` x standard normal coefficients.

    Attributes:
        mean: of the drawn vehicles' maps, m/s^2.
        components: the principal components, each scaled to one standard deviation.
        explained: the share of the maps' variance that the components hold.
    """

    mean: Float[np.ndarray, "C V"]
    components: Float[np.ndarray, "K C V"]
    explained: float

    def at(self, command: float, speed: float) -> tuple[float, Float[np.ndarray, " K"]]:
        """Mean and components at one command and speed, interpolated; beyond the grid, those of its edge."""
        row, across = _cell((command + 1) / 2)
        column, along = _cell(speed / TOP_SPEED)
        weights = np.array([[(1 - across) * (1 - along), (1 - across) * along], [across * (1 - along), across * along]])
        cell = (slice(row, row + 2), slice(column, column + 2))
        return float((weights * self.mean[cell]).sum()), (weights * self.components[:, *cell]).sum((1, 2))


def _cell(share: float) -> tuple[int, float]:
    """The grid line below a place in [0, 1], and how far on from it."""
    place = min(max(share, 0.0), 1.0) * (GRID - 1)
    index = min(int(place), GRID - 2)
    return index, place - index


@functools.cache
def vehicle_basis(count: int = COMPONENTS) -> Basis:
    """The prior that vehicles drawn as `envs.longitudinal` draws them make up; the same in every process."""
    plants = draw_plants(np.random.default_rng(PLANT_SEED), PLANTS)
    maps = vehicle_maps(plants).reshape(PLANTS, -1)
    mean = maps.mean(0)
    centred = maps - mean
    # This goes through the small matrix of products: there are far fewer maps than entries in each.
    variances, vectors = np.linalg.eigh(centred @ centred.T / PLANTS)
    chosen = np.argsort(variances)[::-1][:count]
    components = vectors[:, chosen].T @ centred / math.sqrt(PLANTS)
    return Basis(
        mean=mean.reshape(GRID, GRID),
        components=components.reshape(count, GRID, GRID),
        explained=float(variances[chosen].sum() / variances.sum()),
    )


def vehicle_maps(plants: Any) -> Float[np.ndarray, "M C V"]:
    """The true maps of M vehicles, m/s^2."""
    command, speed = np.linspace(-1, 1, GRID)[:, None], np.linspace(0, TOP_SPEED, GRID)[None]
    return acceleration(type(plants)(*(np.asarray(entry)[:, None, None] for entry in plants)), command, speed)


class Posterior:
    """What is believed of a vehicle's coefficients: a normal distribution, as precision and precision times mean.

    Without forgetting it is the exact posterior of the linear-Gaussian model. With it, precision relaxes towards the
    prior's before each measurement, so that a vehicle that changes is followed, and no variance falls below
    `lowest_variance`.
    """

    def __init__(self, basis: Basis, *, std: float = MEASUREMENT_STD, forgetting: float = FORGETTING) -> None:
        """Begin with the prior.

        Raises:
            ValueError: `std` is not positive, or `forgetting` not in (0, 1].
        """
        if not (std > 0 and 0 < forgetting <= 1):
            raise ValueError(f"std must be positive and forgetting in (0, 1]; got {std} and {forgetting}")
        self.basis, self.std, self.forgetting = basis, std, forgetting
        count = len(basis.components)
        self.precision, self.weighted = np.eye(count), np.zeros(count)
        self._least_log_variance = -math.inf
        if forgetting < 1:
            largest = float(np.square(basis.components).sum(0).max())
            self._least_log_variance = -math.log1p(largest / (std**2 * (1 - forgetting)))

    @property
    def lowest_variance(self) -> float:
        """Below this no variance can fall; 0 without forgetting."""
        return math.exp(self._least_log_variance)

    def observe(self, command: float, speed: float, response: float) -> None:
        """Take in that the vehicle accelerated by `response` m/s^2 at a command in [-1, 1] and a speed in m/s."""
        mean, components = self.basis.at(command, speed)
        keep, information = self.forgetting, 1 / self.std**2
        self.precision = keep * self.precision + information * np.outer(components, components)
        self.precision[np.diag_indices_from(self.precision)] += 1 - keep
        self.weighted = keep * self.weighted + information * (response - mean) * components

    def moments(self) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """Mean and variance of each coefficient, in units of the prior's."""
        covariance = np.linalg.inv(self.precision)
        return covariance @ self.weighted, covariance.diagonal()

    def mean_map(self) -> Float[np.ndarray, "C V"]:
        """The expected map, m/s^2."""
        return self.basis.mean + np.tensordot(self.moments()[0], self.basis.components, 1)

    def context(self) -> Float[np.ndarray, " L"]:
        """Means, squashed into (-1, 1), and log-variances as shares of the lowest there can be, in [-1, 0]."""
        mean, variance = self.moments()
        return np.concatenate((np.tanh(mean / MEAN_LIMIT), -np.log(variance) / self._least_log_variance))


class DynamicsMapContext(gymnasium.Wrapper):
    """Adds what is inferred of the dynamics to the observations of any environment, under `dynamics_map`.

    The environment tells of each step it has measured by `info["response"] = (command, state, response)`: a command in
    [-1, 1], a speed in m/s and an acceleration in m/s^2 without gravity's part. Every episode begins with the prior.

    A measurement that is not finite, or makes the context so, is counted in `bad_measurements`, told in `info` and not
    taken in; the context of that step is zero. An episode that ends without any measurement is told of in `info` too.
    """

    def __init__(self, env: gymnasium.Env, *, forgetting: float = FORGETTING) -> None:
        super().__init__(env)
        inner = env.observation_space
        self._plain = not isinstance(inner, spaces.Dict)
        parts = {OBSERVATION_KEY: inner} if not isinstance(inner, spaces.Dict) else dict(inner.spaces)
        if CONTEXT_KEY in parts:
            raise ValueError(f"observations hold a '{CONTEXT_KEY}' already; rename it, or set context to none")
        box = spaces.Box(-1, 1, (2 * COMPONENTS,), np.float32)
        self.observation_space = spaces.Dict({**parts, CONTEXT_KEY: box})
        self.forgetting = forgetting
        self.bad_measurements = 0
        self._begin()

    def _begin(self) -> None:
        self.posterior = Posterior(vehicle_basis(), forgetting=self.forgetting)
        self._context = self.posterior.context()
        self._was_told = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, with the prior."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._begin()
        return self._with_context(obs, measured=True), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, and learn from what it measured."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        measured = "response" not in info or self._take_in(*_three_numbers(info["response"]))
        self._was_told |= "response" in info
        if not measured:
            line = f"from a response of {tuple(info['response'])} no finite context follows; the context is 0"
            info = {**info, BAD_INPUT: ("response", line)}
        elif (terminated or truncated) and not self._was_told:
            line = "no step of this episode had an info['response'], so that the dynamics map says nothing"
            info = {**info, NOTICE: ("no response", line)}
        return self._with_context(obs, measured=measured), reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """What going on in mid-episode needs beside the environment's own state."""
        posterior = self.posterior
        counts = {"bad": self.bad_measurements, "was_told": self._was_told}
        return {"precision": posterior.precision, "weighted": posterior.weighted, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.posterior.precision, self.posterior.weighted = state["precision"], state["weighted"]
        self._context = self.posterior.context()
        self.bad_measurements = state["bad"]
        # Older states lack this entry; their users had been told.
        self._was_told = state.get("was_told", True)

    def _take_in(self, command: float, state: float, response: float) -> bool:
        """Learn from a measurement. Returns whether that was possible."""
        before = self.posterior.precision, self.posterior.weighted
        if np.isfinite((command, state, response)).all():
            with np.errstate(over="ignore", invalid="ignore"):
                self.posterior.observe(command, state, response)
                context = self.posterior.context()
            if np.isfinite(context).all():
                self._context = context
                return True
        self.posterior.precision, self.posterior.weighted = before
        self.bad_measurements += 1
        return False

    def _with_context(self, obs: Any, *, measured: bool) -> dict[str, Any]:
        parts = {OBSERVATION_KEY: obs} if self._plain else dict(obs)
        return {**parts, CONTEXT_KEY: (self._context * measured).astype(np.float32)}


def _three_numbers(response: Any) -> tuple[float, float, float]:
    try:
        command, state, answer = (float(number) for number in response)
    except (TypeError, ValueError) as error:
        line = f"info['response'] is {response!r}; the dynamics map needs three numbers: (command, state, response)"
        raise ValueError(line) from error
    return command, state, answer
