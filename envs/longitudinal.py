"""Longitudinal control of a vehicle that the agent does not know: follow a reference speed by throttle and brake."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from jaxtyping import Float

GRAVITY = 9.81  # m/s^2
AIR_DENSITY = 1.2  # kg/m^3
STEP_SECONDS = 0.1
EPISODE_STEPS = 512
# Below this speed, in m/s, an engine's power no longer bounds its force.
SLOWEST_AT_POWER = 1.0
TOP_SPEED = 90.0  # m/s, of maps: the fastest vehicle comes to 86 on level ground
# The reference is shown at these steps from now: 3 s ahead.
PREVIEW = np.arange(3, 31, 3)
REFERENCE_LOW, REFERENCE_HIGH = 5.0, 30.0  # m/s
REFERENCE_ACCELERATION = 1.2  # m/s^2, the largest
STEEPEST = 0.06  # rad, about 6 %
SPEED_NOISE = 0.05  # m/s, standard deviation
RESPONSE_NOISE = 0.05  # m/s^2, likewise
# Far beyond what any vehicle here can reach.
OBSERVATION_LIMIT = 100.0
# Observations are divided by these, so that they are about 1.
SPEED_SCALE, ERROR_SCALE, GRADE_SCALE = 20.0, 5.0, 0.05


class Plant(NamedTuple):
    """A vehicle, or many of them where each entry is an array.

    Attributes:
        mass: kg.
        power: of the motor at full throttle, W.
        force: the motor's largest, N.
        drag: drag coefficient times frontal area, m^2.
        rolling: coefficient of the rolling resistance.
        brake: force of the full brake, N.
        lag: time constant of the actuator, s.
    """

    mass: Any
    power: Any
    force: Any
    drag: Any
    rolling: Any
    brake: Any
    lag: Any


LOWEST = Plant(mass=1000.0, power=60e3, force=4e3, drag=0.5, rolling=0.008, brake=8e3, lag=0.1)
HIGHEST = Plant(mass=2500.0, power=200e3, force=9e3, drag=0.9, rolling=0.02, brake=16e3, lag=0.4)


def draw_plants(rng: np.random.Generator, count: int) -> Plant:
    """Vehicles drawn uniformly between `LOWEST` and `HIGHEST`, each entry an array [count]."""
    return Plant(*(rng.uniform(low, high, count) for low, high in zip(LOWEST, HIGHEST, strict=True)))


def acceleration(plant: Plant, command: Any, speed: Any) -> Any:
    """What the vehicle's own forces do on level ground, m/s^2; arrays are broadcast.

    Args:
        plant: the vehicle.
        command: where the actuator stands: the share of full throttle, or minus the share of the full brake.
        speed: m/s, not negative; at 0 it is that of a vehicle that just moves.
    """
    drive = np.minimum(plant.force, plant.power / np.maximum(speed, SLOWEST_AT_POWER))
    force = np.maximum(command, 0) * drive + np.minimum(command, 0) * plant.brake
    drag = 0.5 * AIR_DENSITY * plant.drag * np.square(speed)
    return (force - drag) / plant.mass - plant.rolling * GRAVITY


class Ride(NamedTuple):
    """All that changes in an episode, and what was drawn for it; speeds in m/s."""

    plant: list[float]
    reference: list[float]
    grade: list[float]
    speed: float
    measured: list[float]
    actuator: float
    acceleration: float
    command: float
    step: int


class LongitudinalEnv(gymnasium.Env):
    """Follow a reference speed with an unknown vehicle. Registered as `Longitudinal-v0`.

    Each episode draws a vehicle (mass, motor, drag, rolling resistance, brake, actuator lag), a road with grades of up
    to 6 % and a reference, and lasts 512 steps of 0.1 s; then it is truncated.

    The reward is -(10 * error^2 + jerk^2), with the speed error in m/s and the jerk in m/s^3: hundreds of thousands
    below zero for an agent that knows nothing, millions for a bad one, some thousands for a good one.

    Observation: measured speed now and at the two steps before, the last command, the speed error, the grade, and the
    reference of the next 3 s less the measured speed at every third step; speeds over 20 m/s, errors over 5 m/s, the
    grade over 0.05 rad.
    Action: throttle (positive) or brake (negative) in [-1, 1]; with `horizon` above 1 a plan of so many, of which the
    first is executed.

    `info["response"]` is (actuator position, speed, measured acceleration without gravity's part) of the step taken,
    all noisy but the first; a vehicle at rest responds to nothing, and then it is missing.
    """

    metadata: dict[str, Any] = {"render_modes": []}
    render_mode = None

    def __init__(self, *, horizon: int = 1):
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; a plan holds one action at least")
        self.horizon = horizon
        self.action_space = spaces.Box(-1, 1, (horizon,), np.float32)
        self.observation_space = spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT, (6 + len(PREVIEW),), np.float32)
        self._ride: Ride | None = None

    @property
    def ride(self) -> Ride:
        """The episode that runs or has just ended; ResetNeeded where none has begun."""
        if self._ride is None:
            raise ResetNeeded("no episode has begun: call reset()")
        return self._ride

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " O"], dict[str, Any]]:
        """Begin an episode. There are no options: any is a ValueError."""
        if options:
            raise ValueError(f"reset() has no options, got {sorted(options)}")
        super().reset(seed=seed)
        plant = draw_plants(self.np_random, 1)
        reference, grade = self._draw_reference(), self._draw_grade()
        speed = max(0.0, reference[0] + self.np_random.normal(0, 1))
        measured = self._measure(speed)
        self._ride = Ride(
            plant=[float(entry[0]) for entry in plant],
            reference=reference,
            grade=grade,
            speed=speed,
            measured=[measured] * 3,
            actuator=0.0,
            acceleration=0.0,
            command=0.0,
            step=0,
        )
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Float[np.ndarray, " O"], float, bool, bool, dict[str, Any]]:
        """Drive on for 0.1 s.

        Raises:
            ResetNeeded: no episode has begun, or it is over.
            ValueError: the action has another shape, or is not finite.
        """
        ride = self.ride
        if ride.step >= EPISODE_STEPS:
            raise ResetNeeded("step() after the end of the episode: call reset()")
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action {action} should be {self.horizon} finite numbers in [-1, 1]")
        command = float(np.clip(action[0], -1, 1))
        plant, grade = Plant(*ride.plant), ride.grade[ride.step]
        # Exact for a command that is held.
        actuator = command + (ride.actuator - command) * float(np.exp(-STEP_SECONDS / plant.lag))
        own = float(acceleration(plant, actuator, ride.speed))
        speed = max(0.0, ride.speed + STEP_SECONDS * (own - GRAVITY * float(np.sin(grade))))
        felt = (speed - ride.speed) / STEP_SECONDS
        jerk = (felt - ride.acceleration) / STEP_SECONDS
        error = ride.reference[ride.step + 1] - speed
        info: dict[str, Any] = {}
        if speed > 0:
            response = felt + GRAVITY * float(np.sin(grade)) + self.np_random.normal(0, RESPONSE_NOISE)
            info["response"] = (actuator, ride.measured[-1], response)
        self._ride = ride._replace(
            speed=speed,
            measured=[*ride.measured[1:], self._measure(speed)],
            actuator=actuator,
            acceleration=felt,
            command=command,
            step=ride.step + 1,
        )
        return self._observe(), -(10 * error**2 + jerk**2), False, self._ride.step >= EPISODE_STEPS, info

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, in plain numbers, strings, lists and dicts."""
        return {
            "rng": self.np_random.bit_generator.state,
            "ride": None if self._ride is None else self._ride._asdict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, in an environment made with the same arguments."""
        self.np_random.bit_generator.state = state_dict["rng"]
        self._ride = None if state_dict["ride"] is None else Ride(**state_dict["ride"])

    def _observe(self) -> Float[np.ndarray, " O"]:
        ride = self.ride
        measured = ride.measured[-1]
        ahead = np.array(ride.reference)[ride.step + PREVIEW] - measured
        return np.array(
            [
                *(speed / SPEED_SCALE for speed in reversed(ride.measured)),
                ride.command,
                (ride.reference[ride.step] - measured) / ERROR_SCALE,
                ride.grade[ride.step] / GRADE_SCALE,
                *(ahead / ERROR_SCALE),
            ],
            np.float32,
        )

    def _measure(self, speed: float) -> float:
        return speed + self.np_random.normal(0, SPEED_NOISE)

    def _draw_reference(self) -> list[float]:
        """A speed for every step: stretches of constant acceleration, smoothed over a second."""
        steps = EPISODE_STEPS + int(PREVIEW[-1]) + 1
        speeds = [self.np_random.uniform(REFERENCE_LOW, REFERENCE_HIGH)]
        while len(speeds) < steps:
            rate = self.np_random.choice([0.0, 1.0]) * self.np_random.uniform(-1, 1) * REFERENCE_ACCELERATION
            for _ in range(self.np_random.integers(20, 80)):
                speeds.append(float(np.clip(speeds[-1] + STEP_SECONDS * rate, REFERENCE_LOW, REFERENCE_HIGH)))
        padded = np.concatenate((np.full(5, speeds[0]), speeds[:steps], np.full(5, speeds[steps - 1])))
        return np.convolve(padded, np.full(11, 1 / 11), mode="valid").tolist()

    def _draw_grade(self) -> list[float]:
        """The road's slope at every step, rad: two slow waves."""
        time = np.arange(EPISODE_STEPS + 1) * STEP_SECONDS
        waves = [
            self.np_random.uniform(0, STEEPEST / 2)
            * np.sin(2 * np.pi * (time / self.np_random.uniform(15, 60) + self.np_random.uniform()))
            for _ in range(2)
        ]
        return np.sum(waves, axis=0).tolist()
