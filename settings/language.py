"""What a language model's run reads: prompts, what answers earn, the model, and how its words are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from settings.sections import Between, Count, Layers, NotNegative, Section
from system.errors import ConfigError

# The task whose instances are prompts.
TEXT = "text"


@dataclass(frozen=True)
class LanguageSettings(Section):
    """Prompts, and a causal language model.

    Attributes:
        prompts: the name of prompts that are made here, or a file of JSON lines.
        reward: what an answer earns: a name, or the user's own module:function.
        held_out: share of the prompts that validate, and as large a share that tests.
        model: a folder or a hub's name; empty: a GPT-2 with random weights, of the sizes below.
        most_tokens: of an answer, the one that ends it included.
        rows_at_once: samples that are learnt from at once, for memory's sake; 0: all of an update.
        temperature: that log-probabilities are divided by.
        clip: log-probabilities are within -2 times this of the largest.
        min_prob: the least probability of a legal token, before the temperature.
    """

    PLACE = "language"

    prompts: str
    reward: str
    held_out: Annotated[float, Between(0, 0.4, above=True)]
    model: str
    width: Count
    layers: Layers
    heads: Count
    most_tokens: Count
    rows_at_once: NotNegative
    temperature: Annotated[float, Between(0.1)]
    clip: Annotated[float, Between(1)]
    min_prob: Annotated[float, Between(0, 1e-3)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and self.width % self.heads:
            raise ConfigError(
                f"language.width is {self.width}; language.heads, {self.heads}, has to divide it without a rest"
            )
