"""Language models that complete prompts: drawn from processed log-probabilities, which are those that learn, too."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import UserError
from groups.losses import Metrics, Scored
from groups.sampler import Sampler, Samples
from language.models import make_language
from language.prompts import Example
from language.task import TextTask
from settings.language import LanguageSettings
from tools import LOGIT_FLOOR, OneHotDist, stable_log_probs, uniform


class Texts(NamedTuple):
    """Prompts with their completions as tokens: R rows of P tokens of prompts, at the end, and T of completions.

    Attributes:
        tokens: padded before the prompt and behind the end.
        attended: 1 where a token is no padding.
        action: the completions' tokens, K of each of B prompts.
    """

    tokens: Int[Tensor, "R L"]
    attended: Int[Tensor, "R L"]
    action: Int[Tensor, "B K T"]


class Completion(NamedTuple):
    """What was made of a prompt, and what it earned."""

    example: Example
    text: str
    reward: float


class TextSampler(Sampler):
    """A causal language model."""

    def __init__(
        self, task: TextTask, settings: LanguageSettings, *, half_precision: bool, device: torch.device
    ) -> None:
        """Load the model, or make one.

        Args:
            task: prompts and rewards.
            settings: the model, and how its tokens are drawn.
            half_precision: whether it computes in bfloat16, from weights that stay in float32.
            device: where it lives.

        Raises:
            UserError: there is no such model, or it cannot hold the prompts.
        """
        super().__init__()
        prompts = task.prompts
        self.task, self.settings, self.device = task, settings, device
        self.longest = settings.most_tokens
        everything = [*prompts.training, *prompts.validation, *prompts.test]
        self.policy, self.tokenizer = make_language(settings, everything)
        self.policy.to(device)
        self.half_precision = half_precision
        self.takes = frozenset(inspect.signature(self.policy.forward).parameters)
        # What it is called depends on the version of transformers.
        self.cache = "cache" if "cache" in self.takes else "past_key_values"
        # What was wrong with logits since the last samples were drawn, by kind.
        self.wrong: dict[str, Tensor] = {}
        self.players: Mapping[str, Any] = {"policy": self}

    @property
    def seen(self) -> str:
        prompts = self.task.prompts
        held_out = len(prompts.validation) + len(prompts.test)
        return f"{len(prompts.training):,} prompts of {self.task.name}, and {held_out:,} more are held out"

    def facts(self) -> dict[str, Any]:
        prompts = self.task.prompts
        examples = [prompts.training, prompts.validation, prompts.test]
        words = sorted(self.tokenizer.get_vocab().items())
        return {"prompts": zlib.crc32(repr(examples).encode()), "vocabulary": zlib.crc32(repr(words).encode())}

    def require_same(self, state: Mapping[str, Any]) -> None:
        self.require_fit(state)
        if state["prompts"] != self.facts()["prompts"]:
            raise UserError(
                f"{self.task.name} holds other prompts than those that the run has learnt from, or holds out others;"
                " begin another run, with --init for its weights"
            )

    def require_fit(self, state: Mapping[str, Any]) -> None:
        if state["vocabulary"] != self.facts()["vocabulary"]:
            raise UserError(
                f"the weights are of another vocabulary than that of {self.task.name}; give --language.model with the"
                " folder `model` of their run's logdir, which has both"
            )

    @property
    def faults(self) -> tuple[str, ...]:
        return self.task.prompts.faults

    @torch.no_grad()
    def draw(self, groups: int, samples: int, *, generator: torch.Generator, environment: torch.Generator) -> Samples:
        examples = self.task.prompts.training
        chosen = (uniform((groups,), environment) * len(examples)).long().tolist()
        rows = [examples[index] for index in chosen for _ in range(samples)]
        texts, counted, log_prob = self._complete([row.prompt for row in rows], generator=generator)
        reward = torch.tensor([each.reward for each in self._judged(rows, texts)], device=self.device)
        shape = (groups, samples)
        texts = texts._replace(action=texts.action.view(*shape, -1))
        return Samples(reward.view(shape), counted.view(*shape, -1), texts, log_prob.view(*shape, -1))

    @torch.no_grad()
    def complete(self, examples: Sequence[Example]) -> list[Completion]:
        """The likeliest completion of every prompt, token by token, and what it earns."""
        texts, _, _ = self._complete([example.prompt for example in examples], generator=None)
        return self._judged(examples, texts)

    def _judged(self, examples: Sequence[Example], texts: Texts) -> list[Completion]:
        written = self.tokenizer.batch_decode(texts.action.flatten(0, -2), skip_special_tokens=True)
        return [
            Completion(example, text, self.task.reward(example.prompt, text, example.answer))
            for example, text in zip(examples, written, strict=True)
        ]

    def _complete(
        self, prompts: Sequence[str], *, generator: torch.Generator | None
    ) -> tuple[Texts, Float[Tensor, "R T"], Float[Tensor, "R T"]]:
        """Completions of R prompts, where a token counts, and the tokens' log-probabilities."""
        encoded = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        tokens, attended = encoded["input_ids"], encoded["attention_mask"]
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        running = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        length, shown, cache = tokens.shape[1], tokens, None
        counted, chosen = [], []
        for _ in range(self.longest):
            output = self._forward(self.policy, shown, attended, use_cache=True, **{self.cache: cache})
            cache = output[self.cache]
            dist = self.distribution(output.logits[:, -1])
            token = dist.mode() if generator is None else dist.sample(uniform((len(tokens),), generator))
            token = torch.where(running, token, pad)
            chosen.append(dist.log_prob(token) * running)
            counted.append(running.float())
            tokens = torch.cat((tokens, token[:, None]), 1)
            attended = torch.cat((attended, running[:, None].to(attended.dtype)), 1)
            running = running & (token != end)
            shown = token[:, None]
            if not bool(running.any()):
                break
        return Texts(tokens, attended, tokens[:, length:]), torch.stack(counted, 1), torch.stack(chosen, 1)

    def score(self, policy: nn.Module, decisions: Texts) -> Scored:
        shape, action = decisions.action.shape, decisions.action.flatten(0, 1)
        rows = (decisions.tokens, decisions.attended, action)
        most = self.settings.rows_at_once
        if most and most < len(action):
            # What a part needs for its gradient is computed again when it is asked for, and not kept until then.
            parts = [
                checkpoint(self._score_rows, policy, *part, use_reentrant=False)
                for part in zip(*(each.split(most) for each in rows), strict=True)
            ]
            log_prob, entropy = (torch.cat(each) for each in zip(*parts, strict=True))
        else:
            log_prob, entropy = self._score_rows(policy, *rows)
        return Scored(log_prob.view(shape), entropy.view(shape), torch.zeros((), device=self.device))

    def _score_rows(
        self, policy: nn.Module, tokens: Int[Tensor, "R L"], attended: Int[Tensor, "R L"], action: Int[Tensor, "R T"]
    ) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"]]:
        """Log-probabilities of tokens, and entropies of what they were drawn from."""
        steps = action.shape[-1]
        options = {"logits_to_keep": steps + 1} if "logits_to_keep" in self.takes else {}
        output = self._forward(policy, tokens, attended, use_cache=False, **options)
        # What stands at a token is about the next one.
        dist = self.distribution(output.logits[:, -steps - 1 : -1])
        return dist.log_prob(action), dist.entropy()

    def _forward(self, policy: nn.Module, tokens: Tensor, attended: Tensor, **options: Any) -> Any:
        """A pass over the last tokens of rows; positions are counted from where a row's prompt begins."""
        if "position_ids" in self.takes:
            places = (attended.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -tokens.shape[1] :]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half_precision):
            return policy(input_ids=tokens, attention_mask=attended, **options)

    def distribution(self, logits: Float[Tensor, "*B V"]) -> OneHotDist:
        """What tokens are drawn from, and learnt by: logits made stable, over the temperature."""
        choice = self.settings
        stable = stable_log_probs(logits, clip=choice.clip, min_prob=choice.min_prob, illegal=LOGIT_FLOOR)
        for name, count in (("nan", stable.nan), ("inf", stable.inf)):
            self.wrong[name] = self.wrong.get(name, torch.zeros_like(count)) + count
        return OneHotDist(stable.log_probs / choice.temperature)

    def steps(self, samples: Samples) -> Float[Tensor, ""]:
        """Completions."""
        return torch.full((), float(samples.reward.numel()), device=self.device)

    def metrics(self, samples: Samples) -> Metrics:
        wrong = {f"logits_{name}_max": count.float() for name, count in self.wrong.items()}
        self.wrong = {}
        return {"completion_length": samples.counted.sum(-1).mean(), **wrong}

    def save_pretrained(self, folder: Path) -> None:
        """Write model and tokeniser in their own format, which `language.model` takes."""
        model: Any = self.policy
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
