"""Compilation: the parts of an agent in which its time is spent become fused kernels, where there is a compiler."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from settings.learning import Compilation

# A curriculum compiles anew for each of its sizes. PyTorch's own limit is 8.
MOST_VERSIONS = 64
# Whether compiled parts are used at this moment.
_in_use = False
COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


class Part(NamedTuple):
    """A method that is to be compiled: one graph without a break, of the same shapes at every call."""

    owner: Any
    method: str


def missing(device: torch.device) -> str | None:
    """What compiling for a device needs and does not find; None where all is there."""
    if device.type == "cuda":
        return None if find_spec("triton") else "the package triton"
    wanted = os.environ.get("CXX")
    if any(shutil.which(name) for name in ((wanted,) if wanted else COMPILERS)):
        return None
    return f"a C++ compiler ({wanted or ', '.join(COMPILERS)})"


def compile_parts(
    parts: Iterable[Part],
    *,
    mode: Compilation,
    device: torch.device,
    tell: Callable[[str], None],
    backend: str | Callable[..., Any] = "inductor",
) -> bool:
    """Replace methods of these objects by compiled ones, or leave them as they are where there is no compiler.

    Each is compiled at its first call within `compiled_parts`.

    Args:
        parts: what to compile.
        mode: "graphs" records CUDA graphs, too.
        device: for which.
        tell: takes the line that says how long that takes, or why nothing is compiled.
        backend: of torch.compile.

    Returns:
        Whether they were replaced.
    """
    if backend == "inductor" and (lacking := missing(device)):
        tell(f"compile: {lacking} was not found; the run goes on without")
        return False
    tell("compile: the first updates take a minute or two, while kernels are made")
    _raise_limit()
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    if mode == "graphs" and device.type == "cuda" and backend == "inductor":
        options["mode"] = "reduce-overhead"
    for owner, method in parts:
        eager = getattr(owner, method)
        # Past the check of modules, that lets no attribute hide a method.
        object.__setattr__(owner, method, _falling_back(eager, torch.compile(eager, **options), tell))
    return True


@contextmanager
def compiled_parts(mode: Compilation, *, learning: bool) -> Iterator[None]:
    """Within, compiled parts are used: in an update, or where an agent acts, if its graphs are recorded.

    Elsewhere they run as they are written: acting, evaluation and pictures have batches of many sizes, each of which
    would be compiled by itself. Recorded graphs pay even so; what they gave before may be overwritten from here on.
    """
    global _in_use
    before = _in_use
    _in_use = mode == "graphs" or (mode == "kernels" and learning)
    if mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    try:
        yield
    finally:
        _in_use = before


def _falling_back(eager: Callable[..., Any], compiled: Callable[..., Any], tell: Callable[[str], None]) -> Any:
    # It takes a second to import, which nobody should wait for who compiles nothing.
    from torch._dynamo import exc

    # The second is not there before PyTorch 2.7.
    failures = (exc.BackendCompilerFailed, getattr(exc, "FailOnRecompileLimitHit", exc.BackendCompilerFailed))
    works = True

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal works
        if works and _in_use:
            try:
                return compiled(*args, **kwargs)
            except failures as error:
                # Nothing has been computed: the compiler is broken, or there are more shapes than it should know.
                works = False
                cause = textwrap.shorten(str(getattr(error, "inner_exception", error)), 120, placeholder=" ...")
                tell(f"compile: {eager.__name__} could not be compiled ({cause}); it runs as it is written")
        return eager(*args, **kwargs)

    return call


def _raise_limit() -> None:
    import torch._dynamo

    config: Any = torch._dynamo.config
    # Its name until PyTorch 2.6.
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, MOST_VERSIONS)
