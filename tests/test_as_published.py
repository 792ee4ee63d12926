"""DreamerV3 as published: every number of the section `gym`, what the code holds, and the size of every network."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

import config
from config import Config
from dreamer import Dreamer
from envs.tasks import ActionSpec, ObservationKey, ObservationTask
from guard import Guard
from imagining.behavior import ImagBehavior
from imagining.observation_imagination import ObservationImagination
from models import make_behavior, make_imagination
from networks import Latent
from parts.actors import MaskedActor
from settings.dreamer import DreamerSettings
from tests.scenes import CONFIG_PATH, CPU, SCRIPTED, Scene, random_rows, without_zero_outputs
from training.devices import make_generators

PAGE = Path(config.__file__).parent / "docs" / "published.md"

# The table of hyperparameters of Hafner et al., "Mastering diverse control tasks through world models" (Nature 2025),
# and what its released code, danijar/dreamerv3 at e3f0224, sets beside.
PUBLISHED: dict[str, Any] = {
    "replay_capacity": 5_000_000,
    "replay_online": True,
    "replay_context": True,
    "batch_size": 16,
    "batch_length": 64,
    "prefill": 16 * 64,
    "schedule.warmup": 1000,
    "schedule.decay_from": 1.0,
    "schedule.final_lr": 1.0,
    "optimizer.algorithm": "laprop",
    "optimizer.agc": 0.3,
    "model_every": 1,
    **{f"{group}.lr": 4e-5 for group in ("model", "actor", "critic")},
    **{f"{group}.grad_clip": float("inf") for group in ("model", "actor", "critic")},
    **{f"{group}.layers": 3 for group in ("model", "actor", "critic")},
    "model.weight_decay": 0.0,
    "model.norm": "rms",
    "model.initialisation": "published",
    "model.rssm.cell": "joint",
    "model.rssm.blocks": 8,
    "model.rssm.stoch": 32,
    "model.rssm.unimix": 0.01,
    "model.free_nats": 1.0,
    "model.loss_scales.decoder": 1.0,
    "model.loss_scales.reward": 1.0,
    "model.loss_scales.cont": 1.0,
    "model.loss_scales.dyn": 1.0,
    "model.loss_scales.rep": 0.1,
    **{f"model.decoder_scales.{kind}": 1.0 for kind in ("vector", "image", "classes")},
    "model.bins": 255,
    "critic.bins": 255,
    "imag_start": "replay",
    "imag_tours": 1,
    "imag_horizon": "15",
    "discount": 1 - 1 / 333,
    "return_lambda": 0.95,
    "target_clip": "none",
    "reward_scale": 1.0,
    "imag_gradient": "reinforce",
    "imag_policy": 1.0,
    "baseline": "critic",
    "actor.entropy": 3e-4,
    "actor.entropy_final": 3e-4,
    "actor.unimix": 0.01,
    "actor.advantage_scale": "percentile",
    "actor.advantage_floor": 1.0,
    "critic.slow_rate": 1 - 0.98,
    "critic.slow_scale": 1.0,
    "critic.replay_scale": 0.3,
}
# What the paper sets by task, or has not: of the smallest published size, and for a CPU.
OURS: dict[str, Any] = {
    "model.rssm.deter": 512,
    "model.rssm.classes": 4,
    "model.rssm.hidden": 64,
    "model.depth": 4,
    **{f"{group}.units": 64 for group in ("model", "actor", "critic")},
    "envs": 4,
    "train_ratio": 64.0,
    "steps": 100_000,
    "log_every": 1000,
    "eval_every": 5000,
    "checkpoint_every": 10_000,
    "model.loss_scales.mask": 1.0,
    "actor.type": "masked",
    "imag_first": "stored",
}
SIZES = ("size1m", "size12m", "size25m", "size50m", "size100m", "size200m", "size400m")
OBSERVATIONS = {
    "vector": ObservationKey("vector", (24,), torch.float32),
    "image": ObservationKey("image", (64, 64, 3), torch.uint8),
}
# Parameters of the released networks, which were instantiated for these observations and 6 continuous actions:
# of all, and of their encoder, RSSM, decoder, reward head, continue head, policy and critic.
PARAMETERS = {
    "vector": (
        (640867, 10112, 364416, 51096, 57663, 41153, 50316, 66111),
        (9738019, 138752, 5783040, 794136, 721407, 656129, 791052, 853503),
        (21782947, 306432, 12999936, 1781016, 1573503, 1475713, 1776396, 1869951),
        (38612003, 539648, 23100416, 3161112, 2753279, 2622977, 3154956, 3279615),
        (86622499, 1202688, 51952128, 7100952, 6095871, 5900545, 7091724, 7278591),
        (153769507, 2127872, 92338176, 12613656, 10749183, 10488833, 12601356, 12850431),
        (345473059, 4764672, 207713280, 28357656, 23987967, 23597569, 28339212, 28712703),
    ),
    "image": (
        (686846, 14304, 376704, 80595, 57663, 41153, 50316, 66111),
        (10494158, 220416, 5979648, 1272003, 721407, 656129, 791052, 853503),
        (23489326, 493824, 13442304, 2857635, 1573503, 1475713, 1776396, 1869951),
        (41650062, 876032, 23886848, 5076355, 2753279, 2622977, 3154956, 3279615),
        (93468238, 1966848, 53721600, 11413059, 6095871, 5900545, 7091724, 7278591),
        (165948686, 3492864, 95483904, 20282115, 10749183, 10488833, 12601356, 12850431),
        (372896398, 7850496, 214791168, 45617283, 23987967, 23597569, 28339212, 28712703),
    ),
}


def gym(*sections: str) -> Config:
    return config.load(CONFIG_PATH, [*sections], {"task": "gym_CartPole-v1"})


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def same(value: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return value == pytest.approx(expected, rel=1e-6, abs=0)
    return type(value) is type(expected) and value == expected


@functools.cache
def agent() -> Dreamer:
    settings = DreamerSettings.of(gym())
    return Dreamer(SCRIPTED, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))


# The section


def test_gym_section_has_the_published_numbers():
    values = gym().flat()
    assert {key: values[key] for key, each in {**PUBLISHED, **OURS}.items() if not same(values[key], each)} == {}


def test_every_key_of_the_gym_section_is_compared():
    section = flat(YAML(typ="safe", pure=True).load(CONFIG_PATH)["gym"])
    assert set(section) - {*PUBLISHED, *OURS} == set()


def test_table_of_the_page_is_the_section():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\| `([\w.]+)` \| (\S+) \|$", text, re.MULTILINE)
    table = {key: YAML(typ="safe", pure=True).load(value) for key, value in rows}
    assert len(table) == len(rows)
    values = gym().flat()
    assert set(table) == {*PUBLISHED, *OURS}
    assert {key: values[key] for key, value in table.items() if str(values[key]) != str(value)} == {}


# What the code holds


def test_optimisers_are_the_published_one():
    for name, optimizer in agent().learner.optimizers.items():
        (group,) = optimizer.rule.param_groups
        assert (group["eps"], group["betas"], optimizer.lr) == (1e-20, (0.9, 0.999), 4e-5), name
        assert (optimizer.agc, optimizer.clip, optimizer.warmup) == (0.3, float("inf"), 1000), name
        # Each tensor's gradient is clipped by itself; one that starts at 0 counts with a norm of a thousandth.
        weights = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.ones(4)]
        scales = optimizer._scales([nn.Parameter(weight) for weight in weights], torch.tensor([6.0, 6.0, 0.1]))
        torch.testing.assert_close(scales, torch.tensor([0.3 * 5 / 6, 0.3 * 1e-3 / 6, 1.0]))


def test_returns_are_scaled_by_the_published_percentiles():
    scale = agent().behavior.scale
    assert scale.shares.tolist() == pytest.approx([0.05, 0.95]) and (scale.rate, scale.floor) == (0.01, 1.0)


def test_outputs_begin_as_published():
    model: Any = agent().model
    behavior: Any = agent().behavior
    for zero in (model.heads["reward"], behavior.critic.mlp):
        assert not zero.output.weight.any() and not zero.output.bias.any()
    assert isinstance(behavior.actor, MaskedActor)
    # A hundredth of 1 / sqrt(64), the deviation of weights that read 64 units.
    assert float(behavior.actor.mlp.output.weight.detach().std()) == pytest.approx(0.01 / 8, rel=0.15)
    norms = [module for module in (*model.modules(), *behavior.modules()) if isinstance(module, nn.RMSNorm)]
    assert len(norms) > 20 and {norm.eps for norm in norms} == {1e-4}
    heads = [model.heads["reward"], model.heads["cont"]]
    assert [len(head.hidden) for head in (*heads, behavior.actor.mlp, behavior.critic.mlp)] == [1, 1, 3, 3]


def test_bins_are_the_published_ones():
    for bins in (agent().model.bins, agent().behavior.critic.bins):
        assert len(bins) == 255 and float(bins[127]) == 0
        torch.testing.assert_close(torch.log1p(bins[[128, -1]]), torch.tensor([20 / 127, 20.0]))


def test_continues_are_learnt_with_the_discount():
    assert agent().model.discount == pytest.approx(1 - 1 / 333, abs=1e-6)


# Losses


def test_reconstruction_counts_by_the_kind_of_its_keys():
    """The decoder's loss is the sum of its keys' by default; a scale multiplies those of its kind."""
    classes = ObservationKey("classes", (1,), torch.int64, classes=(3,))
    task = ObservationTask(
        actions=ActionSpec("discrete", (3,)),
        observations={"speed": ObservationKey("vector", (2,), torch.float32), "gear": classes},
    )
    batch = random_rows(task) | {"gear": torch.randint(3, (4, 7, 1))}
    totals = {}
    for scales in ((1.0, 1.0), (1.0, 2.0), (3.0, 1.0)):
        vector, of_classes = scales
        scene = Scene(task, model__decoder_scales__vector=vector, model__decoder_scales__classes=of_classes)
        _, metrics = scene.model.losses_of(batch, scene.observe(batch))
        speed, gear = metrics["decoder_speed_loss"], metrics["decoder_gear_loss"]
        torch.testing.assert_close(metrics["decoder_loss"], vector * speed + of_classes * gear)
        totals[scales] = float(metrics["decoder_loss"])
    assert len(set(totals.values())) == 3


def test_imagination_counts_by_the_continue_head_from_its_first_row_on():
    scene, batch = Scene(SCRIPTED, imag_horizon="3"), random_rows(SCRIPTED)
    without_zero_outputs(scene.model)
    batch["is_terminal"] = torch.ones_like(batch["is_terminal"])
    start, trajectory = scene.imagine_from(batch, horizon=3)
    feat = trajectory.feat(slice(None))
    assert isinstance(feat, Tensor)
    expected = scene.model.predict_cont(feat).detach()
    assert 0 < float(expected.min()) < float(expected.max()) < 1
    torch.testing.assert_close(start.weight, expected[:, :, 0])
    torch.testing.assert_close(trajectory.survival, expected[:, :, :-1].cumprod(-1))


def test_losses_are_averaged_over_all_rows_and_not_by_their_weights():
    values, weight = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.2]])
    assert float(Scene(SCRIPTED).imagination.average(values, weight)) == pytest.approx((3.0 + 1.0) / 2)
    assert float(Scene().imagination.average(values, weight)) == pytest.approx((3.0 + 1.0) / 1.2)


@pytest.mark.parametrize("loss", ["actor", "critic"])
def test_imagined_losses_are_averages_of_that_kind(loss: str, monkeypatch: pytest.MonkeyPatch):
    def found() -> Tensor:
        scene = Scene(SCRIPTED, imag_horizon="3")
        without_zero_outputs(scene.model)
        torch.manual_seed(1)
        return scene.losses(random_rows(SCRIPTED))[0][loss].detach()

    before, average = found(), ObservationImagination.average
    monkeypatch.setattr(
        ObservationImagination, "average", lambda self, values, weight: 2 * average(self, values, weight)
    )
    assert before.abs() > 0.1
    torch.testing.assert_close(found(), 2 * before)


# Latents


def test_replayed_states_hold_every_digit_of_bfloat16():
    """All of bfloat16 in a state's range, down to the least that float16 keeps in full, come back as they were."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[(numbers.abs() <= 1) & (numbers.abs() >= 2.0**-14)]
    assert len(numbers) > 3500
    model: Any = agent().model
    deter = numbers.new_zeros(len(numbers), model.rssm.deter_size)
    deter[:, 0] = numbers
    stoch = torch.zeros(len(numbers), model.rssm.stoch_size, model.rssm.classes)
    stoch[..., 1] = 1
    memory = model.memory(Latent(deter, stoch))
    recalled = model._recall(memory)
    assert torch.equal(recalled.deter, deter) and torch.equal(recalled.stoch, stoch)


# Sizes


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", OBSERVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_networks_have_as_many_parameters_as_the_released_ones(kind: str, size: str):
    settings = DreamerSettings.of(gym(size))
    task = ObservationTask(actions=ActionSpec("continuous", (6,)), observations={kind: OBSERVATIONS[kind]})
    with torch.device("meta"):
        imagination = make_imagination(task, settings.imagination, model=settings.model)
        behavior: ImagBehavior = make_behavior(task, imagination, settings=settings)
    model: Any = imagination.model
    heads = (model.heads["reward"], model.heads["cont"], behavior.actor, behavior.critic)
    counts = [parameters(part) for part in (model.encoder, model.rssm, model.decoder, *heads)]
    assert sum(counts) == parameters(model) + parameters(behavior.actor) + parameters(behavior.critic)
    assert (sum(counts), *counts) == PARAMETERS[kind][SIZES.index(size)]
    assert f"{sum(counts):,}" in PAGE.read_text(encoding="utf-8")
