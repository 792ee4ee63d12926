"""A car follows trajectories as its engine, brakes and steering allow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from driving.candidates import STEPS
from driving.vehicle import HARDEST, QUICKEST, SHARPEST, STRONGEST, Car, Path

TIMES = 0.5 * np.arange(1, STEPS + 1)


def ahead(metres: np.ndarray) -> np.ndarray:
    return np.stack((metres, np.zeros(STEPS), np.zeros(STEPS)), 1)


def drive(car: Car, trajectory: np.ndarray, ticks: int) -> Car:
    path = Path(car, trajectory)
    for tick in range(ticks):
        car.follow(path, 0.1 * tick, 0.1)
    return car


def test_a_car_keeps_to_a_straight_trajectory_in_any_direction():
    for heading in (0.0, 2.0, -3.0):
        car = drive(Car(7.0, -2.0, heading, 10.0, 5.0), ahead(10 * TIMES), 20)
        assert (car.x, car.y) == pytest.approx((7 + 20 * math.cos(heading), -2 + 20 * math.sin(heading)), abs=1e-6)
        assert car.heading == pytest.approx(heading) and car.speed == pytest.approx(10)


def test_a_car_gains_and_loses_speed_with_the_trajectory():
    car = drive(Car(0.0, 0.0, 0.0, 5.0, 5.0), ahead(5 * TIMES + TIMES**2), 10)
    assert car.x == pytest.approx(6, abs=0.1) and car.speed == pytest.approx(7, abs=0.2)
    stopping = np.minimum(TIMES, 2.0)
    car = drive(Car(0.0, 0.0, 0.0, 8.0, 5.0), ahead(8 * stopping - 2 * stopping**2), 40)
    assert car.speed < 0.1 and car.x == pytest.approx(8, abs=0.5)


def test_engine_and_brakes_have_limits():
    assert drive(Car(0.0, 0.0, 0.0, 5.0, 5.0), ahead(50 * TIMES), 1).speed == pytest.approx(5 + 0.1 * STRONGEST)
    assert drive(Car(0.0, 0.0, 0.0, 20.0, 5.0), ahead(0 * TIMES), 1).speed == pytest.approx(20 - 0.1 * HARDEST)
    assert drive(Car(0.0, 0.0, 0.0, 0.2, 5.0), ahead(0 * TIMES), 5).speed >= 0


def test_steering_has_limits():
    sideways = np.stack((np.zeros(STEPS), 5 * TIMES, np.full(STEPS, np.pi / 2)), 1)
    car = Car(0.0, 0.0, 0.0, 5.0, 5.0)
    assert drive(car, sideways, 1).steering == pytest.approx(0.1 * QUICKEST)
    other = drive(Car(0.0, 0.0, 0.0, 5.0, 5.0), sideways * [1, -1, -1], 1)
    assert other.steering == pytest.approx(-0.1 * QUICKEST)
    assert drive(car, sideways, 15).steering <= SHARPEST


def test_a_car_keeps_to_a_circle():
    angle = 8 * TIMES / 20
    circle = np.stack((20 * np.sin(angle), 20 * (1 - np.cos(angle)), angle), 1)
    car = Car(0.0, 0.0, 0.0, 8.0, 5.0, steering=math.atan(0.6 * 5 / 20))
    path = Path(car, circle)
    for tick in range(40):
        car.follow(path, 0.1 * tick, 0.1)
        assert math.hypot(car.x, car.y - 20) == pytest.approx(20, abs=0.35)
    assert car.heading == pytest.approx(8 * 4 / 20, abs=0.1)


def test_a_car_stands_where_it_is_to_stand():
    car = drive(Car(3.0, 4.0, 1.0, 0.0, 5.0), np.zeros((STEPS, 3)), 20)
    assert (car.x, car.y, car.heading, car.speed) == (3.0, 4.0, 1.0, 0.0)


def test_a_step_of_the_bicycle_by_hand():
    car = Car(0.0, 0.0, 0.0, 10.0, 5.0, steering=0.1)
    wide = 3 / math.tan(0.1)
    angle = TIMES * 10 / wide
    drive(car, np.stack((wide * np.sin(angle), wide * (1 - np.cos(angle)), angle), 1), 1)
    assert car.heading == pytest.approx(math.tan(car.steering) / 3, rel=1e-3)
    assert car.x == pytest.approx(1, abs=0.01)
