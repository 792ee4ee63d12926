"""Logits that cannot kill sampling: processors for the `generate()` of Hugging Face's transformers.

    from logits import StableLogitsProcessor, TemperatureLogitsWarper
    processors = LogitsProcessorList([StableLogitsProcessor(), TemperatureLogitsWarper(0.8)])
    model.generate(**inputs, do_sample=True, logits_processor=processors)

The stable one comes first, the temperature second. Both read scores alone: they are for text, and look at no image that
a model may have been given. They need the extra `lm`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from config import UserError
from tools import stable_log_probs

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise UserError('logits.py needs transformers: pip install -e ".[lm]"') from error


class StableLogitsProcessor(LogitsProcessor):
    """Scores to log-probabilities that `torch.multinomial` can draw from, whatever they are: see `stable_log_probs`.

    What is -infinity on entry, since bad words, top-k or top-p forbid it, is so on return; NaN becomes so, too. All
    else has at least the probability `min_prob` and is finite, in float32. It belongs before whatever sorts or sums
    scores, which NaN would lead astray. `generate()` itself runs it after bad words and before top-k and top-p.

    A row with nothing legal gets `fallback_token` with probability 1, or where that is None, uniform probabilities over
    those of its tokens that are NaN, and over all tokens if all are -infinity. `generate()` forbids a bad word by
    adding -infinity, which leaves NaN what it is: in a row of nothing but NaN only a `fallback_token` is sure to be no
    bad word.

    Counts are kept on the scores' device, and nothing waits for it before `get_stats`.
    """

    # Each row is judged by itself, whoever shares its batch.
    supports_continuous_batching = True

    def __init__(self, clip_value: float = 30.0, min_prob: float = 1e-8, *, fallback_token: int | None = None) -> None:
        """Take the settings.

        Args:
            clip_value: half of how far, in nats, a token can be below its row's best.
            min_prob: the least probability of a legal token; less than 1 by the size of the vocabulary.
            fallback_token: what a row without any legal token ends in, such as the end of the text; None for any.

        Raises:
            UserError: a number is out of its range.
        """
        if not (math.isfinite(clip_value) and clip_value > 0):
            raise UserError(f"clip_value is {clip_value}; it must be a number above 0")
        if not 0 <= min_prob < 1:
            raise UserError(f"min_prob is {min_prob}; it must be at least 0, and below 1 by the size of the vocabulary")
        if fallback_token is not None and fallback_token < 0:
            raise UserError(f"fallback_token is {fallback_token}; it must be the number of a token, or None")
        self.clip_value, self.min_prob, self.fallback_token = clip_value, min_prob, fallback_token
        self._counts: dict[str, Tensor] = {}

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Log-probabilities of the next token.

        Raises:
            UserError: the vocabulary is too small for `fallback_token`, or too large for `min_prob`.
        """
        found = stable_log_probs(scores, clip=self.clip_value, min_prob=self.min_prob)
        self._add("nan_count", found.nan)
        self._add("inf_count", found.inf)
        self._add("clip_count", found.clipped)
        self._add("fallback_count", found.empty.sum())
        if self.fallback_token is None:
            return found.log_probs
        size = scores.shape[-1]
        if self.fallback_token >= size:
            raise UserError(f"fallback_token is {self.fallback_token}; the vocabulary ends at {size - 1}")
        certain = torch.full_like(found.log_probs[:1], -math.inf)
        certain[:, self.fallback_token] = 0.0
        return torch.where(found.empty[:, None], certain, found.log_probs)

    def get_stats(self) -> dict[str, int]:
        """Counts since the last reset; waits for the device.

        `nan_count`, `inf_count` (+infinity; -infinity is how tokens are forbidden), `clip_count` (legal tokens that
        were further from the top than twice `clip_value`) and `fallback_count` (rows with nothing legal).
        """
        names = ("nan_count", "inf_count", "clip_count", "fallback_count")
        return {name: int(self._counts[name]) if name in self._counts else 0 for name in names}

    def reset_stats(self) -> None:
        """Count from 0 again."""
        self._counts = {}

    def _add(self, name: str, count: Int[Tensor, ""]) -> None:
        # Of 64 bits: a vocabulary of NaN, step after step, is more than 32 bits hold.
        count = count.to(torch.int64)
        before = self._counts.get(name)
        self._counts[name] = count if before is None else before.to(count.device) + count


class TemperatureLogitsWarper(LogitsProcessor):
    """Scores divided by a temperature, which counts as at least `min_temperature`.

    What is -infinity stays so. The result is no longer normalised; `generate()` does that, as `torch.softmax` does.
    """

    supports_continuous_batching = True

    def __init__(self, temperature: float, min_temperature: float = 0.1) -> None:
        """Take the settings.

        Raises:
            UserError: a number is out of its range.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}; it must be a number of at least 0")
        if not (math.isfinite(min_temperature) and min_temperature > 0):
            raise UserError(f"min_temperature is {min_temperature}; it must be a number above 0")
        self.temperature = max(temperature, min_temperature)

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The scores of the next token at this temperature."""
        return scores / self.temperature
