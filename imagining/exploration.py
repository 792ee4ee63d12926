"""What nobody knows yet as a reward in imagination: an ensemble, and how much its members disagree."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from imagining.world_model import Metrics, Observed
from parts.latents import Chosen
from parts.layers import BlockLinear
from settings.dreamer import ExploreSettings
from system.ranks import here

EPSILON = 1e-4


class Members(nn.Module):
    """Several networks side by side, none of which sees anything of the others."""

    def __init__(self, size_in: int, size_out: int, *, members: int, units: int, layers: int) -> None:
        """Build all of them.

        Args:
            size_in: numbers that each of them reads.
            size_out: numbers that each of them predicts.
            members: how many there are.
            units: of each hidden layer of each.
            layers: hidden ones.
        """
        super().__init__()
        self.members, self.units = members, units
        width = members * units
        self.first = nn.Linear(size_in, width)
        # Each block is a member.
        self.hidden = nn.ModuleList(BlockLinear(width, width, blocks=members) for _ in range(layers - 1))
        self.output = BlockLinear(width, members * size_out, blocks=members)

    def forward(self, x: Float[Tensor, "R I"]) -> Float[Tensor, "R M O"]:
        x = self._normed(self.first(x))
        for layer in self.hidden:
            x = self._normed(layer(x))
        return self.output(x).float().unflatten(-1, (self.members, -1))

    def _normed(self, x: Float[Tensor, "R W"]) -> Float[Tensor, "R W"]:
        each = x.unflatten(-1, (self.members, self.units))
        return functional.silu(functional.rms_norm(each, (self.units,), eps=EPSILON)).flatten(1)


class Explorer(nn.Module):
    """An ensemble that predicts how the next observation is encoded, and what its disagreement is worth (Plan2Explore,
    Sekar et al. 2020).

    Its members read the recurrent state that the RSSM makes of a latent and an action, before anything is observed.
    They learn from the same replayed rows, and agree where they have seen what an action leads to; the variance between
    them is what is left to be learnt there. To each is added a random network that never learns (Osband et al. 2018):
    what was never seen keeps the differences between these, which training takes away elsewhere.

    No gradient leads from here into the world model.
    """

    def __init__(self, deter_size: int, embed_size: int, settings: ExploreSettings) -> None:
        """Build the ensemble.

        Args:
            deter_size: numbers of a recurrent state.
            embed_size: numbers of an encoded observation.
            settings: the config section `explore`.
        """
        super().__init__()
        self.scale = settings.scale
        sizes = {"members": settings.members, "units": settings.units, "layers": settings.layers}
        self.learnt = Members(deter_size, embed_size, **sizes)
        self.prior = Members(deter_size, embed_size, **sizes).requires_grad_(False)

    def predict(self, deter: Float[Tensor, "*B D"]) -> Float[Tensor, "*B M U"]:
        """What each of M members expects of the observation that comes with a recurrent state."""
        rows = deter.flatten(0, -2)
        return (self.learnt(rows) + self.prior(rows)).unflatten(0, deter.shape[:-1])

    def disagreement(self, deter: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """The variance between members, on average over what they predict (Plan2Explore, eq. 3)."""
        return _spread(self.predict(deter))

    def bonus(self, after: Float[Tensor, "*B F"] | Chosen) -> Float[Tensor, "*B"]:
        """What not knowing where an action leads is worth, in the units of rewards, by the latent after it."""
        deter = after.deter if isinstance(after, Chosen) else after[..., : self.learnt.first.in_features]
        return self.scale * self.disagreement(deter)

    def loss(self, batch: dict[str, Tensor], observed: Observed) -> tuple[Float[Tensor, ""], Metrics]:
        """The members' squared error on replayed rows, and metrics."""
        assert observed.embed is not None, "an ensemble predicts encoded observations"
        predicted = self.predict(observed.latents.deter.detach())
        error = (predicted - observed.embed.detach().float()[..., None, :]).square().mean((-1, -2))
        # Nothing has led to the first row of an episode.
        weight = (~batch["is_first"]).float()
        total = weight.sum().clamp(min=1e-8)
        loss = here().balance(weight)((error * weight).sum() / total)
        spread = (_spread(predicted.detach()) * weight).sum() / total
        return loss, {"explore_loss": loss.detach(), "disagreement": spread}

    @torch.no_grad()
    def rewarded(self, batch: dict[str, Tensor], observed: Observed) -> dict[str, Tensor]:
        """Replayed sequences in which each reward has what its action was worth to the explorer, too."""
        bonus = self.bonus(observed.latents.feat()).masked_fill(batch["is_first"], 0.0)
        return {**batch, "reward": batch["reward"] + bonus}


def _spread(predicted: Float[Tensor, "*B M U"]) -> Float[Tensor, "*B"]:
    return predicted.var(-2).mean(-1)
