"""The maths that the models share: squashing, distributions, returns and their scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from config import UserError
from system.ranks import here

# Far below any logit that matters, yet finite: sums and products with it stay finite in float32.
LOGIT_FLOOR = -1e30

# The exponential of anything less is no normal number of float32.
LEAST_EXPONENT = -87.0

# What stands for -infinity, NaN and +infinity where logits are compared: the least numbers of float32, of which only
# the order matters.
ILLEGAL_RANK, NAN_RANK, INF_RANK = (torch.finfo(torch.float32).min + rank * 2.0**104 for rank in range(3))

# Distances count as no larger: the square stays finite in float32, and so does the sum of a hundred million squares.
LARGEST_DISTANCE = 1e15


def computed_once(method: Callable[[Any], Tensor]) -> Any:
    """A property that is computed when it is first asked for.

    Unlike that of functools it takes no lock (before Python 3.12), which torch.compile could not follow.
    """
    name = f"_{method.__name__}_once"

    @wraps(method)
    def value(self: Any) -> Tensor:
        known = getattr(self, name, None)
        if known is None:
            known = method(self)
            setattr(self, name, known)
        return known

    return property(value)


def symlog(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """sign(x) log(1 + |x|), which compresses large values of either sign (DreamerV3, eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog` (DreamerV3, eq. 9); saturates just below its type's largest."""
    largest = math.log(torch.finfo(x.dtype).max) - 0.01
    return torch.sign(x) * torch.expm1(torch.abs(x).clamp(max=largest))


class _Widen(torch.autograd.Function):
    """Half precision to float32; on the way back a gradient that half precision cannot hold becomes its largest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        largest = torch.finfo(ctx.dtype).max
        return gradient.clamp(-largest, largest).to(ctx.dtype)


def widen(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """`x` in float32, with a gradient that is finite in the type that `x` came in."""
    return _Widen.apply(x) if x.dtype in (torch.float16, torch.bfloat16) else x.float()


def below_top(
    logits: Float[Tensor, "*B N"], mask: Bool[Tensor, "*B N"] | None, *, lowest: float
) -> Float[Tensor, "*B N"]:
    """Logits less the largest legal one of their row, clipped to [lowest, 0]; `lowest` where illegal."""
    if mask is not None:
        # Infinite, since a finite floor could be above every legal logit of a row; the clamp makes it finite.
        logits = torch.where(mask, logits, -math.inf)
    return (logits - logits.detach().amax(-1, keepdim=True)).clamp(min=lowest)


def _count(mask: Bool[Tensor, "*B N"]) -> Int[Tensor, "*B 1"]:
    """How many are True in each row."""
    # Sums of 64 bits take a CPU twice as long.
    return mask.sum(-1, keepdim=True, dtype=torch.int32)


def mixed(
    probs: Float[Tensor, "*B N"], uniform: Float[Tensor, "*B N"] | Float[Tensor, "*B 1"], share: float | Tensor
) -> Float[Tensor, "*B N"]:
    """That share of `uniform`, and the rest of `probs`."""
    # lerp is exact where both ends agree, so a lone legal action keeps probability 1.
    return torch.lerp(probs, uniform, share)


class StableLogProbs(NamedTuple):
    """Log-probabilities that can be sampled from, and what was wrong with the logits that they were made of.

    Attributes:
        log_probs: at most 0; exponentials of a row sum to 1.
        nan: how many logits were NaN.
        inf: how many were +infinity.
        clipped: how many legal ones were so far below the top of their row that they were clipped.
        empty: the rows in which nothing was legal.
    """

    log_probs: Float[Tensor, "*B N"]
    nan: Int[Tensor, ""]
    inf: Int[Tensor, ""]
    clipped: Int[Tensor, ""]
    empty: Bool[Tensor, "*B"]


def stable_log_probs(
    logits: Float[Tensor, "*B N"],
    mask: Bool[Tensor, "*B N"] | None = None,
    *,
    clip: float,
    min_prob: float = 0.0,
    illegal: float = -math.inf,
) -> StableLogProbs:
    """Log-probabilities of any logits whatever, in float32, with finite gradients.

    Illegal is what the mask forbids, what is NaN, and what is -infinity or float32's least number. +infinity counts as
    much as its row's largest finite logit, or as anything where there is none. Logits count from the largest legal one
    of their row, so that a number added to a whole row changes nothing, and none counts as further below than 2 `clip`.
    The floor takes from all legal ones in proportion, and gives each the same: p becomes (1 - n `min_prob`) p +
    `min_prob` for n legal ones.

    A row with nothing legal is uniform over those that are NaN, or over all where the mask or -infinity forbids all;
    its gradient is 0.

    `OneHotDist` shares `below_top` and `mixed` with this, and not the rest: there a NaN has to come out again, so that
    the guard sees it, and its rows, as short as a latent's classes, are slow in `torch.softmax`.

    Args:
        logits: unnormalised log-probabilities.
        mask: True is legal.
        clip: half the largest distance from the top, in nats.
        min_prob: the least probability of what is legal; below 1 / N.
        illegal: the log-probability of what is illegal. Products with its probability, 0, need a finite one.

    Raises:
        UserError: so many floors are more than there is to share.
    """
    if min_prob * logits.shape[-1] >= 1:
        raise UserError(f"min_prob {min_prob} for each of {logits.shape[-1]} is 1 or more; choose less than 1 by that")
    logits = logits.float() if mask is None else torch.where(mask, logits.float(), -math.inf)
    # The highest of three ranks is what a row is drawn from: logits, else NaN, else -infinity.
    top = logits.detach().nan_to_num(nan=NAN_RANK, posinf=INF_RANK, neginf=ILLEGAL_RANK).amax(-1, keepdim=True)
    ranked = logits.nan_to_num(nan=NAN_RANK, posinf=math.inf, neginf=ILLEGAL_RANK).clamp(max=top)
    empty = top <= NAN_RANK
    below = torch.where(empty, torch.where(top > ILLEGAL_RANK, ILLEGAL_RANK, -math.inf), NAN_RANK)
    legal = ranked > below
    count = _count(legal)
    distance = below_top(ranked, None, lowest=-2 * clip)
    clipped = count - _count(distance > -2 * clip)
    distance = torch.where(legal, distance, -math.inf)
    if min_prob:
        log_probs = mixed(torch.softmax(distance, -1), 1 / count, min_prob * count).log()
    else:
        log_probs = torch.log_softmax(distance, -1)
    log_probs = torch.where(legal, log_probs, illegal)
    nan, inf = _count(logits.isnan()), _count(logits.isposinf())
    return StableLogProbs(log_probs, nan.sum(), inf.sum(), clipped.sum(), empty.squeeze(-1))


class OneHotDist:
    """A categorical distribution over the legal actions.

    The uniform share `unimix` is spread over legal actions only, so that an illegal action has probability exactly 0.
    A row without any legal action becomes a point mass on index 0: entropy 0, log-probability 0, gradient 0.
    Computed in float32 whatever the logits' type; finite for every input free of NaN and infinity.
    """

    def __init__(
        self,
        logits: Float[Tensor, "*B N"],
        *,
        mask: Bool[Tensor, "*B N"] | None = None,
        unimix: float = 0.0,
    ) -> None:
        logits = logits.float()
        if mask is not None:
            empty = ~mask.any(-1, keepdim=True)
            mask = torch.cat((mask[..., :1] | empty, mask[..., 1:]), -1)
        self.mask = mask
        # On legal actions this floor only acts where float32 cannot hold the difference of two logits.
        self._logits = below_top(logits, mask, lowest=LOGIT_FLOOR)
        self._unimix = unimix

    @computed_once
    def _weights(self) -> Float[Tensor, "*B N"]:
        """The probabilities times one number for each row; the largest is 1."""
        # torch.softmax is ten times slower than this on a CPU where rows are as short as a latent's classes, and so is
        # an exponential that is too small for its type.
        # What is too small, illegal actions with it, is exactly 0: no noise draws it.
        return self._logits.clamp(min=LEAST_EXPONENT).exp() * (self._logits > LEAST_EXPONENT)

    @computed_once
    def _total(self) -> Float[Tensor, "*B 1"]:
        return self._weights.sum(-1, keepdim=True)

    @computed_once
    def probs(self) -> Float[Tensor, "*B N"]:
        """The probability of every action; exactly 0 where it is illegal."""
        probs = self._weights / self._total
        if not self._unimix:
            return probs
        if self.mask is None:
            return probs * (1 - self._unimix) + self._unimix / probs.shape[-1]
        return mixed(probs, self.mask / _count(self.mask), self._unimix)

    @computed_once
    def log_probs(self) -> Float[Tensor, "*B N"]:
        """The natural logarithm of `probs`; a large negative number where that is 0."""
        if not self._unimix:
            return self._logits - self._total.log()
        return self.probs.clamp(min=torch.finfo(torch.float32).tiny).log()

    def log_prob(self, action: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Natural logarithm of the probability of each action index; a large negative number for an illegal one."""
        return self.log_probs.gather(-1, action[..., None]).squeeze(-1)

    def entropy(self) -> Float[Tensor, "*B"]:
        """Shannon entropy in nats."""
        # Where a probability is 0 its logarithm is finite, so the term is 0.
        return -(self.probs * self.log_probs).sum(-1)

    def mode(self) -> Int[Tensor, "*B"]:
        """Index of the likeliest action."""
        return self.probs.argmax(-1)

    def sample(self, noise: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """Index of an action drawn by inverting the cumulative distribution at `noise`, uniform in [0, 1).

        Never an action of probability 0, whatever rounding does to the cumulative sum.
        """
        cumulative = self.probs.detach().cumsum(-1)
        total = cumulative[..., -1:]
        drawn = (cumulative <= noise[..., None] * total).sum(-1)
        last_possible = (cumulative < total).sum(-1)
        return torch.minimum(drawn, last_possible)

    def one_hot(self, action: Int[Tensor, "*B"]) -> Float[Tensor, "*B N"]:
        """`action` as a one-hot vector whose gradient is that of the probabilities (straight-through)."""
        hard = torch.zeros_like(self.probs).scatter_(-1, action[..., None], 1.0)
        return hard + (self.probs - self.probs.detach()) if self.probs.requires_grad else hard

    def named(self) -> dict[str, Float[Tensor, "*B N"]]:
        """What it is, for others to draw from: the logarithm of every probability."""
        return {"logits": self.log_probs}

    def embed(self, action: Int[Tensor, "*B"]) -> Float[Tensor, "*B N"]:
        """What a world model sees of `action`, with a gradient: see `one_hot`."""
        return self.one_hot(action)

    def detach(self) -> OneHotDist:
        """The same distribution without a graph."""
        return OneHotDist(self._logits.detach(), mask=self.mask, unimix=self._unimix)

    def kl(self, other: OneHotDist) -> Float[Tensor, "*B"]:
        """Kullback-Leibler divergence from `other` to this distribution, in nats."""
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)


class SymexpTwoHot:
    """A real number as a categorical over exponentially spaced bins (DreamerV3, eq. 10)."""

    def __init__(self, logits: Float[Tensor, "*B C"], bins: Float[Tensor, " C"]) -> None:
        self.logits = widen(logits)
        self.bins = bins

    @computed_once
    def log_probs(self) -> Float[Tensor, "*B C"]:
        """The natural logarithm of every bin's probability."""
        return torch.log_softmax(self.logits, -1)

    def mean(self) -> Float[Tensor, "*B"]:
        """The expectation. Symmetric bins are subtracted before they are weighed, so that equal ones cancel exactly."""
        half = self.bins.shape[0] // 2
        probs = torch.softmax(self.logits, -1)
        # The bin in the middle is 0.
        return (probs[..., -half:] - probs[..., :half].flip(-1)) @ self.bins[-half:]

    def log_prob(self, value: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Minus the cross-entropy to the two-hot code of `value`, which is clamped to the bins' range."""
        value = value.detach().float().clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, value.contiguous()).clamp(1, self.bins.shape[0] - 1)
        below = above - 1
        low, high = self.bins[below], self.bins[above]
        weight = (value - low) / (high - low)
        neighbours = self.log_probs.gather(-1, torch.stack((below, above), -1))
        # Minus infinity where float32 cannot hold the difference of two logits, and a weight may be 0.
        log_low, log_high = neighbours.clamp(min=LOGIT_FLOOR).unbind(-1)
        return (1 - weight) * log_low + weight * log_high


def symexp_bins(count: int, *, limit: float = 20.0, device: torch.device | str) -> Float[Tensor, " C"]:
    """`count` exponentially spaced bins, symmetric to the last bit, from symexp(-limit) to symexp(limit)."""
    if count < 3 or count % 2 == 0:
        raise UserError(f"two-hot bins must be odd and at least 3, got {count}")
    if torch.device(device).type == "meta":
        # There are no numbers there, and asking for them would import PyTorch's compiler.
        return torch.empty(count, device=device)
    positive = symexp(torch.linspace(0, limit, count // 2 + 1, device=device))
    return torch.cat((-positive[1:].flip(0), positive))


class SymlogGaussian:
    """A vector with unit variance in symlog space; its `log_prob` is minus half the squared error there."""

    def __init__(self, mean: Float[Tensor, "*B F"]) -> None:
        self.symlog_mean = widen(mean)

    def mean(self) -> Float[Tensor, "*B F"]:
        """The prediction, in the target's own unit."""
        return symexp(self.symlog_mean)

    def log_prob(self, value: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """Minus half the squared distance in symlog space, summed over the last dimension."""
        return -0.5 * self.squared_error(value)

    def squared_error(self, value: Float[Tensor, "*B F"]) -> Float[Tensor, "*B"]:
        """The squared distance in symlog space, summed over the last dimension."""
        distance = self.symlog_mean - symlog(value.detach().float())
        return distance.clamp(-LARGEST_DISTANCE, LARGEST_DISTANCE).square().sum(-1)


class BernoulliDist:
    """Independent yes/no variables given by their logits."""

    def __init__(self, logits: Float[Tensor, "*B"]) -> None:
        # The clamp keeps sums of log-probabilities finite too.
        self.logits = logits.float().clamp(LOGIT_FLOOR, -LOGIT_FLOOR)

    def mean(self) -> Float[Tensor, "*B"]:
        """The probability of True."""
        return torch.sigmoid(self.logits)

    def mode(self) -> Bool[Tensor, "*B"]:
        """Whether True is the likelier value."""
        return self.logits > 0

    def log_prob(self, value: Bool[Tensor, "*B"] | Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Log-likelihood of `value`, which may be a probability too."""
        return -functional.binary_cross_entropy_with_logits(self.logits, value.to(self.logits.dtype), reduction="none")


class Bounds(NamedTuple):
    """The least and the largest that something can be."""

    low: Tensor
    high: Tensor


def lambda_return(
    reward: Float[Tensor, "*B H"],
    value: Float[Tensor, "*B H+1"],
    discount: Float[Tensor, "*B H"],
    *,
    lambda_: float | Float[Tensor, "*B H"],
) -> Float[Tensor, "*B H"]:
    """TD(lambda) returns R_t = r_t + c_t ((1 - lambda) v_{t+1} + lambda R_{t+1}), with R_H = v_H (DreamerV3, eq. 7).

    Args:
        reward: reward[t] is what action t earned.
        value: value[t] is the estimate before action t; the last one bootstraps.
        discount: discount[t] is the discount factor times the probability that the episode goes on after action t.
        lambda_: 0 trusts the values, 1 the rewards; one number, or one for each step.
    """
    mix = lambda_ if isinstance(lambda_, Tensor) else torch.full_like(reward, lambda_)
    target = value[..., -1]
    returns = []
    for t in reversed(range(reward.shape[-1])):
        mixed = value[..., t + 1].lerp(target, mix[..., t])
        target = reward[..., t] + discount[..., t] * mixed
        returns.append(target)
    return torch.stack(returns[::-1], -1)


@torch.no_grad()
def follow_slowly(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: Float[Tensor, ""]) -> None:
    """Move each of `slow` towards its partner by a share of the way that the device alone knows.

    `torch._foreach_lerp_` takes the share as a number, for which the host would have to wait.
    """
    steps = torch._foreach_sub(list(fast), list(slow))
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(list(slow), steps)


def leave_one_out(returns: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """For each of the K returns of one start, the mean of the other K - 1 (Kool et al. 2019, "Buy 4 samples")."""
    return (returns.sum(-1, keepdim=True) - returns) / (returns.shape[-1] - 1)


class ReturnScale(nn.Module):
    """How large returns are, as a running statistic: what advantages are divided by.

    `percentile`: the range between the 5th and the 95th percentile (DreamerV3, eq. 11 and 12); `mean_abs`: the mean
    absolute return; `none`: 1. Never below `floor`, so that small advantages are not blown up.
    """

    low: Tensor
    high: Tensor
    shares: Tensor
    METHODS = ("percentile", "mean_abs", "none")

    def __init__(self, method: str, *, floor: float = 1.0, rate: float = 0.01) -> None:
        if method not in self.METHODS:
            raise UserError(f"advantage scaling is {method!r}; choose one of {', '.join(self.METHODS)}")
        super().__init__()
        self.method, self.floor, self.rate = method, floor, rate
        self.register_buffer("low", torch.zeros((), device=torch.get_default_device()))
        self.register_buffer("high", torch.zeros((), device=torch.get_default_device()))
        # Kept on the device, since making a tensor of numbers there would wait for it.
        self.register_buffer("shares", torch.tensor([0.05, 0.95], device=torch.get_default_device()), persistent=False)
        self._before = (self.low.clone(), self.high.clone())

    @torch.no_grad()
    def update(self, returns: Float[Tensor, "*B"]) -> None:
        """Move the statistic towards this batch of returns; a batch that is not finite leaves it as it is."""
        self._before = (self.low.clone(), self.high.clone())
        if self.method != "none":
            returns = here().gather(returns)
        if self.method == "percentile":
            low, high = torch.quantile(returns.flatten(), self.shares).unbind()
        elif self.method == "mean_abs":
            low, high = torch.zeros_like(self.low), returns.abs().mean()
        else:
            return
        finite = low.isfinite() & high.isfinite()
        self.low.copy_(torch.where(finite, self.low.lerp(low, self.rate), self.low))
        self.high.copy_(torch.where(finite, self.high.lerp(high, self.rate), self.high))

    @torch.no_grad()
    def revert_unless(self, applied: Float[Tensor, ""]) -> None:
        """Undo the last `update` where the actor's update that it was for has been skipped (`applied` is 0)."""
        for value, before in zip((self.low, self.high), self._before, strict=True):
            value.copy_(torch.where(applied > 0, value, before))

    def scale(self) -> Float[Tensor, ""]:
        """The number that advantages are divided by."""
        if self.method == "none":
            return torch.ones_like(self.high)
        return (self.high - self.low).clamp(min=self.floor)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise for the samplers, uniform in [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)
