"""Diagnosis of a failed update: it is run again with hooks, to name the first thing that was not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Finding = dict[str, Any]
MOST_ROWS = 16


def diagnose(
    run_again: Callable[[], Sequence[tuple[Tensor, Mapping[str, Tensor]]]],
    *,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What was not finite, in the order in which values flow.

    Args:
        run_again: computes the update's losses again, with the same noise; each with the parameters it trains by name.
        modules: of the agent; every module below them is watched.
        batch: what was replayed.

    Returns:
        `findings`: the keys of the batch that were not finite, the first module whose output was not, losses and
        gradients that were not; each with kind, name, shape, share of bad entries, and the range of the others.
        `rows`: where in replay the bad rows stand, as (environment, column).
    """
    findings = [_finding("replayed", name, value) for name, value in batch.items() if _is_bad(value)]
    found: list[Finding] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and _is_bad(tensor):
                    found.append(_finding("output of", name, tensor))

        return hook

    for prefix, module in modules.items():
        for name, child in module.named_modules():
            handles.append(child.register_forward_hook(watch(f"{prefix}.{name}".rstrip("."))))
    try:
        losses = run_again()
        findings += found
        for index, (loss, parameters) in enumerate(losses):
            if _is_bad(loss):
                findings.append(_finding("loss", ", ".join(sorted({n.split(".")[0] for n in parameters})), loss))
            elif parameters:
                last = index == len(losses) - 1
                gradients = torch.autograd.grad(
                    loss, list(parameters.values()), allow_unused=True, retain_graph=not last
                )
                pairs = zip(parameters, gradients, strict=True)
                findings += [_finding("gradient of", n, g) for n, g in pairs if g is not None and _is_bad(g)]
    finally:
        for handle in handles:
            handle.remove()
    if not findings:
        findings.append(
            {"kind": "nothing:", "name": "the update is finite when run again", **_statistics(losses[0][0])}
        )
    return {"findings": findings, "rows": _bad_rows(batch)}


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _is_bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(value.isfinite().all())


def _finding(kind: str, name: str, value: Tensor) -> Finding:
    return {"kind": kind, "name": name, **_statistics(value)}


def _statistics(value: Tensor) -> dict[str, Any]:
    value = value.detach().float()
    finite = value[value.isfinite()]
    return {
        "shape": list(value.shape),
        "bad_share": float((~value.isfinite()).float().mean()),
        "min": float(finite.min()) if len(finite) else float("nan"),
        "max": float(finite.max()) if len(finite) else float("nan"),
    }


def _bad_rows(batch: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Environment and column of the first rows that hold a non-finite value."""
    bad = torch.zeros_like(batch["is_first"])
    for value in batch.values():
        if value.is_floating_point() and value.shape[:2] == bad.shape:
            bad = bad | ~value.isfinite().flatten(2).all(-1) if value.ndim > 2 else bad | ~value.isfinite()
    rows = torch.stack((batch["env"][bad], batch["column"][bad]), -1)
    return [(env, column) for env, column in rows[:MOST_ROWS].tolist()]
