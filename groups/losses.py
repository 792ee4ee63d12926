"""What groups of samples teach: advantages within a group, the clipped surrogate, and the mean over decisions."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tools import leave_one_out

# Added to a group's standard deviation, so that equal rewards have advantages of exactly 0.
LEAST_DEVIATION = 1e-4

Metrics = dict[str, Tensor]


class Scored(NamedTuple):
    """What a policy makes of decisions that were sampled: K samples of each of B groups, T decisions at most.

    Attributes:
        log_prob: of the decisions.
        entropy: of the distributions that they were drawn from, in nats.
        penalty: what the policy's outputs cost by themselves, whatever is earned.
    """

    log_prob: Float[Tensor, "B K T"]
    entropy: Float[Tensor, "B K T"]
    penalty: Float[Tensor, ""]


def advantages(
    reward: Float[Tensor, "B K"],
    *,
    baseline: Literal["group", "leave_one_out"],
    scale: Float[Tensor, ""] | None,
) -> Float[Tensor, "B K"]:
    """How much better than its group each sample is.

    Args:
        reward: of all samples, K > 1 of each group.
        baseline: the group's mean (Shao et al. 2024, GRPO), or the mean of the others (Kool et al. 2019).
        scale: what all are divided by; None: the standard deviation of each group, as GRPO has it.
    """
    # From the first of its group on, equal rewards are exactly 0, whatever rounding would make of their mean.
    reward = reward - reward[:, :1]
    others = leave_one_out(reward) if baseline == "leave_one_out" else reward.mean(-1, keepdim=True)
    if scale is None:
        return (reward - others) / (reward.std(-1, keepdim=True) + LEAST_DEVIATION)
    return (reward - others) / scale


def clipped_gain(
    log_ratio: Float[Tensor, "*B"], advantage: Float[Tensor, "*#B"], *, clip: float
) -> Float[Tensor, "*B"]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7); its gradient is REINFORCE's where the ratio is 1."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def divergence(log_prob: Float[Tensor, "*B"], reference: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """An estimate of the divergence of a policy from a reference by decisions of the policy, never negative.

    It is r - log r - 1 with r the reference's probability over the policy's ("k3"; Shao et al. 2024, equation 4).
    """
    difference = reference - log_prob
    return difference.exp() - difference - 1


def mean_over(
    values: Float[Tensor, "B K T"],
    counted: Float[Tensor, "B K T"],
    *,
    length: Literal["sample", "decision", "longest"],
    longest: int,
) -> Float[Tensor, ""]:
    """The mean over decisions that count.

    Args:
        values: of each decision.
        counted: 1 where a decision was made, and 0 behind a sample's end.
        length: `sample`: over each sample's decisions first, so that those of long samples count less each (Shao et al.
            2024, GRPO); `decision`: over all at once (Yu et al. 2025, DAPO); `longest`: their sum over what it would
            take if all samples were as long as can be (Liu et al. 2025, Dr. GRPO).
        longest: decisions of the longest possible sample.
    """
    total = (values * counted).sum(-1)
    if length == "sample":
        return (total / counted.sum(-1).clamp(min=1)).mean()
    if length == "decision":
        return total.sum() / counted.sum().clamp(min=1)
    return total.mean() / longest


def surrogate(
    scored: Scored,
    *,
    before: Float[Tensor, "B K T"],
    reference: Float[Tensor, "B K T"] | None,
    advantage: Float[Tensor, "B K"],
    counted: Float[Tensor, "B K T"],
    clip: float,
    length: Literal["sample", "decision", "longest"],
    longest: int,
    entropy: float,
    kl: float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """What a policy is to minimise on samples, and metrics.

    Args:
        scored: by the policy as it is now.
        before: log-probabilities of the policy that the samples are from.
        reference: log-probabilities of the policy that it is to stay close to; None: of none.
        advantage: of the samples.
        counted: 1 where a decision was made.
        clip: how far the ratio of probabilities may go from 1.
        length: how decisions are averaged.
        longest: decisions of the longest possible sample.
        entropy: weight of the entropy.
        kl: weight of the divergence from the reference.
    """
    # Behind a sample's end anything may stand, and infinity times 0 would be NaN.
    made = counted > 0
    log_prob = torch.where(made, scored.log_prob, 0.0)
    log_ratio = log_prob - torch.where(made, before, 0.0)
    objective = clipped_gain(log_ratio, advantage[..., None], clip=clip) + entropy * scored.entropy

    def mean(values: Float[Tensor, "B K T"]) -> Float[Tensor, ""]:
        return mean_over(values.detach(), counted, length="decision", longest=longest)

    metrics = {
        "actor_entropy": mean(scored.entropy),
        "ratio_clip_rate": mean(((log_ratio.exp() - 1).abs() > clip).float()),
    }
    if reference is not None:
        apart = divergence(log_prob, torch.where(made, reference, 0.0))
        objective = objective - kl * apart
        metrics["reference_kl"] = mean(apart)
    return scored.penalty - mean_over(objective, counted, length=length, longest=longest), metrics
