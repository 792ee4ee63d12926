"""Every kind of agent on a device on paper: what a GPU would refuse or wait for shows without one, and is counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import Mock, patch

import jaxtyping
import pytest
import torch

import config
from benchmarks import operators
from benchmarks.operators import CPU, PAPER, Call, MixedDevices, Paper, PaperGenerator, Recorder, WouldWait
from dreamer import Dreamer
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from sac import SAC
from settings.run import LoopSettings
from tests.scenes import CONFIG_PATH, debug_config
from training.host_replay import HostReplay
from training.ring import REWARD_AND_ENDS
from training.trainer import Trainer

# Smaller than under `debug`: what is handed over then differs in number alone.
SMALL = {"envs": "3", "nodes": "4", "batch_length": "3"}
HORIZON = {"imag_horizon": "2"}
# What the host may decide anew in each update, by the file and the operator that get to know of it. The work recorded
# in a CUDA graph would repeat the first update's.
DECIDED_BY_THE_HOST = {
    ("training/ring.py", "aten.randint.low_generator"),
    ("training/ring.py", "aten.gt.Scalar"),
    ("training/ring.py", "aten.lt.Scalar"),
    ("training/ring.py", "aten.add.Tensor"),
    ("training/ring.py", "aten.le.Scalar"),
    ("training/ring.py", "aten.select.int"),
    ("guard.py", "aten.masked_fill_.Scalar"),
    ("imagining/behavior.py", "aten.full.default"),
    ("updates/optimizer.py", "aten.mul.Tensor"),
    ("updates/optimizer.py", "aten._fused_adam_.default"),
}
# Attributes whose tensors an update replaces by others, where it writes into all the rest. The last two are written
# before they are read; what the first two carry from one update to the next, a CUDA graph would not carry.
REPLACED = ("skips", "in_row", "found_inf", "_before")
# Operators that have no deterministic kernel on a GPU: all that `torch.use_deterministic_algorithms` lists, but for
# cumulative sums of floats.
REFUSED = (
    *("avg_pool3d_backward", "_adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool"),
    *("upsample_linear", "upsample_bilinear", "upsample_bicubic", "upsample_trilinear", "_upsample", "reflection_pad"),
    *("nll_loss", "_ctc_loss_backward", "_embedding_bag", "put", "histc", "bincount", "median", "kthvalue"),
    *("grid_sampler", "scatter_reduce", "_scaled_dot_product"),
)
# Operators that draw random numbers.
DRAWING = ("rand", "normal", "uniform", "bernoulli", "multinomial", "exponential", "dropout", "native_dropout")


class Kind(NamedTuple):
    """A kind of config, and the most operators of an update with the model, and of one without: 10 % above today's."""

    sections: tuple[str, ...]
    most: int
    most_without: int = 0
    changes: dict[str, str] = {}
    agent: Any = Dreamer


KINDS = {
    "tsp_attn": Kind(("tsp_attn",), 6350, 2900),
    "padded": Kind(("tsp_attn",), 6760, 3220, {"curriculum": "[[3, 20], [4, null]]"}),
    "belief": Kind(("tsp_few_steps", "tsp_stretch"), 8150, 4270),
    "tsp_critic": Kind(("tsp_critic",), 7220, 4600, HORIZON),
    "atsp_attn": Kind(("atsp_attn",), 6350, 2900),
    "cvrp_attn": Kind(("cvrp_attn",), 7620, 3340),
    "pickup_attn": Kind(("pickup_attn",), 6690, 3200),
    "generated": Kind(("tsp_few_steps", "tsp_dreamt"), 7070, 3620),
    "dynamics": Kind(("tsp_critic",), 8050, 5430, {**HORIZON, "imag_gradient": "dynamics", "imag_mask": "predicted"}),
    "cartpole": Kind(("gym", "cartpole"), 4860, changes=HORIZON),
    "pixelgrid": Kind(("gym", "pixelgrid"), 5440, changes=HORIZON),
    "switches": Kind(("gym", "switches"), 5500, changes=HORIZON),
    "predicted mask": Kind(("gym", "switches"), 5460, changes={**HORIZON, "task": "gym_SwitchesNoRules-v0"}),
    "pendulum": Kind(("gym", "pendulum"), 4830, changes=HORIZON),
    "dense": Kind(("gym", "cartpole"), 3760, changes={**HORIZON, "model.rssm.cell": "dense", "model.norm": "layer"}),
    "tsp_attn in halves": Kind(("tsp_attn",), 7410, 3220, {"precision": "bfloat16"}),
    "pixelgrid in halves": Kind(("gym", "pixelgrid"), 6370, changes={**HORIZON, "precision": "bfloat16"}),
    "sac_pendulum in halves": Kind(("sac", "sac_pendulum"), 640, changes={"precision": "bfloat16"}, agent=SAC),
    "sac_pendulum": Kind(("sac", "sac_pendulum"), 570, agent=SAC),
    "sac_two_hot": Kind(("sac", "sac_pendulum", "sac_two_hot"), 660, agent=SAC),
    "sac_cartpole": Kind(("sac", "cartpole"), 540, agent=SAC),
    "tsp_sac": Kind(("sac", "tsp_sac"), 2470, agent=SAC),
}


