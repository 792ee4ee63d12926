"""The world model of any gymnasium task: an encoder and a decoder per key of the observation, everything in latents."""

from __future__ import annotations

from dataclasses import asdict

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from config import UserError
from envs.tasks import ACTION_MASK, ObservationTask, wrong_share
from imagining.world_model import Losses, Metrics, Observed, RowMean, WorldModel
from networks import RSSM, Latent
from parts.latents import Chosen, Feat
from parts.layers import MLP, embed_actions
from parts.observations import ObservationDecoder, ObservationEncoder, select
from parts.views import View
from settings.dreamer import ModelSettings
from tools import BernoulliDist, SymexpTwoHot

# Heads of other kinds: about nodes, which only routing has, and about traffic.
OTHER_HEADS = ("current_node", "current_pos", "coords", "motion")


def make_decoder(task: ObservationTask, settings: ModelSettings) -> ObservationDecoder:
    """What predicts the observations of a task from latents, as the config section `model` describes it.

    Raises:
        UserError: nothing is to be decoded, or the sizes do not fit.
    """
    rssm = settings.rssm
    return ObservationDecoder(
        select(task.observations, settings.decode_keys),
        deter=rssm.deter,
        stoch_size=rssm.stoch * rssm.classes,
        units=settings.units,
        layers=settings.layers,
        depth=settings.depth,
        blocks=rssm.blocks,
    )


