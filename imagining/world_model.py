"""What all world models have in common: an RSSM between an encoder and heads, and the losses of its latents.

Two kinds stand on it: `routing_model` and `observation_model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from envs.tasks import Task
from networks import RSSM, Latent
from parts.latents import Feat
from parts.layers import initialise, use_layer_norm
from parts.moves import Moves
from settings.dreamer import ModelSettings
from system.ranks import here
from tools import BernoulliDist, OneHotDist, symexp_bins

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]
# Takes one value for each row of a batch, and gives their mean over the rows that count.
RowMean = Callable[[Float[Tensor, "B T"]], Float[Tensor, ""]]


class Observed(NamedTuple):
    """Replayed sequences as the model sees them: latents [B, T] with their posterior and prior, and static context.

    `embed` is how the observations are encoded, where somebody may ask for that.
    """

    latents: Latent
    posterior: OneHotDist
    prior: OneHotDist
    context: Any
    embed: Float[Tensor, "B T E"] | None = None


class WorldModel(nn.Module, ABC):
    """An RSSM with an encoder and heads that fit the task.

    A subclass builds them, and says what its context is: what never changes within an episode, handed to whoever
    embeds observations or actions.

    Attributes:
        separate_reward: whether the reward head can be trained alone, by `reward_loss`, at little cost.
        loss_scales: of the losses that there are, by name; a head whose scale is 0 is not built.
        traceable: whether `losses_of` can be compiled.
        memory_spaces: shape and dtype of what replay keeps of each row's latent; empty where it keeps nothing.
    """

    bins: Tensor
    rssm: RSSM
    heads: nn.ModuleDict
    separate_reward: bool = False
    traceable: bool = True
    loss_scales: dict[str, float]
    memory_spaces: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    def __init__(self, task: Task, settings: ModelSettings) -> None:
        """Take what does not depend on the kind of task.

        Args:
            task: what there is to model.
            settings: the config section `model`.
        """
        super().__init__()
        self.task = task
        self.free_nats = settings.free_nats
        self.register_buffer("bins", symexp_bins(settings.bins, device=torch.get_default_device()))

    def _finish(self, settings: ModelSettings) -> None:
        """Change norms and initial weights as the settings say, once all is built."""
        if settings.norm == "layer":
            use_layer_norm(self)
        if settings.initialisation == "published":
            initialise(self)

    @abstractmethod
    def encode(self, obs: dict[str, Tensor], context: Any, view: Any) -> Float[Tensor, "*B U"]:
        """Embed observations."""

    @abstractmethod
    def embed_action(self, action: Shaped[Tensor, "B *Q"], context: Any) -> Float[Tensor, "B *P A"]:
        """What the RSSM sees of actions [B, *Q, *shape]."""

    @abstractmethod
    def embed_choice(self, choice: Float[Tensor, "B Q N"], context: Any) -> Float[Tensor, "B Q A"]:
        """What the RSSM sees of actions that come as a distribution embeds them, with the gradient that they carry."""

    @abstractmethod
    def observe(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> Observed:
        """Infer the latents of replayed sequences."""

    @abstractmethod
    def predict_mask(self, feat: Feat, context: Any) -> Bool[Tensor, "B *Q N"]:
        """The action mask that the mask head decodes; its best logit is always kept open."""

    @abstractmethod
    def _head_losses(
        self, batch: dict[str, Tensor], observed: Observed, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Losses, Metrics]:
        """The losses of all heads, in the order in which values flow; metrics."""

    @abstractmethod
    def _row_weight(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        """How much each row of a batch counts."""

    def reward_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Float[Tensor, ""], Metrics]:
        """The scaled loss of the reward head alone, and metrics, where `separate_reward` says that there is one."""
        raise AssertionError("this model's rewards are learnt with the rest of it")

    def study(self, moves: Moves) -> tuple[Float[Tensor, ""], Metrics]:
        """The scaled loss of the reward head on logged moves, and metrics, where it reads nothing but moves."""
        raise AssertionError("this model's rewards are no function of moves")

    def predict_logged(self, moves: Moves) -> Float[Tensor, "K M"]:
        """What each member of the head's ensemble expects logged moves to earn, likewise."""
        raise AssertionError("this model's rewards are no function of moves")

    def memory(self, latent: Latent) -> dict[str, Tensor]:
        """A latent as replay keeps it, under the keys of `memory_spaces`."""
        return {}

    def loss(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> tuple[Losses, Metrics, Observed]:
        """The losses of one batch, each a mean over the rows that count; metrics; the latents."""
        observed = self.observe(batch, noise)
        losses, metrics = self.losses_of(batch, observed)
        return losses, metrics, observed

    def losses_of(self, batch: dict[str, Tensor], observed: Observed) -> tuple[Losses, Metrics]:
        """The losses of a batch whose latents are there, and metrics."""
        feat, weight = observed.latents.feat(), self._row_weight(batch)
        balance = here().balance(weight)

        def mean(values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
            return balance((values * weight).sum() / weight.sum())

        losses, metrics = self._latent_losses(observed, mean)
        head_losses, head_metrics = self._head_losses(batch, observed, feat, mean)
        losses |= head_losses
        metrics |= head_metrics
        assert set(losses) == set(self.loss_scales), f"losses {set(losses)} differ from scales {set(self.loss_scales)}"
        return losses, metrics | {f"{name}_loss": value.detach() for name, value in losses.items()}

    def total(self, losses: Losses) -> Float[Tensor, ""]:
        """The sum of the losses, each times its scale."""
        return torch.stack([self.loss_scales[name] * loss for name, loss in losses.items()]).sum()

    def _latent_losses(self, observed: Observed, mean: RowMean) -> tuple[Losses, Metrics]:
        """DreamerV3, eq. 3: each side of the KL is pulled to the other's detached value, free below `free_nats`."""
        posterior, prior = observed.posterior, observed.prior
        losses = {
            "dyn": mean(posterior.detach().kl(prior).sum(-1).clamp(min=self.free_nats)),
            "rep": mean(posterior.kl(prior.detach()).sum(-1).clamp(min=self.free_nats)),
        }
        metrics = {
            "prior_entropy": prior.entropy().sum(-1).mean().detach(),
            "posterior_entropy": posterior.entropy().sum(-1).mean().detach(),
        }
        return losses, metrics

    def _cont_loss(
        self, batch: dict[str, Tensor], feat: Float[Tensor, "B T F"], mean: RowMean, *, discount: float
    ) -> Float[Tensor, ""]:
        """Whether the episode goes on, times a discount factor."""
        cont = BernoulliDist(self.heads["cont"](feat).squeeze(-1))
        return mean(-cont.log_prob((~batch["is_terminal"]).float() * discount))
