"""Diagnosis of a failed update: it is run again with hooks, to name the first thing that was not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guard import Guard

Entry = dict[str, Any]
# The most findings of a kind, and rows, that a report holds. The first are enough: one NaN reaches all gradients of a
# group.
MOST_ENTRIES = 16
MOST_SEEN = 3


def diagnose(
    run_again: Callable[[], Sequence[tuple[Tensor, Mapping[str, Tensor]]]],
    *,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, Tensor],
    guard: Guard,
    update: int,
) -> dict[str, Any]:
    """What was not finite, in the order in which values flow.

    Args:
        run_again: computes the update's losses again, with the same noise; each with the parameters it trains by name.
        modules: of the agent; every module below them is watched.
        batch: what was replayed.
        guard: what it saw in the update itself is told too.
        update: its number.

    Returns:
        `findings`: the keys of the batch that were not finite, the first module whose output was not, losses and
        gradients that were not; each with kind, name, shape, share of bad entries, and the range of the others.
        `seen`: kind and name of what the guard saw, the first few of each kind.
        `rows`: where in replay the bad rows stand, as (environment, column).
    """
    seen: dict[str, list[Entry]] = {}
    for each in guard.findings(since=update):
        seen.setdefault(each.kind, []).append({"kind": each.kind, "name": each.name})
    findings = bad_tensors("replayed", batch)
    outputs: list[Entry] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in [] if outputs else _tensors(output):
                outputs.extend(bad_tensors("output of", {name: tensor}))

        return hook

    for prefix, module in modules.items():
        for name, child in module.named_modules():
            handles.append(child.register_forward_hook(watch(f"{prefix}.{name}".rstrip("."))))
    try:
        losses = run_again()
    finally:
        for handle in handles:
            handle.remove()
    findings += outputs
    for loss, parameters in losses:
        groups = ", ".join(sorted({name.split(".")[0] for name in parameters}))
        bad_loss = bad_tensors("loss of", {groups: loss})
        findings += bad_loss
        if not bad_loss:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
            pairs = zip(parameters, gradients, strict=True)
            findings += bad_tensors("gradient of", {name: each for name, each in pairs if each is not None})
    first_seen = [each for kind in seen.values() for each in kind[:MOST_SEEN]]
    return {"findings": findings, "seen": first_seen, "rows": _bad_rows(batch)}


def bad_tensors(kind: str, tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Those of the tensors that are not finite, or too large to be squared: what, how much of it, how the rest is.

    The first `MOST_ENTRIES` of them.
    """
    entries: list[Entry] = []
    for name, value in tensors.items():
        if len(entries) < MOST_ENTRIES and value.is_floating_point():
            value = value.detach().float()
            if not bool(value.norm().isfinite()):
                finite = value.isfinite()
                rest = value[finite]
                entries.append(
                    {
                        "kind": kind,
                        "name": name,
                        "shape": list(value.shape),
                        "bad_share": float((~finite).float().mean()),
                        "min": float(rest.min()) if len(rest) else float("nan"),
                        "max": float(rest.max()) if len(rest) else float("nan"),
                    }
                )
    return entries


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _bad_rows(batch: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Environment and column of the first rows that hold a value that is not finite; none of what replay has not."""
    if "is_first" not in batch:
        return []
    bad = torch.zeros_like(batch["is_first"])
    for value in batch.values():
        if value.shape[:2] == bad.shape:
            bad = bad | ~value.isfinite().reshape(*bad.shape, -1).all(-1)
    rows = torch.stack((batch["env"][bad], batch["column"][bad]), -1)
    return [(env, column) for env, column in rows[:MOST_ENTRIES].tolist()]
