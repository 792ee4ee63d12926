"""Averages of metrics between two logs, kept where the metrics are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class MetricAverages:
    """Averages of metrics between two log calls, kept on their device until `fetch`.

    Names that end in `_min` or `_max` keep the smallest or largest value instead of the mean. Values that are not
    finite do not count; what had no others is NaN.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in detached 0-d tensors, all on one device. Never waits for it."""
        if not metrics:
            return
        values = torch.stack([metric.float() for metric in metrics.values()])
        finite = values.isfinite()
        # A value that does not count is 0 in a sum, and NaN in an extreme, which fmin and fmax pass over.
        terms, extremes = torch.where(finite, values, 0.0).unbind(), torch.where(finite, values, torch.nan).unbind()
        for name, term, extreme, count in zip(metrics, terms, extremes, finite.float().unbind(), strict=True):
            if name.endswith("_min"):
                self._values[name] = torch.fmin(self._values.get(name, extreme), extreme)
            elif name.endswith("_max"):
                self._values[name] = torch.fmax(self._values.get(name, extreme), extreme)
            else:
                self._values[name] = self._values.get(name, 0.0) + term
                self._counts[name] = self._counts.get(name, 0) + count

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take in what others have taken in, as `state_dict` gives it."""
        for name, value in state["values"].items():
            ours = self._values.get(name)
            theirs = value if ours is None else value.to(ours.device)
            if name.endswith("_min"):
                self._values[name] = theirs if ours is None else torch.fmin(ours, theirs)
            elif name.endswith("_max"):
                self._values[name] = theirs if ours is None else torch.fmax(ours, theirs)
            else:
                self._values[name] = theirs if ours is None else ours + theirs
                self._counts[name] = self._counts.get(name, 0) + state["counts"][name].to(theirs.device)

    def add_each(self, name: str, values: Float[Tensor, " E"]) -> None:
        """Take in every value of a metric that is averaged. Never waits for the device."""
        finite = values.isfinite()
        self._values[name] = self._values.get(name, 0.0) + torch.where(finite, values, 0.0).sum()
        self._counts[name] = self._counts.get(name, 0) + finite.sum()

    def fetch(self) -> dict[str, float]:
        """The averages since the last fetch, in one transfer to the host; begins anew."""
        if not self._values:
            return {}
        means = [
            value if name.endswith(("_min", "_max")) else value / self._counts[name]
            for name, value in self._values.items()
        ]
        averages = dict(zip(self._values, torch.stack(means).tolist(), strict=True))
        self._values, self._counts = {}, {}
        return averages

    def state_dict(self) -> dict[str, Any]:
        """What is taken in and not fetched yet."""
        return {"values": dict(self._values), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._values = dict(state["values"])
        self._counts = dict(state["counts"])
