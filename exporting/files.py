"""Writes graphs as ONNX files and runs them again, to find out whether they do what the agent does."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import ConfigError, UserError
from dreamer import Dreamer
from envs.tasks import ObservationTask, RoutingTask
from exporting.graphs import Agreement, Arrays, Export, Graph, Run
from exporting.observation_graphs import ObservationExport
from exporting.routing_graphs import RoutingExport
from system.safe_files import make_folder, write_text

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# The kinds of tasks that have graphs.
EXPORTS: dict[type, type[RoutingExport] | type[ObservationExport]] = {
    RoutingTask: RoutingExport,
    ObservationTask: ObservationExport,
}
# Every runtime of the last years knows it.
OPSET = 18
FACTS = "agent.json"


def require_packages() -> None:
    """Check that what writes and runs ONNX files is installed.

    Raises:
        ConfigError: it is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {", ".join(missing)}; pip install -e ".[onnx]" brings all of it')


def export_of(agent: Dreamer) -> Export:
    """The graphs of an agent.

    Raises:
        UserError: its kind of task has none.
    """
    kind = EXPORTS.get(type(agent.task))
    if kind is None:
        raise UserError(f"{type(agent.task).__name__} has no ONNX graphs; exporting/ has those of two kinds of tasks")
    return kind(agent)


def write(agent: Dreamer, folder: Path, facts: Mapping[str, Any]) -> Agreement:
    """Write an agent's graphs into a folder, with what a program must know of them, and compare them with the agent.

    Args:
        agent: on the host, in float32.
        folder: made where it is not there.
        facts: about the run, for the file of facts.

    Raises:
        UserError: the agent has no graphs, or they do not do what it does.
        OSError: a file cannot be written.
    """
    export = export_of(agent)
    make_folder(folder)
    paths = {graph.name: folder / f"{graph.name}.onnx" for graph in export.graphs}
    for graph in export.graphs:
        _write_graph(graph, paths[graph.name])
    agreement = export.verify({name: runner(path) for name, path in paths.items()})
    if not agreement.holds:
        for path in paths.values():
            path.unlink()
        raise UserError(
            f"the graphs do not do what the agent does, and were removed: in {agreement.steps} decisions"
            f" {agreement.actions} actions differ, and logits by up to {agreement.logits:.2g}"
        )
    told = {**facts, **export.facts(), "verified": agreement._asdict()}
    write_text(folder / FACTS, json.dumps(told, indent=1) + "\n")
    if export.beside is not None:
        shutil.copyfile(export.beside, folder / export.beside.name)
    return agreement


def runner(path: Path) -> Run:
    """What runs a graph on one thread, by the names of its inputs and outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(_run, session)


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> Arrays:
    names = [each.name for each in session.get_outputs()]
    values = session.run(names, {each.name: feeds[each.name] for each in session.get_inputs()})
    return dict(zip(names, values, strict=True))


def _write_graph(graph: Graph, path: Path) -> None:
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(axes, auto) for name, axes in graph.varies.items()}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Ordered(graph.module).eval(),
            # A dict at the end would be taken for arguments by name.
            (graph.inputs, {}),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        assert program is not None, "with dynamo there is one"
        for node in program.model.graph:
            # It notes where this code lies, which is of no use to others.
            node.metadata_props.clear()
        program.save(str(path), external_data=False)


class _Ordered(nn.Module):
    """A graph's module, whose outputs come in order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(self.module(inputs).values())


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of its own insides, and of packages that nobody needs here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