@pytest.fixture(scope="module", autouse=True)
def on_paper() -> Iterator[None]:
    # Shapes are executed where there are numbers, too; here they would take a third of the time.
    with operators.on_paper(), patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


def make(name: str) -> Paper:
    kind = KINDS[name]
    settings = config.load(CONFIG_PATH, [*kind.sections, "debug"], {**SMALL, **kind.changes})
    return operators.make_paper(settings, kind.agent)


def collect(paper: Paper, steps: int) -> list[list[Call]]:
    """What each of some steps hands over: acting, storing, and the environments' own move where they are on paper."""
    acting = paper.agent.initial_state(len(paper.sight.is_first))
    (obs, is_first, any_first), no = paper.sight, torch.zeros_like(paper.sight.is_first)
    reward, ended, handed = torch.zeros(no.shape, device=PAPER), no, []
    for _ in range(steps):
        with Recorder() as recorder:
            sight = Sight(obs, is_first, any_first)
            action, acting = paper.agent.act(sight, acting, generator=paper.generators["acting"])
            flags = {"is_first": is_first, "is_last": ended, "is_terminal": ended}
            paper.replay.add({**obs, **flags, "action": action, "reward": reward, **paper.agent.memory(acting)})
            is_first, any_first = no, False
            if paper.env is not None:
                obs, reward, ended, _, info = paper.env.step(action)
                is_first, any_first = info["is_first"], info["any_first"]
        handed.append(recorder.calls)
    return handed


class HandedOver(NamedTuple):
    """What an agent hands to its device: in steps of collecting, and in an update with and one without the model."""

    paper: Paper
    collected: list[list[Call]]
    whole: list[Call]
    others: list[Call]


@functools.cache
def handed_over(name: str) -> HandedOver:
    paper = make(name)
    collected = collect(paper, 3)
    # The first update makes what the others find.
    paper.update(1)
    return HandedOver(paper, collected, paper.update(0), paper.update(1) if KINDS[name].most_without else [])


@pytest.mark.parametrize("name", KINDS)
def test_agent_stays_on_its_device_never_waits_and_hands_over_no_more_than_it_did(name: str):
    kind, (_, collected, whole, others) = KINDS[name], handed_over(name)
    assert all(collected)
    assert len(whole) <= kind.most, f"an update with the model takes {len(whole)} operators"
    assert len(others) <= kind.most_without, f"an update without the model takes {len(others)} operators"


@pytest.mark.parametrize("name", KINDS)
def test_all_operators_but_one_have_deterministic_kernels(name: str):
    _, collected, whole, others = handed_over(name)
    calls = [call for part in (*collected, whole, others) for call in part]
    refused = {call.operator for call in calls if call.operator.split(".")[1].startswith(REFUSED)}
    of_floats = {call.operator for call in calls if "cumsum" in call.operator and call.shapes[0][1].is_floating_point}
    assert refused == set() and of_floats <= {"aten.cumsum.default"}


@pytest.mark.parametrize("name", KINDS)
def test_every_draw_is_from_a_generator_of_its_own(name: str):
    _, collected, whole, others = handed_over(name)
    calls = [call for part in (*collected, whole, others) for call in part]
    drawing = {call.operator for call in calls if call.operator.split(".")[1].startswith(DRAWING)}
    assert drawing and [operator for operator in drawing if "generator" not in operator] == []