class ObservationModel(WorldModel):
    """A world model whose context is empty: all that it knows of an episode is in its latents."""

    def __init__(self, task: ObservationTask, settings: ModelSettings, *, discount: float) -> None:
        """Build encoder, RSSM, decoder and every head whose loss scale is not 0.

        Args:
            task: what there is to model.
            settings: the config section `model`.
            discount: folded into what the `cont` head predicts (DreamerV3).

        Raises:
            UserError: the settings do not fit the task.
        """
        super().__init__(task, settings)
        self.mask_rules, self.encoded_keys = task.mask_rules, task.encoded
        if settings.belief:
            raise UserError("model.belief is about hidden costs: choose cost: stretch, or model.belief: false")
        self.discount = discount
        units, layers = settings.units, settings.layers
        scales = {name: scale for name, scale in asdict(settings.loss_scales).items() if name not in OTHER_HEADS}
        if not task.actions.masked:
            scales.pop("mask")
        self.loss_scales = {name: scale for name, scale in scales.items() if scale}
        encoded = select(task.encoded, settings.encode_keys)
        self.encoder = ObservationEncoder(encoded, units=units, layers=layers, depth=settings.depth)
        self.rssm = RSSM(task.actions.embed_size, self.encoder.embed_size, **asdict(settings.rssm))
        feat_size = self.rssm.feat_size
        self.decoder: ObservationDecoder | None = None
        if "decoder" in self.loss_scales:
            self.decoder = make_decoder(task, settings)
            self.decoder_scales = asdict(settings.decoder_scales)
        heads: dict[str, nn.Module] = {}
        if "reward" in self.loss_scales:
            heads["reward"] = MLP(feat_size, settings.bins, units=units, layers=1, zero_output=True)
        if "cont" in self.loss_scales:
            heads["cont"] = MLP(feat_size, 1, units=units, layers=1)
        if "mask" in self.loss_scales:
            heads["mask"] = MLP(feat_size, task.num_actions, units=units, layers=1)
        self.heads = nn.ModuleDict(heads)
        self.memory_spaces = {
            "context_deter": ((self.rssm.deter_size,), torch.float16),
            "context_stoch": ((self.rssm.stoch_size,), torch.int16),
        }
        self._finish(settings)

    def encode(self, obs: dict[str, Tensor], context: None, view: View) -> Float[Tensor, "*B U"]:
        return self.encoder(obs)

    def embed_action(self, action: Shaped[Tensor, "B *Q"], context: None) -> Float[Tensor, "B *P A"]:
        return embed_actions(self.task.actions, action)

    def embed_choice(self, choice: Float[Tensor, "B Q N"], context: None) -> Float[Tensor, "B Q A"]:
        return choice

    def observe(self, batch: dict[str, Tensor], noise: Float[Tensor, "B T S"]) -> Observed:
        embed = self.encoder(batch)
        action = self.embed_action(batch["prev_action"], None)
        latents, posterior, prior = self.rssm.observe(embed, action, batch["is_first"], noise, self._recall(batch))
        return Observed(latents, posterior, prior, None, embed)

    def memory(self, latent: Latent) -> dict[str, Tensor]:
        """A latent as replay keeps it; what is not finite is forgotten."""
        return {
            "context_deter": latent.deter.detach().nan_to_num(0.0, 0.0, 0.0).half(),
            "context_stoch": latent.stoch.detach().argmax(-1).short(),
        }

    def _recall(self, batch: dict[str, Tensor]) -> Latent | None:
        """The latent of the row before each sequence, as replay kept it; None where it keeps none."""
        if "context_deter" not in batch:
            return None
        stoch = functional.one_hot(batch["context_stoch"].long(), self.rssm.classes).float()
        return Latent(deter=batch["context_deter"].float(), stoch=stoch)

    def predict_reward(self, feat: Float[Tensor, "*B F"] | Chosen) -> Float[Tensor, "*B"]:
        """The reward that arrives with a latent."""
        return self._two_hot(feat).mean()

    def predict_cont(self, feat: Float[Tensor, "*B F"] | Chosen) -> Float[Tensor, "*B"]:
        """The probability that the episode goes on, times the discount factor."""
        return BernoulliDist(self.heads["cont"](feat).squeeze(-1)).mean()

    def predict_mask(self, feat: Feat, context: None) -> Bool[Tensor, "B *Q N"]:
        logits = self.heads["mask"](feat)
        return (logits > 0).scatter(-1, logits.argmax(-1, keepdim=True), True)

    @torch.no_grad()
    def open_loop(self, sequence: dict[str, Tensor], *, seen: int, noise: Float[Tensor, "B T S"]) -> dict[str, Tensor]:
        """Each key of the observation [B, T, ...] as the model has it: `seen` rows observed, the rest imagined.

        The actions are those of the sequence throughout.
        """
        assert self.decoder is not None, "what is not decoded cannot be shown"
        keys = {*self.encoded_keys, "prev_action", "is_first"}
        shown = {name: sequence[name][:, :seen] for name in keys}
        latents = self.observe(shown, noise[:, :seen]).latents
        action = self.embed_action(sequence["prev_action"], None)
        latent = Latent(*(part[:, -1] for part in latents))
        imagined = []
        for step in range(seen, action.shape[1]):
            latent = self.rssm.imagine_step(latent, action[:, step], noise[:, step])
            imagined.append(latent.feat())
        return self.decoder.predict(torch.cat((latents.feat(), torch.stack(imagined, 1)), 1))

    def _head_losses(
        self, batch: dict[str, Tensor], observed: Observed, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> tuple[Losses, Metrics]:
        losses: Losses = {}
        metrics: Metrics = {}
        if "reward" in self.heads:
            losses["reward"] = mean(-self._two_hot(feat).log_prob(batch["reward"]))
        if "cont" in self.heads:
            losses["cont"] = self._cont_loss(batch, feat, mean, discount=self.discount)
        if self.decoder is not None:
            per_key = {name: mean(loss) for name, loss in self.decoder.losses(feat, batch).items()}
            scaled = [self.decoder_scales[self.decoder.keys[name].kind] * loss for name, loss in per_key.items()]
            losses["decoder"] = torch.stack(scaled).sum()
            metrics |= {f"decoder_{name}_loss": loss.detach() for name, loss in per_key.items()}
        if "mask" in self.heads:
            dist = BernoulliDist(self.heads["mask"](feat))
            losses["mask"] = mean(-dist.log_prob(batch[ACTION_MASK]).mean(-1))
            metrics |= self._mask_metrics(batch, observed, feat, mean)
        return losses, metrics

    def _mask_metrics(
        self, batch: dict[str, Tensor], observed: Observed, feat: Float[Tensor, "B T F"], mean: RowMean
    ) -> Metrics:
        """How well the mask is known: seen from the observation itself, and from the step before it, as imagined."""
        metrics: Metrics = {}
        if self.mask_rules is not None:
            metrics["mask_rules_wrong"] = wrong_share(self.mask_rules, batch)
        foreseen = Latent(observed.latents.deter, observed.prior.one_hot(observed.prior.mode())).feat()
        for name, basis in (("mask", feat), ("mask_imagined", foreseen)):
            agreed = self.predict_mask(basis, None) == batch[ACTION_MASK]
            metrics[f"{name}_accuracy"] = mean(agreed.float().mean(-1)).detach()
            metrics[f"{name}_exact"] = mean(agreed.all(-1).float()).detach()
        return metrics

    def _two_hot(self, feat: Float[Tensor, "*B F"] | Chosen) -> SymexpTwoHot:
        return SymexpTwoHot(self.heads["reward"](feat), self.bins)

    def _row_weight(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        return torch.ones_like(batch["reward"])
