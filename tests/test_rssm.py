"""The recurrent state-space model: its memory, its two distributions, and where memory is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from networks import RSSM, Latent
from tests.scenes import assert_gradient_reaches

BATCH, STEPS, ACTIONS, EMBED, STOCH, CLASSES = 3, 5, 4, 5, 3, 4


# Both recurrent cells: whatever holds of the RSSM holds with either.
CELLS = pytest.mark.parametrize("cell", ["block", "dense"])


def rssm(cell: Any = "block", *, unimix: float = 0.01) -> RSSM:
    return RSSM(ACTIONS, EMBED, cell=cell, deter=8, stoch=STOCH, classes=CLASSES, hidden=6, blocks=2, unimix=unimix)


class Sequence:
    """The arguments of `RSSM.observe`, where only row 1 has a second episode, from step 3 on."""

    def __init__(self) -> None:
        self.embed = torch.randn(BATCH, STEPS, EMBED)
        self.prev_action = torch.randn(BATCH, STEPS, ACTIONS)
        self.is_first = torch.zeros(BATCH, STEPS, dtype=torch.bool)
        self.is_first[:, 0] = self.is_first[1, 3] = True
        self.noise = torch.rand(BATCH, STEPS, STOCH)

    def observed_by(self, model: RSSM, initial: Latent | None = None) -> Latent:
        return model.observe(self.embed, self.prev_action, self.is_first, self.noise, initial)[0]

    def rows(self, begin: int, end: int) -> Sequence:
        """The rows from `begin` to before `end`."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[:, begin:end])
        return part


def random_latent() -> Latent:
    return Latent(deter=torch.randn(BATCH, 8), stoch=torch.randn(BATCH, STOCH, CLASSES))


def test_latent_feat_holds_both_parts() -> None:
    latent = Latent(deter=torch.randn(2, 3, 4), stoch=torch.randn(2, 3, 2, 5))
    assert torch.equal(latent.feat(), torch.cat((latent.deter, latent.stoch.reshape(2, 3, 10)), -1))


@CELLS
def test_rssm_recur_depends_on_all_its_inputs(cell: str) -> None:
    model = rssm(cell)
    inputs = [torch.randn(1, size, requires_grad=True) for size in (8, STOCH * CLASSES, ACTIONS)]
    deter = model.recur(Latent(deter=inputs[0], stoch=inputs[1].unflatten(-1, (STOCH, CLASSES))), inputs[2])
    for gradient in torch.autograd.grad(deter.square().sum(), inputs):
        assert (gradient != 0).all()


def test_rssm_initial_is_0() -> None:
    latent = rssm().initial((2, 3))
    assert latent.deter.shape == (2, 3, 8) and latent.stoch.shape == (2, 3, STOCH, CLASSES)
    assert (latent.feat() == 0).all() and latent.feat().shape[-1] == rssm().feat_size


def test_rssm_stoch_is_one_hot() -> None:
    stoch = Sequence().observed_by(rssm()).stoch
    assert ((stoch == 0) | (stoch == 1)).all() and (stoch.sum(-1) == 1).all()


@CELLS
@pytest.mark.parametrize("with_initial", [False, True])
def test_rssm_is_first_cuts_memory(cell: str, with_initial: bool) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    # Row 0 is the first of an episode, so that what came before it doesn't count either.
    initial = random_latent() if with_initial else None
    sequence.embed[:, :3] = torch.randn(BATCH, 3, EMBED)
    sequence.noise[:, :3] = torch.rand(BATCH, 3, STOCH)
    sequence.prev_action[:, :4] = torch.randn(BATCH, 4, ACTIONS)  # an action that leads into a first row counts too
    changed = (sequence.observed_by(model, initial).feat() != before).any(-1)[:, 1:]  # row 0 may draw the same
    assert changed.tolist() == [[True] * 4, [True] * 2 + [False] * 2, [True] * 4]


