"""The operators that an agent hands to its device, counted on a device that exists on paper only.

    python -m benchmarks.operators --configs tsp_attn
    python -m benchmarks.operators --configs cartpole
    python -m benchmarks.operators --configs sac sac_pendulum --agent sac

PyTorch's device `meta` has shapes and no numbers. An agent acts and learns there as it does on a GPU, and what a GPU's
host would have to wait for, or a GPU refuses, shows without one: a number that is read, a result whose size depends on
numbers, a copy from host to device or back, two devices in one operator.

Launches are the operators that are no views: about as many kernels as a GPU is to run. PyTorch takes some operators
apart on its way to a kernel otherwise there than here, a GRU for one.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from envs.tasks import ObservationTask, RoutingTask, Task
from envs.vector import RoutingVectorEnv
from guard import Guard
from parts.acting import Sight
from sac import SAC
from settings.run import RunSettings
from training import launch
from training.devices import ROLES, make_generators
from training.replay import Replay
from training.setup import make_setup, make_task

ROOT = Path(__file__).parents[1]
PAPER, CPU = torch.device("meta"), torch.device("cpu")
AGENTS: dict[str, Any] = {"dreamer": Dreamer, "sac": SAC}
ENTRY_KEYS = {"agent": "dreamer (the default) or sac", "top": "how many operators to list by name (default: 10)"}
# For the results of these a host waits: numbers that it reads, and sizes that depend on numbers.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "aten.equal", "bincount")
COPYING = ("aten._to_copy.default", "aten.copy_.default")
# Functions that send numbers of the host to the device. On paper they call no operator.
UPLOADING = ("tensor", "as_tensor", "asarray")
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")


class WouldWait(AssertionError):
    """Work on the device would make the host wait."""


class MixedDevices(AssertionError):
    """An operator got tensors of two devices, which a GPU refuses."""


class Call(NamedTuple):
    """One operator that was handed to the device.

    Attributes:
        operator: its name, overload included.
        shapes: shape and dtype of every tensor among its arguments, in order.
        numbers: the other arguments: what the host decided, and what a recording of the work would repeat.
        place: the line of the library that called it, such as `guard.py:70`.
        launches: whether it computes something; False for a view.
    """

    operator: str
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    numbers: tuple[Any, ...]
    place: str
    launches: bool


class PaperGenerator(torch.Generator):
    """Draws shapes, and says that it lives on the device on paper, where no generator can be made.

    Operators get it without its Python class, so that it is known by its seed, which stays as it is.
    """

    device = PAPER
    SEED = 0x9A9E8

    def __init__(self) -> None:
        super().manual_seed(self.SEED)

    def manual_seed(self, seed: int) -> PaperGenerator:
        """Nothing: on paper no seed makes a difference."""
        return self


class PaperMark:
    """Marks a place in the device's work, which has come there already."""

    def query(self) -> bool:
        """Whether the work before the mark is done."""
        return True

    def synchronize(self) -> None:
        """Wait for it."""


class Recorder(TorchDispatchMode):
    """Notes in `calls` what is handed to the device on paper. Work on the host alone is passed over.

    Raises:
        WouldWait: a GPU's host would have to wait.
        MixedDevices: a GPU would refuse the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._patches = ExitStack()

    def __enter__(self) -> Recorder:
        for name in UPLOADING:
            self._patches.enter_context(patch.object(torch, name, _refusing_paper(getattr(torch, name))))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        leaves = _pytree.tree_leaves((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors) and keywords.get("device") != PAPER:
            return function(*arguments, **keywords)
        operator, place = str(function), _place()
        _require_one_device(operator, place, leaves)
        if why := _wait(operator, arguments, keywords, tensors):
            raise WouldWait(f"{operator} at {place}: {why}")
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        numbers = tuple(leaf for leaf in leaves if not isinstance(leaf, (Tensor, torch.Generator)))
        self.calls.append(Call(operator, shapes, numbers, place, not _is_view(function)))
        if operator == "aten._to_copy.default" and keywords.get("device") == CPU:
            # A host gets no numbers from paper.
            return torch.zeros(arguments[0].shape, dtype=keywords.get("dtype") or arguments[0].dtype, device=CPU)
        return function(*arguments, **keywords)


def _refusing_paper(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor of numbers, which refuses to make it on paper."""

    def make(*arguments: Any, **keywords: Any) -> Tensor:
        made = function(*arguments, **keywords)
        if made.is_meta and made is not arguments[0]:
            raise WouldWait(f"torch.{function.__name__} at {_place()}: numbers are copied from the host")
        return made

    return make


@functools.cache
def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


@functools.cache
def _in_library(file: str) -> str:
    """A file's path below the root; empty where it is none of the library's."""
    path = Path(file)
    # A virtual environment often lies in the checkout.
    others = path.parent.name in ("benchmarks", "tests") or "site-packages" in path.parts
    outside = others or not path.is_relative_to(ROOT)
    return "" if outside else str(path.relative_to(ROOT))


