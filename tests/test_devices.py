"""The device that a run takes, what is set there, and, where there is a GPU, that it never waits and repeats itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import config
from benchmarks import operators
from dreamer import Dreamer
from system import arrivals
from tests.run_scenes import ROOT, same_weights
from tests.scenes import CONFIG_PATH, debug_config
from training import devices

CUDA = torch.device("cuda", 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of PyTorch, in order, as if there were a GPU."""
    made: list[str] = []

    def note(owner: object, name: str) -> None:
        monkeypatch.setattr(owner, name, lambda *values, **named: made.append(f"{name} {[*values, *named.values()]}"))

    for name in ("Generator", "zeros", "manual_seed", "set_float32_matmul_precision", "use_deterministic_algorithms"):
        note(torch, name)
    for name in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        note(torch.backends.cuda, name)
    note(torch.cuda, "set_device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(devices.warnings, "filterwarnings", Mock())
    return made


def test_chosen_gpu_becomes_the_current_one_before_anything_is_done(calls: list[str]):
    assert devices.choose_device("cuda:1") == CUDA
    assert calls[0] == f"set_device [{CUDA!r}]" and len(calls) == 3
    devices.prepare_torch(debug_config(device="cuda:1"))
    assert calls[3] == calls[0]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_device_without_an_index_leaves_the_current_one(calls: list[str], name: str):
    devices.choose_device(name)
    assert not any(call.startswith("set_device") for call in calls)


def test_gpu_multiplies_in_tf32_and_a_cpu_does_not(calls: list[str]):
    devices.prepare_torch(debug_config(device="cuda"))
    assert "set_float32_matmul_precision ['high']" in calls
    calls.clear()
    devices.prepare_torch(debug_config(device="cpu", deterministic=True))
    assert not any("precision" in call or "deterministic" in call for call in calls)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_taken_where_they_are_wanted(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, wanted: bool
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    devices.prepare_torch(debug_config(device="cuda", deterministic=wanted))
    assert ("use_deterministic_algorithms [True, True]" in calls) == wanted
    assert sum(call.endswith("_sdp [False]") for call in calls) == (3 if wanted else 0)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


@needs_gpu
def test_mark_on_a_gpu_is_reached_when_the_work_before_it_is_done():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    numbers = torch.ones(1000, 1000, device=device)
    for _ in range(100):
        numbers = numbers @ numbers / 1000
    arrival = arrivals.Arrival(numbers.sum())
    assert arrival.read() == pytest.approx(1e6, rel=1e-2) and arrival.is_there()


@needs_gpu
@pytest.mark.parametrize(
    "sections", [["tsp_attn"], ["atsp_attn"], ["cvrp_attn"], ["tsp_few_steps", "tsp_stretch"], ["gym", "pixelgrid"]]
)
def test_update_on_a_gpu_never_waits(sections: list[str]):
    settings = config.load(CONFIG_PATH, [*sections, "debug"], {})
    real = operators.make_paper(settings, Dreamer, device=torch.device("cuda"))
    if "capacity" in real.replay.rows:
        # A demand is a share of it.
        real.replay.rows["capacity"].fill_(30)
    real.agent.update(real.replay, progress=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            real.agent.update(real.replay, progress=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # What waits raises above.
    assert real.agent.learner.updates == 4


@needs_gpu
@pytest.mark.run
@pytest.mark.parametrize("sections", [["debug"], ["cartpole", "debug"]], ids=["tsp", "cartpole"])
def test_runs_on_a_gpu_repeat_each_other_with_deterministic_kernels(tmp_path: Path, sections: list[str]):
    # A process of its own has not used cuBLAS before determinism is asked of it.
    for name in ("one", "other"):
        options = ["--device", "cuda", "--deterministic", "true", "--logdir", str(tmp_path / name)]
        subprocess.run([sys.executable, ROOT / "dreamer.py", "--configs", *sections, *options], check=True)
    assert same_weights(tmp_path / "one", tmp_path / "other")
