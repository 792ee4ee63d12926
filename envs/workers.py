"""Where a gymnasium environment runs: in this process, or in one of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import numpy as np
import torch
from torch import Tensor

from config import UserError
from envs.tasks import BAD_INPUT, NOTICE

MakeEnv = Callable[[], gymnasium.Env]

# How long an environment's process may take to close by itself.
CLOSE_SECONDS = 2.0

# The first answer may take so many times as long as any other: the process starts and makes its environment.
FIRST_ANSWER = 5

# The keys of packed arrays and numpy scalars, by which they come back as what they were.
ARRAY, SCALAR = "numpy array", "numpy scalar"


class WorkerFailure(Exception):
    """An environment's exception, or the death or silence of its process, as one line.

    Attributes:
        trace: the environment's own traceback; the line, where its process left none.
        mistake: the message, where the exception was about a mistake of the user's.
    """

    def __init__(self, line: str, *, trace: str | None = None, mistake: str | None = None) -> None:
        super().__init__(line)
        self.trace = f"{line}\n" if trace is None else trace
        self.mistake = mistake


class WrongAnswer(TypeError):
    """What a method of an environment returned is not what gymnasium's returns."""


class Worker(ABC):
    """Where one environment lives. Every `send` is followed by one `receive`."""

    @abstractmethod
    def send(self, method: str, *arguments: Any) -> None:
        """Ask for a method of `Host`."""

    @abstractmethod
    def receive(self) -> Any:
        """The answer. Raises `WorkerFailure`."""

    @abstractmethod
    def close(self) -> None:
        """Close the environment as well as its state allows."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask, and wait for the answer. Raises `WorkerFailure`."""
        self.send(method, *arguments)
        return self.receive()


class Host:
    """One environment, made when it is first needed, and what is asked of it."""

    def __init__(self, make_env: MakeEnv):
        self._make_env = make_env
        self._made: gymnasium.Env | None = None

    @property
    def _env(self) -> gymnasium.Env:
        if self._made is None:
            self._made = self._make_env()
        return self._made

    def describe(self) -> tuple[gymnasium.Space, gymnasium.Space, Any, str]:
        """Spaces, rules of the mask and name."""
        env = self._env
        rules = getattr(env.unwrapped, "mask_rules", None)
        name = type(env.unwrapped).__name__ if env.spec is None else env.spec.id
        return env.observation_space, env.action_space, rules, name

    def reset(self, seed: int) -> Any:
        obs, _ = _parts(self._env.reset(seed=seed), "reset()", ("obs", "info"))
        return obs

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, tuple[str, str]]]:
        obs, reward, terminated, truncated, info = _parts(
            self._env.step(action), "step()", ("obs", "reward", "terminated", "truncated", "info")
        )
        if not isinstance(info, dict):
            raise WrongAnswer(f"step() gave an info of type {type(info).__name__}, where a dict is needed")
        told = {key: info[key] for key in (BAD_INPUT, NOTICE) if key in info}
        flags = (bool(_number(flag, name)) for flag, name in ((terminated, "terminated"), (truncated, "truncated")))
        return obs, float(_number(reward, "reward")), *flags, told

    def state(self) -> dict[str, Any] | None:
        """The states of environment and wrappers, and the steps that time limits counted; None where it gives none."""
        inner: Any = None if self._made is None else self._made.unwrapped
        if not (hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict")):
            return None
        elapsed = [limit._elapsed_steps for limit in self._time_limits()]
        wrappers = [_pack(wrapper.state_dict(), "state_dict()") for wrapper in self._stateful_wrappers()]
        return {"state": _pack(inner.state_dict(), "state_dict()"), "elapsed_steps": elapsed, "wrappers": wrappers}

    def load(self, seed: int, saved: dict[str, Any]) -> None:
        # Wrappers refuse steps before a reset.
        self._env.reset(seed=seed)
        inner: Any = self._env.unwrapped
        inner.load_state_dict(_unpack(saved["state"]))
        for limit, elapsed in zip(self._time_limits(), saved["elapsed_steps"], strict=True):
            limit._elapsed_steps = elapsed
        for wrapper, state in zip(self._stateful_wrappers(), saved.get("wrappers", []), strict=True):
            wrapper.load_state_dict(_unpack(state))

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _time_limits(self) -> Iterator[Any]:
        return (wrapper for wrapper in self._wrappers() if "_elapsed_steps" in vars(wrapper))

    def _stateful_wrappers(self) -> Iterator[Any]:
        """Wrappers that have a state of their own; gymnasium's pass on nothing but `step` and the like."""
        return (wrapper for wrapper in self._wrappers() if hasattr(type(wrapper), "load_state_dict"))

    def _wrappers(self) -> Iterator[gymnasium.Wrapper]:
        env = self._env
        while isinstance(env, gymnasium.Wrapper):
            yield env
            env = env.env


class LocalWorker(Worker):
    """An environment in this process, which waits for its answers however long they take."""

    def __init__(self, make_env: MakeEnv):
        self._host = Host(make_env)
        self._request: tuple[str, tuple[Any, ...]] = ("describe", ())

    def send(self, method: str, *arguments: Any) -> None:
        self._request = method, arguments

    def receive(self) -> Any:
        method, arguments = self._request
        try:
            return getattr(self._host, method)(*arguments)
        # An environment that calls sys.exit() must not end the training.
        except BaseException as error:
            if _is_ctrl_c(error):
                raise
            trace, mistake = traceback.format_exc(), _mistake(error)
            raise WorkerFailure(_one_line(error), trace=trace, mistake=mistake) from error

    def close(self) -> None:
        # An environment may crash at the moment it is closed.
        with contextlib.suppress(Exception, SystemExit):
            self._host.close()


class ProcessWorker(Worker):
    """An environment in a process of its own, which ends with this process, however that ends.

    Processes are forked from a server which was started afresh and has imported this module: as quick as forking,
    and safe beside CUDA and threads, which do not survive a fork of the training process.

    Args:
        make_env: makes the environment, in the new process.
        timeout: seconds that an answer may take, and the first `FIRST_ANSWER` times as many; 0: any number. A process
            that has not answered by then is killed.
    """

    def __init__(self, make_env: MakeEnv, *, timeout: float):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, remote = context.Pipe()
        # multiprocessing's own pickler takes no lambdas.
        self._process = context.Process(target=_serve, args=(remote, cloudpickle.dumps(make_env)), daemon=True)
        self._process.start()
        # There is no second copy of the process's end of the pipe, so that its death reads as the end of the file.
        remote.close()
        self._timeout, self._patience = timeout, FIRST_ANSWER * timeout
        self._asked_at = 0.0
        # This is made once; the connection's own `poll` would make one for every answer.
        self._answers = select.poll()
        self._answers.register(self._connection, select.POLLIN)
        # At its end the interpreter sends SIGTERM to the processes that are left and waits for them. These ignore
        # SIGTERM, so they are ended before.
        self._end = Finalize(self, _end_process, (self._connection, self._process), exitpriority=0)

    def send(self, method: str, *arguments: Any) -> None:
        self._asked_at = time.monotonic()
        # A dead process shows when the answer is read.
        with contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps((method, arguments)))

    def receive(self) -> Any:
        patience, self._patience = self._patience, self._timeout
        # Time counts from the question, so that many silent processes take no longer than one.
        left = max(0.0, self._asked_at + patience - time.monotonic())
        if patience and not self._answers.poll(1000 * left):
            self._process.kill()
            raise WorkerFailure(f"its process did not answer within {patience:g} s")
        try:
            failed, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            self._process.join(CLOSE_SECONDS)
            code = self._process.exitcode
            cause = ", as where memory runs out" if code == -signal.SIGKILL else ""
            raise WorkerFailure(f"its process died (exit code {code}){cause}") from error
        if failed:
            line, trace, mistake = answer
            raise WorkerFailure(line, trace=trace, mistake=mistake) from RuntimeError(
                f"in the process of the environment:\n{trace}"
            )
        return answer

    def close(self) -> None:
        self._end()