def _place() -> str:
    """The innermost line of the library that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if name := _in_library(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _require_one_device(operator: str, place: str, leaves: Sequence[Any]) -> None:
    """Check that tensors and generators are on paper; a single number of the host may join any operator.

    Raises:
        MixedDevices: one is not.
    """
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.ndim and operator not in COPYING:
            raise MixedDevices(f"{operator} at {place} gets a tensor of the host, of shape {tuple(leaf.shape)}")
        if isinstance(leaf, torch.Generator) and leaf.initial_seed() != PaperGenerator.SEED:
            raise MixedDevices(f"{operator} at {place} draws from a generator of the host")


def _wait(operator: str, arguments: Sequence[Any], keywords: dict[str, Any], tensors: Sequence[Tensor]) -> str:
    """Why the host would wait for an operator; empty where it would not."""
    if any(name in operator for name in READING):
        return "the host reads numbers, or needs them for a size"
    by_mask = operator in INDEXING and any(part is not None and part.dtype == torch.bool for part in arguments[1])
    # To fill with one number is a choice for each entry, and no size.
    if by_mask and (operator == "aten.index.Tensor" or arguments[2].numel() > 1):
        return "the size depends on a mask"
    if operator == "aten.repeat_interleave.Tensor" and keywords.get("output_size") is None:
        return "the size depends on numbers"
    if operator in COPYING:
        devices = {tensor.device for tensor in tensors} | {torch.device(keywords.get("device") or tensors[0].device)}
        goes_on = keywords.get("non_blocking") or (operator == "aten.copy_.default" and arguments[2:] == (True,))
        if devices != {PAPER} and not goes_on:
            return "host and device exchange tensors"
    return ""


class Paper(NamedTuple):
    """An agent on paper, a replay that is full, and what its environments show.

    `env` is None where the environments are gymnasium's, which live on the host.
    """

    agent: Any
    replay: Replay
    generators: dict[str, torch.Generator]
    sight: Sight
    env: RoutingVectorEnv | None

    def update(self, number: int, *, progress: float = 0.1) -> list[Call]:
        """What the update of this number hands to the device."""
        self.agent.learner.updates = number
        with Recorder() as recorder:
            self.agent.update(self.replay, progress=progress)
        return recorder.calls


@contextmanager
def on_paper() -> Iterator[None]:
    """Let modules, optimisers and marks, which ask for a device that there is, work on paper."""
    with (
        # Parameters that move there stay the same objects, as they do on their way to a GPU.
        patch("torch.__future__.get_swap_module_params_on_conversion", lambda: True),
        patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_arguments, **_keywords: None),
        patch("system.arrivals.mark", lambda _device: PaperMark()),
    ):
        yield


def make_paper(config: Config, make_agent: Any = Dreamer, *, device: torch.device = PAPER) -> Paper:
    """The agent of a config, on paper. To be called under `on_paper`, as what it gives is to be used there.

    On another device, which a test may ask for, it is a real agent, whose replay holds zeros.
    """
    settings, task = RunSettings.of(config), _task(config)
    count, nodes = settings.environments.envs, settings.task.nodes
    generators: dict[str, torch.Generator] = {role: PaperGenerator() for role in ROLES}
    if device != PAPER:
        generators = make_generators(config.seed, device)
    guard = Guard(device, settings.guard)
    agent = make_agent.of(task, config, device=device, generators=generators, guard=guard)
    env = None
    if isinstance(task, RoutingTask):
        curriculum = [(nodes - 1, 1), (nodes, None)] if settings.task.curriculum else []
        with Recorder():
            env = RoutingVectorEnv(
                task.rules,
                num_envs=count,
                num_nodes=nodes,
                curriculum=curriculum,
                device=device,
                generator=generators["environment"],
            )
            spaces, (obs, _) = task.stored(env), env.reset()
    else:
        assert isinstance(task, ObservationTask)
        spaces = task.spaces
        shown = {key: space for key, space in spaces.items() if key != "action"}
        obs = {key: torch.zeros((count, *shape), dtype=dtype, device=device) for key, (shape, dtype) in shown.items()}
    columns = 4 * agent.batch_length
    replay = Replay(spaces, num_envs=count, capacity=count * columns, device=device, memory=agent.memory_spaces)
    # The ring has gone round, as it has in most of a run.
    replay.total, replay.oldest = 3 * columns, 2 * columns
    sight = Sight(obs, torch.ones(count, dtype=torch.bool, device=device), any_first=True)
    return Paper(agent, replay, generators, sight, env)


def _task(config: Config) -> Task:
    """The config's task; environments of gymnasium are made on the host to be asked, and closed."""
    if not RunSettings.of(config).task.is_gym:
        return make_task(config)
    setup = make_setup(config, CPU)
    setup.close()
    return setup.task


def _row(title: str, calls: Sequence[Call]) -> str:
    return f"| {title} | {len(calls):,} | {sum(call.launches for call in calls):,} |"


def main(argv: list[str]) -> None:
    """Read the command line, count, and print two tables."""
    with one_line_errors("operators", *launch.USER_ERRORS):
        command = parse_command_line(
            argv, config_path=ROOT / "configs.yaml", description=__doc__ or "", entry_keys=ENTRY_KEYS
        )
        name, top = command.entry["agent"] or "dreamer", command.entry["top"] or "10"
        if name not in AGENTS or not top.isdigit():
            raise ConfigError(f"--agent is {name!r} and --top {top!r}; they take dreamer or sac, and a whole number")
        with on_paper():
            paper = make_paper(command.config, AGENTS[name])
            every = getattr(paper.agent, "model_every", 1)
            # The first update makes what the others find.
            paper.update(0)
            whole, others = paper.update(0), paper.update(1)
    print("| update | operators | launches |\n|---|---|---|")
    if every == 1:
        print(_row("every one", whole))
    else:
        print(_row(f"one of {every}, with the model", whole))
        print(_row("the others", others))
    print("\n| operator | times |\n|---|---|")
    for operator, times in Counter(call.operator for call in whole).most_common(int(top)):
        print(f"| `{operator}` | {times:,} |")


if __name__ == "__main__":
    main(sys.argv[1:])