@pytest.mark.parametrize("name", ["tsp_attn", "padded", "cvrp_attn", "pixelgrid", "sac_pendulum"])
def test_updates_of_one_kind_are_the_same_work(name: str):
    """What a CUDA graph needs: the same operators with the same shapes, and few numbers that the host decides anew."""
    paper, _, _, others = handed_over(name)
    every = getattr(paper.agent, "model_every", 1)
    whole = paper.update(0)
    paper.replay.total, paper.replay.oldest = paper.replay.total + 1, paper.replay.oldest + 1
    pairs = [(whole, paper.update(every, progress=0.7))]
    if others:
        pairs.append((others, paper.update(every + 1, progress=0.7)))
    for first, second in pairs:
        assert [call[:2] for call in first] == [call[:2] for call in second]
        both = zip(first, second, strict=True)
        decided = {(a.place.split(":")[0], a.operator) for a, b in both if a.numbers != b.numbers}
        assert decided and decided <= DECIDED_BY_THE_HOST


@pytest.mark.parametrize("name", ["tsp_attn", "cartpole", "pendulum", "sac_pendulum"])
def test_steps_within_an_episode_are_the_same_work(name: str):
    _, first, second = handed_over(name).collected
    assert [call[:2] for call in first] == [call[:2] for call in second]


def test_environments_whose_episodes_end_apart_never_wait(monkeypatch: pytest.MonkeyPatch):
    paper = make("cvrp_attn")
    monkeypatch.setattr(RoutingVectorEnv, "_count_ended", lambda _env: 1)
    assert all(collect(paper, 2))


@pytest.mark.parametrize("name", ["tsp_attn", "cvrp_attn", "tsp_sac"])
@pytest.mark.parametrize("prefill_policy", ["random", "nearest"])
def test_collecting_never_waits(name: str, prefill_policy: Any, tmp_path: Path):
    """The loop's own work with every step, before the prefill is over and after it."""
    paper = make(name)
    settings = replace(LoopSettings.of(debug_config()), prefill=6, prefill_policy=prefill_policy)
    unused: dict[str, Any] = {part: Mock() for part in ("evaluator", "logger", "lock")}
    trainer = Trainer(
        paper.agent,
        paper.agent.task,
        settings=settings,
        env=cast(RoutingVectorEnv, paper.env),
        replay=paper.replay,
        generators=paper.generators,
        guard=paper.agent.guard,
        logdir=tmp_path,
        device=PAPER,
        files={},
        **unused,
    )
    trainer.stepper.begin(paper.sight.obs, any_first=True)
    with Recorder() as recorder:
        for _ in range(8):
            trainer._advance()
    assert trainer.step > settings.prefill
    assert any(call.place.startswith("training/averages.py") for call in recorder.calls)


@pytest.mark.parametrize("name", ["tsp_attn", "pixelgrid"])
def test_replay_of_the_host_sends_batches_without_a_wait(name: str):
    paper = make(name)
    columns = 4 * paper.agent.batch_length
    spaces = {key: (tuple(rows.shape[2:]), rows.dtype) for key, rows in paper.replay.rows.items()}
    spaces = {key: space for key, space in spaces.items() if key not in REWARD_AND_ENDS}
    memory = paper.agent.memory_spaces
    replay = HostReplay(spaces, num_envs=3, capacity=3 * columns, learns_on=PAPER, memory=memory)
    replay.total, replay.oldest = 3 * columns, 2 * columns
    paper.generators["replay"] = torch.Generator()
    host = paper._replace(replay=replay)
    assert all(collect(host, 2))
    for number in range(2):
        calls = host.update(number)
        assert any(call.place.startswith("imagining/") for call in calls)


def test_imagination_of_episodes_that_end_apart_goes_on_to_its_horizon():
    """Only a CPU is asked whether all have ended; elsewhere each update imagines as many steps."""
    paper = make("cvrp_attn")
    moves = [call for call in paper.update(1) if call.place.startswith("routing/cvrp.py")]
    assert sum(call.operator == "aten.where.self" for call in moves) == paper.agent.imagination.horizon == 6