def _end_process(connection: Connection, process: BaseProcess) -> None:
    connection.close()
    process.join(CLOSE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(connection: Connection, make_env: bytes) -> None:
    """Answer requests until the other end of the pipe is closed: by `close`, or by the end of its process."""
    # Ctrl-C, a closed terminal and a scheduler's signals reach the whole group of processes; what to do about them is
    # the training loop's to say. What an environment starts inherits signals that are ignored, not handlers: it can be
    # ended by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_follow_parent, daemon=True).start()
    host = Host(lambda: cloudpickle.loads(make_env)())
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = pickle.loads(connection.recv_bytes())
            try:
                # Spaces and rules may be of classes that only this pickler takes.
                reply = cloudpickle.dumps((False, getattr(host, method)(*arguments)))
            except BaseException as error:
                reply = pickle.dumps((True, (_one_line(error), traceback.format_exc(), _mistake(error))))
            connection.send_bytes(reply)
    with contextlib.suppress(Exception, SystemExit):
        host.close()


def _follow_parent() -> None:
    """End this process soon after the one that asks for steps, even in the middle of a step that never ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(CLOSE_SECONDS)
    os._exit(1)


def _parts(answer: Any, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The parts of what a method returned; those of older versions of gym are fewer."""
    if not isinstance(answer, tuple | list) or len(answer) != len(names):
        given = f"{len(answer)} values" if isinstance(answer, tuple | list) else f"a {type(answer).__name__}"
        raise WrongAnswer(f"{method} gave {given}, where a tuple of {', '.join(names)} is needed")
    return tuple(answer)


def _number(value: Any, name: str) -> Any:
    """One number; some environments wrap it into an array."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        shape = f" of shape {array.shape}" if array.shape else ""
        raise WrongAnswer(f"step() gave a {name} of type {type(value).__name__}{shape}, where one number is needed")
    return array.item()


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether the user interrupts this program: by Python's own handler, or by one that the program installed."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    handler = getattr(signal.getsignal(signal.SIGINT), "__code__", None)
    return handler is None or any(frame.f_code is handler for frame, _ in traceback.walk_tb(error.__traceback__))


def _mistake(error: BaseException) -> str | None:
    return str(error) if isinstance(error, UserError) else None


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception as second:
        text = f"(its message cannot be had: its __str__ raises {type(second).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _pack(value: Any, where: str) -> Any:
    """What `checkpoint.save` takes of an environment's state: arrays as tensors.

    Raises:
        TypeError: the state holds something else than arrays, tensors and plain values.
    """
    if isinstance(value, dict):
        return {key: _pack(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_pack(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        # A copy: tensors share no memory with arrays that may not be written, or that run backwards.
        return {SCALAR if isinstance(value, np.generic) else ARRAY: torch.from_numpy(np.array(value, order="C"))}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if type(value) in (int, float, str, bool, type(None)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, and only arrays, tensors and plain values can be saved")


def _unpack(value: Any) -> Any:
    """The inverse of `_pack`; tensors come back on the CPU."""
    if isinstance(value, dict):
        if value.keys() == {ARRAY}:
            return value[ARRAY].cpu().numpy().copy()
        if value.keys() == {SCALAR}:
            return value[SCALAR].cpu().numpy()[()]
        return {key: _unpack(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_unpack, value))
    return value.cpu().clone() if isinstance(value, Tensor) else value
