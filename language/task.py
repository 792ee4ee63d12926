"""The task of a language model: to complete prompts, for a reward."""

from __future__ import annotations

from dataclasses import dataclass

from language.prompts import Prompts, find_prompts
from language.rewards import Reward, find_reward
from settings.language import LanguageSettings


@dataclass(frozen=True)
class TextTask:
    """Prompts to be completed.

    Attributes:
        name: of the prompts, as the config has it.
        prompts: all of them.
        reward: what a completion of a prompt earns, beside the answer that was looked for.
    """

    name: str
    prompts: Prompts
    reward: Reward

    @classmethod
    def of(cls, settings: LanguageSettings) -> TextTask:
        """The task that the section `language` describes.

        Raises:
            UserError: prompts or reward cannot be found.
        """
        reward = find_reward(settings.reward)
        return cls(settings.prompts, find_prompts(settings.prompts, held_out=settings.held_out), reward)