@CELLS
def test_rssm_is_first_stops_nan(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    sequence.embed[1, :3] = sequence.prev_action[1, :4] = torch.nan
    after = sequence.observed_by(model).feat()
    assert after[1, :3].isnan().any(-1).all()
    assert torch.equal(after[1, 3:], before[1, 3:])
    sequence = Sequence()
    sequence.prev_action[:, 0] = torch.nan
    assert sequence.observed_by(model, Latent(*(part * torch.nan for part in random_latent()))).feat().isfinite().all()


@CELLS
def test_rssm_is_first_cuts_gradients(cell: str) -> None:
    model, sequence, initial = rssm(cell), Sequence(), random_latent()
    sequence.is_first[0, 0] = False
    inputs = [sequence.embed, sequence.prev_action, *initial]
    for tensor in inputs:
        tensor.requires_grad_()
    later = sequence.observed_by(model, initial).feat()[:, 3:]
    embed, action, deter, stoch = torch.autograd.grad((later * torch.randn_like(later)).sum(), inputs)
    assert (embed[1, :3] == 0).all() and (action[1, :4] == 0).all()
    assert (embed[0, :3] != 0).any(-1).all() and (action[0] != 0).any(-1).all()
    assert (embed[1, 3:] != 0).any(-1).all() and (action[1, 4] != 0).any()
    # Only row 0 goes on from the initial latent.
    assert (deter[1:] == 0).all() and (stoch[1:] == 0).all()
    assert deter[0].any() and stoch[0].any()


@CELLS
def test_rssm_observe_goes_on_from_a_latent(cell: str) -> None:
    model, sequence, initial = rssm(cell), Sequence(), random_latent()
    sequence.is_first[0, 0] = False
    whole = sequence.observed_by(model, initial)
    half = sequence.rows(0, 2).observed_by(model, initial)
    rest = sequence.rows(2, STEPS).observed_by(model, Latent(*(part[:, -1] for part in half)))
    for all_rows, first, second in zip(whole, half, rest, strict=True):
        torch.testing.assert_close(torch.cat((first, second), 1), all_rows)
    forgetful = sequence.rows(2, STEPS).observed_by(model)
    assert not torch.allclose(forgetful.deter, rest.deter)


@CELLS
def test_rssm_first_row_forgets_the_action_before_it(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    before = sequence.observed_by(model).feat()
    sequence.prev_action[:, 0] += 1
    assert torch.equal(sequence.observed_by(model).feat(), before)


@CELLS
def test_rssm_imagine_step_agrees_with_observe(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    latents, _, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    for t in range(1, STEPS):
        latent = Latent(deter=latents.deter[:, t - 1], stoch=latents.stoch[:, t - 1])
        imagined = model.imagine_step(latent, sequence.prev_action[:, t], sequence.noise[:, t])
        goes_on = ~sequence.is_first[:, t]
        torch.testing.assert_close(imagined.deter[goes_on], latents.deter[goes_on, t])
        probs = model.distribution(model.prior(imagined.deter)).probs
        torch.testing.assert_close(probs[goes_on], prior.probs[goes_on, t])
        drawn = prior.one_hot(prior.sample(sequence.noise))[:, t]
        assert torch.equal(imagined.stoch[goes_on], drawn[goes_on])


@CELLS
def test_rssm_same_noise_gives_the_same_latents(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    first = sequence.observed_by(model)
    torch.rand(100)  # the global stream has no part in it
    assert torch.equal(sequence.observed_by(model).feat(), first.feat())
    sequence.noise = 1 - sequence.noise
    assert not torch.equal(sequence.observed_by(model).stoch, first.stoch)


def test_rssm_without_noise_takes_the_mode() -> None:
    model, latent, action = rssm(), rssm().initial((BATCH,)), torch.randn(BATCH, ACTIONS)
    imagined = model.imagine_step(latent, action, None)
    expected = model.prior(imagined.deter).unflatten(-1, (STOCH, CLASSES)).argmax(-1)
    assert torch.equal(imagined.stoch.argmax(-1), expected)


def test_rssm_distributions_mix_in_uniform() -> None:
    dist = rssm(unimix=0.2).distribution(torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(STOCH)[None])
    torch.testing.assert_close(dist.probs[0, 0], torch.tensor([0.85, 0.05, 0.05, 0.05]))


@CELLS
def test_rssm_gradient_reaches_every_parameter(cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    latents, posterior, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    feat = latents.feat()
    assert_gradient_reaches(model.named_parameters(), posterior.kl(prior).sum() + (feat * torch.randn_like(feat)).sum())


@CELLS
@pytest.mark.parametrize("side", ["prior", "posterior"])
def test_rssm_prior_and_posterior_each_train_the_recurrence(side: str, cell: str) -> None:
    model, sequence = rssm(cell), Sequence()
    _, posterior, prior = model.observe(sequence.embed, sequence.prev_action, sequence.is_first, sequence.noise)
    kl = posterior.detach().kl(prior) if side == "prior" else posterior.kl(prior.detach())
    assert_gradient_reaches(model.cell.named_parameters(), kl.sum())
