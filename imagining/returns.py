"""What imagined trajectories are worth: return targets and the range they are clipped to, advantages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from imagining.imagination import Imagination, Start, Trajectory
from imagining.world_model import Metrics
from tools import Bounds, lambda_return, leave_one_out


class Returns:
    """The worth of imagined trajectories, by the discount and the clipping that the settings name."""

    def __init__(self, imagination: Imagination) -> None:
        """Take the imagination that bounds a return."""
        self.imagination, self.settings = imagination, imagination.settings

    def targets(
        self,
        trajectory: Trajectory,
        start: Start,
        reward: Float[Tensor, "B Q H"],
        *,
        value: Float[Tensor, "B Q H+1"] | None,
        rewards: Bounds,
    ) -> tuple[Float[Tensor, "B Q H"], Metrics]:
        """Return targets, clipped, and metrics of them.

        Args:
            trajectory: what was imagined.
            start: where it began.
            reward: what its actions earn.
            value: the critic's, of every state; None where whole episodes leave nothing to bootstrap from.
            rewards: the smallest and largest reward in replay, 0-d.
        """
        discount = self.imagination.discount * trajectory.cont
        survival = trajectory.survival
        earned = (reward.detach() * survival).sum()
        metrics: Metrics = {"imag_return": earned / start.weight.sum().clamp(min=1e-8)}
        possible = self.imagination.possible_returns(trajectory, start, rewards)
        if value is not None:
            metrics |= statistics("value", value[:, :, :-1], survival)
            returns = lambda_return(reward, value, discount, lambda_=self.settings.lambda_)
            metrics |= values_outside(value[:, :, :-1], possible, survival)
        else:
            nothing = torch.zeros(1, device=reward.device).expand(*reward.shape[:-1], reward.shape[-1] + 1)
            returns = lambda_return(reward, nothing, discount, lambda_=1.0)
        bounds = self.bounds(possible, device=reward.device)
        if bounds is not None:
            clipped = torch.maximum(torch.minimum(returns, bounds.high), bounds.low)
            outside = ((clipped != returns) * survival).sum() / survival.sum()
            metrics["target_clip_rate"] = outside.detach()
            returns = clipped
        return returns, metrics | statistics("target", returns, survival)

    def advantage(
        self, returns: Float[Tensor, "B Q H"], value: Float[Tensor, "B Q H+1"] | None, *, given: int = 0
    ) -> Float[Tensor, "B Q H"]:
        """By how much returns exceed the critic's value, or the mean of the other tours from the same start.

        The last tours of each instance, as many as were `given` their first moves, are compared among themselves.
        """
        if value is not None:
            return returns - value[:, :, :-1]
        whole = returns[:, :, 0]
        together = whole.unflatten(1, (-1, self.settings.tours)).flatten(0, 1)
        groups = together.split((self.settings.tours - given, given), 1) if given else (together,)
        baseline = torch.cat([leave_one_out(group) for group in groups], 1).view_as(whole)
        return (whole - baseline)[..., None].expand_as(returns)

    def bounds(self, possible: Bounds | None, *, device: torch.device) -> Bounds | None:
        """The range that targets are clipped to, [B, Q, H] or 0-d; None where they aren't."""
        clip = self.settings.target_clip
        if isinstance(clip, str):
            return None if clip == "none" else possible
        return Bounds(*(torch.full((), bound, device=device) for bound in clip))


def replayed_returns(
    batch: dict[str, Tensor], bootstrap: Float[Tensor, "B T"], *, discount: float, lambda_: float
) -> Float[Tensor, "B T-1"]:
    """Lambda-returns of all rows but the last of replayed sequences [B, T].

    Args:
        batch: replayed sequences; a row's reward and `is_terminal` arrived with its observation.
        bootstrap: what is to be expected from each row on.
        discount: the discount factor of one step.
        lambda_: 0 trusts the bootstrap, 1 the rewards.
    """
    goes_on = (~batch["is_terminal"][:, 1:]).float() * discount
    # Past an episode's last row there are no rewards of its own to mix in.
    mix = (~batch["is_last"][:, 1:]).float() * lambda_
    return lambda_return(batch["reward"][:, 1:], bootstrap, goes_on, lambda_=mix)


def statistics(name: str, values: Float[Tensor, "*B"], weight: Float[Tensor, "*B"]) -> Metrics:
    """Smallest, largest, mean and standard deviation of the values that count, under names that begin with `name`.

    A value counts as much as its weight says; of those with any weight comes the smallest, and the largest.
    """
    values, total, counts = values.detach(), weight.sum().clamp(min=1e-8), weight > 0
    mean = (values * weight).sum() / total
    return {
        f"{name}_min": values.where(counts, torch.inf).amin(),
        f"{name}_max": values.where(counts, -torch.inf).amax(),
        f"{name}_mean": mean,
        f"{name}_std": (((values - mean).square() * weight).sum() / total).sqrt(),
    }


def values_outside(value: Float[Tensor, "B Q H"], possible: Bounds | None, survival: Float[Tensor, "B Q H"]) -> Metrics:
    """The share of the critic's values that no return can reach, where it is known what one can."""
    if possible is None:
        return {}
    wrong = ((value < possible.low - 1e-3) | (value > possible.high + 1e-3)) * survival
    return {"value_outside_rate": (wrong.sum() / survival.sum()).detach()}
