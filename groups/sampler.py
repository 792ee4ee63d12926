"""What a trainer of groups asks of a policy, whatever it decides: to draw samples, and to score them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groups.losses import Metrics, Scored
from training.resuming import require_like


class Samples(NamedTuple):
    """What a policy has decided: K samples of each of B groups, T decisions at most.

    Attributes:
        reward: that each sample earned.
        counted: 1 where a decision was made, and 0 behind a sample's end.
        decisions: all that it takes to score them again, as the kind of policy keeps it.
        log_prob: of the decisions, as they were drawn; None where nobody noted it.
    """

    reward: Float[Tensor, "B K"]
    counted: Float[Tensor, "B K T"]
    decisions: Any
    log_prob: Float[Tensor, "B K T"] | None = None

    def named(self) -> dict[str, Tensor]:
        """The numbers among them, for a report of what was not finite."""
        return {"reward": self.reward}


class Sampler(nn.Module, ABC):
    """A policy that decides about prompts or instances of its own choice.

    Attributes:
        policy: what learns.
        longest: decisions of the longest possible sample.
        players: who plays evaluations, by name; `policy` among them.
    """

    policy: nn.Module
    longest: int
    players: Mapping[str, Any]

    @property
    @abstractmethod
    def seen(self) -> str:
        """What samples are of, in words."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Why some of what was to be learnt from is left out, a line each."""
        return ()

    @abstractmethod
    def draw(self, groups: int, samples: int, *, generator: torch.Generator, environment: torch.Generator) -> Samples:
        """New prompts or instances, and decisions about them.

        Args:
            groups: how many.
            samples: of each.
            generator: draws decisions.
            environment: draws what they are about.
        """

    @abstractmethod
    def score(self, policy: nn.Module, decisions: Any) -> Scored:
        """What a policy makes of decisions that `draw` gave, with its graph.

        Args:
            policy: this one's, or a copy of it.
            decisions: of samples.
        """

    @abstractmethod
    def steps(self, samples: Samples) -> Float[Tensor, ""]:
        """What the samples count as on the run's clock."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint has to tell of what was learnt from."""
        return {}

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Raise a UserError where a checkpoint is of a run that learnt from something else."""

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Raise a UserError where weights cannot mean here what they meant where they were learnt."""

    def save_pretrained(self, folder: Path) -> None:
        """Write a policy whose library has a format of its own in that, too."""

    def metrics(self, samples: Samples) -> Metrics:
        """What else is worth knowing of samples."""
        return {}

    def weights(self, policy: nn.Module | None = None) -> dict[str, Tensor]:
        """The weights of the policy, or of a copy of it; those that two modules share are there once."""
        named = (policy or self.policy).named_parameters()
        # Without what a library may have noted on its parameters, which no checkpoint could be loaded with.
        return {name: parameter.detach() for name, parameter in named}

    def load_weights(self, state: Mapping[str, Tensor], policy: nn.Module | None = None) -> None:
        """The inverse of `weights`.

        Raises:
            RuntimeError: the weights are of another policy.
        """
        policy = policy or self.policy
        require_like(self.weights(policy), state, "policy")
        policy.load_state_dict(state, strict=False)
