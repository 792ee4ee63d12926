"""Distributions over actions that are no single choice: several choices at once, and real numbers."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tools import OneHotDist


class MultiOneHot:
    """Independent categorical distributions side by side, one for each of M choices."""

    def __init__(self, logits: Float[Tensor, "*B L"], sizes: tuple[int, ...], *, unimix: float = 0.0) -> None:
        self.parts = [OneHotDist(part, unimix=unimix) for part in logits.split(sizes, -1)]

    def log_prob(self, action: Int[Tensor, "*B M"]) -> Float[Tensor, "*B"]:
        """Natural logarithm of the probability of all choices together."""
        pairs = zip(self.parts, action.unbind(-1), strict=True)
        return torch.stack([part.log_prob(choice) for part, choice in pairs]).sum(0)

    def entropy(self) -> Float[Tensor, "*B"]:
        """Shannon entropy in nats, summed over the choices."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def mode(self) -> Int[Tensor, "*B M"]:
        """The likeliest choices."""
        return torch.stack([part.mode() for part in self.parts], -1)

    def sample(self, noise: Float[Tensor, "*B M"]) -> Int[Tensor, "*B M"]:
        """Choices drawn by noise that is uniform in [0, 1)."""
        pairs = zip(self.parts, noise.unbind(-1), strict=True)
        return torch.stack([part.sample(draw) for part, draw in pairs], -1)

    def named(self) -> dict[str, Float[Tensor, "*B L"]]:
        """What it is, for others to draw from: the logarithms of all choices' probabilities, one after another."""
        return {"logits": torch.cat([part.log_probs for part in self.parts], -1)}

    def embed(self, action: Int[Tensor, "*B M"]) -> Float[Tensor, "*B L"]:
        """One-hot vectors of all choices, one after another, with straight-through gradients."""
        pairs = zip(self.parts, action.unbind(-1), strict=True)
        return torch.cat([part.one_hot(choice) for part, choice in pairs], -1)


class BoundedNormal:
    """Independent normals for continuous actions: the mean in (-1, 1), the standard deviation in (low, high).

    Draws may lie outside [-1, 1]; environments clip them (DreamerV3).
    """

    def __init__(
        self, mean: Float[Tensor, "*B A"], std: Float[Tensor, "*B A"], *, low: float = 0.1, high: float = 1.0
    ) -> None:
        """Take a network's outputs, each any real number."""
        self._mean = torch.tanh(mean.float())
        self._std = (high - low) * torch.sigmoid(std.float() + 2.0) + low
        # Farther out than any draw: `sample` stays within 5.5 standard deviations.
        self._farthest = 1 + 6 * high

    def log_prob(self, action: Float[Tensor, "*B A"]) -> Float[Tensor, "*B"]:
        """Natural logarithm of the density of the whole action, which is clamped to what such normals can draw."""
        distance = (self._drawable(action) - self._mean) / self._std
        return -(0.5 * distance.square() + self._std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Float[Tensor, "*B"]:
        """Differential entropy in nats, summed over the action's numbers."""
        return (self._std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def mode(self) -> Float[Tensor, "*B A"]:
        """The mean."""
        return self._mean

    def sample(self, noise: Float[Tensor, "*B A"]) -> Float[Tensor, "*B A"]:
        """An action drawn by inverting the cumulative distribution at noise that is uniform in [0, 1)."""
        tiny = torch.finfo(torch.float32).eps / 4
        return (self._mean + self._std * torch.special.ndtri(noise.float().clamp(tiny, 1 - 2 * tiny))).detach()

    def named(self) -> dict[str, Float[Tensor, "*B A"]]:
        """What it is beside its mode, for others to draw from."""
        return {"std": self._std}

    def embed(self, action: Float[Tensor, "*B A"]) -> Float[Tensor, "*B A"]:
        """`action` squashed into [-1, 1], with gradients to mean and standard deviation (reparameterised)."""
        action = self._drawable(action)
        distance = ((action - self._mean) / self._std).detach()
        moved = self._mean + self._std * distance
        # Exactly the action that was taken, whatever rounding does on the way there and back.
        action = action + (moved - moved.detach())
        return action / action.detach().abs().clamp(min=1.0)

    def _drawable(self, action: Float[Tensor, "*B A"]) -> Float[Tensor, "*B A"]:
        # Before any division: a clamp after it would leave 0 times infinity in the gradient.
        return action.float().clamp(-self._farthest, self._farthest)