def tensors_below(value: Any, path: str = "", seen: set[int] | None = None) -> dict[str, torch.Tensor]:
    """All tensors that attributes, dicts and lists lead to, by the way there."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return {path: value}
    if id(value) in seen or isinstance(value, type):
        return {}
    seen.add(id(value))
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        parts = [(key if isinstance(key, str) else index, part) for index, (key, part) in enumerate(value.items())]
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).items())
    return {name: tensor for key, part in parts for name, tensor in tensors_below(part, f"{path}.{key}", seen).items()}


@pytest.mark.parametrize("name", ["tsp_attn", "belief", "pixelgrid", "sac_two_hot"])
def test_update_writes_into_the_tensors_that_are_there(name: str):
    """What a CUDA graph needs: whatever one update leaves to the next stays where it is."""
    agent = handed_over(name).paper.agent
    before = tensors_below(agent)
    handed_over(name).paper.update(0)
    after = tensors_below(agent)
    assert len(before) > 100 and before.keys() == after.keys()
    replaced = [path for path in before if after[path] is not before[path]]
    assert replaced and [path for path in replaced if not set(path.split(".")) & set(REPLACED)] == []


def test_update_that_keeps_a_good_state_is_a_kind_of_its_own():
    paper, _, _, others = handed_over("tsp_attn")
    every = paper.agent.guard.settings.snapshot_every
    assert (every - 1) % paper.agent.model_every != 0

    def of_recovery(calls: list[Call]) -> int:
        return sum(call.place.startswith("updates/recovery.py") for call in calls)

    assert of_recovery(paper.update(every - 1)) > of_recovery(others)


def plant(operator: Callable[[torch.Tensor], Any]) -> None:
    on_device = torch.zeros(3, device=PAPER)
    with Recorder():
        operator(on_device)


@pytest.mark.parametrize(
    "operator",
    [
        lambda numbers: numbers + torch.zeros(3),
        lambda numbers: numbers[torch.zeros(3, dtype=torch.int64)],
        lambda numbers: torch.nn.functional.linear(numbers, torch.zeros(2, 3)),
        lambda numbers: torch.rand(3, generator=torch.Generator(), device=PAPER),
    ],
    ids=["sum", "index", "linear", "generator"],
)
def test_recorder_refuses_two_devices(operator: Callable[[torch.Tensor], Any]):
    with pytest.raises(MixedDevices, match="of the host"):
        plant(operator)


@pytest.mark.parametrize(
    "operator",
    [
        lambda numbers: float(numbers[0]),
        lambda numbers: numbers.tolist(),
        lambda numbers: numbers.cpu(),
        lambda numbers: 1 if numbers[0] > 0 else 2,
        lambda numbers: numbers.nonzero(),
        lambda numbers: numbers[numbers > 0],
        lambda numbers: numbers.masked_select(numbers > 0),
        lambda numbers: numbers.index_put_((numbers > 0,), torch.zeros(2, device=PAPER)),
        lambda numbers: numbers.unique(),
        lambda numbers: numbers.repeat_interleave(numbers.long()),
        lambda numbers: torch.tensor([1.0, 2.0], device=PAPER),
        lambda numbers: numbers.copy_(torch.zeros(3)),
        lambda numbers: torch.zeros(3).to(PAPER),
    ],
    ids=[
        *("float", "tolist", "cpu", "if", "nonzero", "index by mask", "masked_select", "write by mask", "unique"),
        *("repeat_interleave", "tensor", "copy_", "to"),
    ],
)
def test_recorder_refuses_a_wait(operator: Callable[[torch.Tensor], Any]):
    with pytest.raises(WouldWait):
        plant(operator)


def test_recorder_lets_pass_what_neither_waits_nor_mixes():
    numbers, generator = torch.zeros(3, device=PAPER), PaperGenerator()
    with Recorder() as recorder:
        numbers[numbers > 0] = 1.0
        arrived = numbers.to("cpu", non_blocking=True)
        torch.rand(3, generator=generator, device=PAPER) + torch.tensor(1.0)
        host = torch.zeros(2)[torch.ones(2, dtype=torch.bool)].tolist()
    assert host == [0.0, 0.0] and arrived.device == CPU
    names = [call.operator for call in recorder.calls]
    assert names == [
        *("aten.gt.Scalar", "aten.scalar_tensor.default", "aten.index_put_.default", "aten._to_copy.default"),
        *("aten.rand.generator", "aten.add.Tensor"),
    ]


def test_counting_refuses_an_agent_that_there_is_not(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        operators.main(["--configs", "debug", "--agent", "other"])
    assert "--agent is 'other'" in capsys.readouterr().err


def test_recorder_tells_views_from_launches():
    numbers = torch.zeros(3, device=PAPER)
    with Recorder() as recorder:
        numbers[None].add_(1.0)
        numbers.detach().t()
        numbers.sum()
    told = {call.operator: call.launches for call in recorder.calls}
    assert [name for name, launches in told.items() if launches] == ["aten.add_.Tensor", "aten.sum.default"]
    assert "aten.unsqueeze.default" in told and "aten.detach.default" in told


def test_environment_in_the_checkout_is_not_the_library():
    inside = operators.ROOT / ".venv" / "lib" / "python3.11" / "site-packages" / "torch" / "guard.py"
    assert operators._in_library(str(inside)) == ""
    assert operators._in_library(str(operators.ROOT / "guard.py")) == "guard.py"
