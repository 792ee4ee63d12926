"""What an evaluation of an agent gives, whatever it plays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from envs.crashes import Crash
from routing.rules import Instance
from training.agent import Trained

# Pictures by name, of whatever an agent can show: called with instances, or with an episode.
Pictures = Callable[[Instance], dict[str, np.ndarray]] | Callable[[dict[str, Tensor]], dict[str, np.ndarray]]


class Report(NamedTuple):
    """The outcome of an evaluation: figures, pictures and pages by name, one line to read, and what went wrong.

    `notices` are lines to read about that, `crashes` the environments that crashed and were replaced.
    """

    values: dict[str, float]
    pictures: dict[str, np.ndarray]
    summary: str
    notices: tuple[str, ...] = ()
    crashes: tuple[Crash, ...] = ()
    texts: Mapping[str, str] = MappingProxyType({})


@runtime_checkable
class Evaluator(Protocol):
    """Judges an agent while it trains (`validate`) and once at the end (`test`), on cases that never change.

    `test` gives None where it is switched off.
    """

    def validate(self, agent: Trained) -> Report: ...

    def test(self, agent: Trained) -> Report | None: ...


class Unjudged:
    """The evaluator of a rank that another one evaluates for."""

    def validate(self, agent: Trained) -> Report:
        return Report({}, {}, "")

    def test(self, agent: Trained) -> Report | None:
        return None


def interval(values: Float[Tensor, " I"]) -> str:
    """The half-width of the mean's 95 % confidence interval, by the normal approximation."""
    if len(values) < 2:
        return ""
    return f" +- {1.96 * float(values.std()) / len(values) ** 0.5:.2g} (95 %)"
