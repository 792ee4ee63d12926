"""What nobody knows yet as a reward in imagination: an ensemble, and how much its members disagree."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from envs.tasks import ActionSpec
from imagining.world_model import Metrics, Observed
from networks import RSSM
from parts.latents import Chosen, ClassLinear
from parts.layers import BlockLinear, embed_actions
from settings.dreamer import ExploreSettings

EPSILON = 1e-4


class Explorer(nn.Module):
    """An ensemble that predicts the next latent's probabilities, and what its disagreement is worth (Plan2Explore,
    Sekar et al. 2020).

    Its members learn from the same replayed rows and differ in their initial weights alone. Where they have seen what
    an action leads to, they agree; the variance between them is what is left to be learnt there. Random outcomes that
    they know to be random leave none, since it is probabilities that they predict.

    No gradient leads from here into the world model.
    """

    def __init__(self, actions: ActionSpec, rssm: RSSM, settings: ExploreSettings) -> None:
        """Build the ensemble.

        Args:
            actions: what can be done.
            rssm: whose latents it predicts.
            settings: the config section `explore`.
        """
        super().__init__()
        self.actions, self.scale, self.members, self.units = actions, settings.scale, settings.members, settings.units
        self.variables, self.classes = rssm.stoch_size, rssm.classes
        width = self.members * settings.units
        self.from_feat = ClassLinear(rssm.feat_size, width)
        self.from_action = nn.Linear(actions.embed_size, width, bias=False)
        # Each block is a member, and sees nothing of the others.
        self.hidden = nn.ModuleList(BlockLinear(width, width, blocks=self.members) for _ in range(settings.layers - 1))
        self.output = BlockLinear(width, self.members * self.variables * self.classes, blocks=self.members)

    def predict(
        self, feat: Float[Tensor, "*B F"] | Chosen, action: Shaped[Tensor, "*B *A"]
    ) -> Float[Tensor, "*B M S K"]:
        """What each of M members expects of the latent after an action: the probability of every class."""
        x = self.from_feat(feat) + self.from_action(embed_actions(self.actions, action))
        shape = x.shape[:-1]
        x = self._normed(x.reshape(-1, x.shape[-1]))
        for layer in self.hidden:
            x = self._normed(layer(x))
        return self.output(x).float().view(*shape, self.members, self.variables, self.classes)

    def _normed(self, x: Float[Tensor, "R W"]) -> Float[Tensor, "R W"]:
        each = x.view(len(x), self.members, self.units)
        return functional.silu(functional.rms_norm(each, (self.units,), eps=EPSILON)).flatten(1)

    def disagreement(
        self, feat: Float[Tensor, "*B F"] | Chosen, action: Shaped[Tensor, "*B *A"]
    ) -> Float[Tensor, "*B"]:
        """The variance between members (Plan2Explore, eq. 3): of a latent variable's classes together, on average.

        Between 0, where all say the same, and 1.
        """
        return self.predict(feat, action).var(-3).sum(-1).mean(-1)

    def bonus(self, feat: Float[Tensor, "*B F"] | Chosen, action: Shaped[Tensor, "*B *A"]) -> Float[Tensor, "*B"]:
        """What not knowing where an action leads is worth, in the units of rewards."""
        return self.scale * self.disagreement(feat, action)

    def loss(self, batch: dict[str, Tensor], observed: Observed) -> tuple[Float[Tensor, ""], Metrics]:
        """The members' squared error on replayed rows, and metrics."""
        feat, action = observed.latents.feat().detach()[:, :-1], batch["action"][:, :-1]
        target = observed.posterior.probs.detach()[:, 1:, None]
        predicted = self.predict(feat, action)
        error = (predicted - target).square().sum(-1).mean((-1, -2))
        spread = predicted.detach().var(-3).sum(-1).mean(-1)
        # What follows an episode's last row is another episode.
        weight = (~batch["is_last"][:, :-1]).float()
        total = weight.sum().clamp(min=1e-8)
        loss = (error * weight).sum() / total
        return loss, {"explore_loss": loss.detach(), "disagreement": (spread * weight).sum() / total}

    @torch.no_grad()
    def rewarded(self, batch: dict[str, Tensor], observed: Observed) -> dict[str, Tensor]:
        """Replayed sequences whose rewards have what their actions were worth to the explorer, too."""
        bonus = self.bonus(observed.latents.feat()[:, :-1], batch["action"][:, :-1])
        bonus = bonus.masked_fill(batch["is_last"][:, :-1], 0.0)
        reward = batch["reward"] + functional.pad(bonus, (1, 0))
        return {**batch, "reward": reward}
