"""What imagined trajectories are worth: rewards, return targets and the range they are clipped to, advantages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from config import load_function
from imagination import Imagination, Start, Trajectory, expand_instance
from tools import lambda_return, leave_one_out
from views import take_nodes
from world_model import Metrics, WorldModel


class Returns:
    """The worth of imagined trajectories, by the rewards, the discount and the clipping of one `Imagination`."""

    def __init__(self, imagination: Imagination, *, discount: float) -> None:
        """Find the user's reward function, where one is named.

        Args:
            imagination: which rewards, baseline and clipping.
            discount: what to discount by beside every step's `cont`.

        Raises:
            ValueError: the user's reward function cannot be loaded.
        """
        self.imagination, self.discount = imagination, discount
        self.custom_reward = load_function(imagination.reward, key="imag_reward") if ":" in imagination.reward else None

    def reward(self, model: WorldModel, trajectory: Trajectory, start: Start) -> Float[Tensor, "B Q H"]:
        """What imagined actions earn by the head, the true cost or the user's function; 0 once an episode ended."""
        choice = self.imagination
        feat, state, action = trajectory.feat, trajectory.state, trajectory.action
        if model.rules is None:
            assert feat is not None
            return model.predict_reward(feat[:, :, 1:])
        assert state is not None and start.context is not None and trajectory.true_mask is not None
        instance = start.context.instance
        before = type(state)(*(part[:, :, :-1] for part in state))
        if choice.reward == "head":
            if trajectory.positions is not None:
                origin, target = trajectory.positions
            else:
                origin = take_nodes(instance.coords, before.current)
                target = take_nodes(instance.coords, action)
            latent = feat[:, :, :-1] if feat is not None and model.reward_latent else None
            if start.belief is not None:
                # What it knew at the start answers for all that it imagines from there.
                latent = start.belief[:, None, None]
            reward = model.predict_move(origin, target, latent)
        else:
            expanded = expand_instance(instance, action.shape)
            if self.custom_reward is not None:
                reward = self.custom_reward(expanded, before, action)
            else:
                reward = -model.rules.cost(expanded, before, action)
        if choice.penalty:
            legal = trajectory.true_mask[:, :, :-1].gather(-1, action[..., None]).squeeze(-1)
            reward = reward - choice.penalty * (~legal)
        return reward * trajectory.alive

    def targets(
        self,
        model: WorldModel,
        trajectory: Trajectory,
        start: Start,
        reward: Float[Tensor, "B Q H"],
        *,
        value: Float[Tensor, "B Q H+1"] | None,
        reward_range: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "B Q H"], Metrics]:
        """Return targets, clipped, and metrics of them.

        Args:
            model: knows the rules that bound a return.
            trajectory: what was imagined.
            start: where it began.
            reward: what its actions earn.
            value: the critic's, of every state; None where whole episodes leave nothing to bootstrap from.
            reward_range: the smallest and largest reward in replay, 0-d.
        """
        discount = self.discount * trajectory.cont
        alive = trajectory.alive
        earned = (reward.detach() * alive).sum()
        metrics: Metrics = {"imag_return": earned / start.weight.sum().clamp(min=1e-8)}
        if value is not None:
            metrics |= statistics("value", value[:, :, :-1], alive)
            returns = lambda_return(reward, value, discount, lambda_=self.imagination.lambda_)
            low, high = self.possible_range(model, trajectory, start, reward_range)
            if low is not None and high is not None:
                estimate = value[:, :, :-1]
                wrong = ((estimate < low - 1e-3) | (estimate > high + 1e-3)) * alive
                metrics["value_outside_rate"] = (wrong.sum() / alive.sum()).detach()
        else:
            nothing = torch.zeros(1, device=reward.device).expand(*reward.shape[:-1], reward.shape[-1] + 1)
            returns = lambda_return(reward, nothing, discount, lambda_=1.0)
        low, high = self.bounds(model, trajectory, start, reward_range)
        if low is not None and high is not None:
            clipped = torch.maximum(torch.minimum(returns, high), low)
            outside = ((clipped != returns) * alive).sum() / alive.sum()
            metrics["target_clip_rate"] = outside.detach()
            returns = clipped
        return returns, metrics | statistics("target", returns, alive)

    def advantage(
        self, returns: Float[Tensor, "B Q H"], value: Float[Tensor, "B Q H+1"] | None
    ) -> Float[Tensor, "B Q H"]:
        """By how much returns exceed the critic's value, or the mean of the other tours from the same start."""
        if value is not None:
            return returns - value[:, :, :-1]
        whole = returns[:, :, 0]
        baseline = leave_one_out(whole.unflatten(1, (-1, self.imagination.tours)).flatten(0, 1)).view_as(whole)
        return (whole - baseline)[..., None].expand_as(returns)

    def bounds(
        self, model: WorldModel, trajectory: Trajectory, start: Start, reward_range: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The range that targets are clipped to, [B, Q, H] or 0-d; None where they aren't."""
        choice = self.imagination
        if choice.target_clip == "none":
            return None, None
        if not isinstance(choice.target_clip, str):
            low, high = choice.target_clip
            device = trajectory.action.device
            return torch.full((), low, device=device), torch.full((), high, device=device)
        return self.possible_range(model, trajectory, start, reward_range)

    def possible_range(
        self, model: WorldModel, trajectory: Trajectory, start: Start, reward_range: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The range that returns can lie in, [B, Q, H]; None where none is known.

        Simulated: the legs that remain times this instance's longest, and 0 above. Learned: the legs that remain times
        1.5 times the largest move cost in replay, and likewise above if a positive reward was seen. A penalty widens
        the range by its largest sum.
        """
        choice = self.imagination
        if model.rules is None or self.custom_reward is not None:
            return None, None
        assert trajectory.state is not None and start.context is not None
        before = type(trajectory.state)(*(part[:, :, :-1] for part in trajectory.state))
        legs = model.rules.remaining_legs(before).float()
        if choice.reward == "simulated":
            worst = model.rules.longest_leg(start.context.instance)[:, None, None]
            best = torch.zeros_like(worst)
        else:
            smallest, largest = reward_range
            worst = 1.5 * (-smallest).clamp(min=0)
            best = 1.5 * largest.clamp(min=0)
        return -legs * worst - choice.penalty * legs.shape[-1], legs * best


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
