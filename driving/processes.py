"""Simulations in processes of their own: so there can be several, and one that crashes takes nothing else along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from driving.frames import Frame
from driving.packages import import_libsumo
from driving.simulator import Simulation
from system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from driving.processes import serve; serve(int(sys.argv[1]))"
# Seconds that an answer may take, and the end of a process whose pipe is closed.
PATIENCE, END = 120.0, 5.0
ANSWER, MISTAKE, CRASH = range(3)


class SimulationCrashed(RuntimeError):
    """SUMO has raised an error, has died or is silent. The message is one line, or a traceback of the process."""


class SimulationProcess:
    """A process that simulates, one traffic after another.

    What it is asked is asked of a `Simulation` there, under the same names. After a `SimulationCrashed` the next
    `begin` starts another process.
    """

    def __init__(self) -> None:
        """Prepare; the process starts with the first `begin`.

        Raises:
            UserError: SUMO is not installed.
        """
        import_libsumo()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def begin(self, map_name: str, *, seed: int, start: float) -> None:
        """End what was simulated, and begin another traffic; see `Simulation`.

        Raises:
            UserError: there is no such map, or no such moment.
            SimulationCrashed: it cannot be begun.
        """
        if self._process is None:
            self._start()
        self._ask("begin", map_name, seed, start)

    def frame(self) -> Frame:
        """Who is where now; see `Simulation.frame`."""
        return self._ask("frame")

    def cars(self) -> list[tuple[str, int, float]]:
        """The cars on lanes of the map; see `Simulation.cars`."""
        return self._ask("cars")

    def take(self, name: str) -> None:
        """Let the route of a vehicle go on to where the map ends; see `Simulation.take`."""
        self._ask("take", name)

    def advance(self) -> Frame:
        """Let half a second go by; see `Simulation.advance`."""
        return self._ask("advance")

    def drive(self, name: str, poses: Sequence[tuple[float, float, float, float]] = ()) -> Frame | None:
        """The same with a vehicle that is driven from outside; see `Simulation.drive`."""
        return self._ask("drive", name, poses)

    def close(self) -> None:
        """End the process."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if connection is not None:
            # It ends where its pipe does.
            connection.close()
        if process is not None:
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> None:
        self._connection, remote = multiprocessing.Pipe()
        # No child of `multiprocessing`: environments run in such children, which may have none of their own.
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(remote.fileno())],
            # Wherever this program has gone to, and whatever Python is told of paths.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
            pass_fds=[remote.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        remote.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._connection is None:
            raise SimulationCrashed("there is no simulation: begin one")
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(PATIENCE):
                raise TimeoutError
            kind, answer = self._connection.recv()
        except TimeoutError as error:
            assert self._process is not None
            self._process.kill()
            self.close()
            raise SimulationCrashed(f"SUMO did not answer within {PATIENCE:g} s") from error
        except (EOFError, OSError) as error:
            process = self._process
            self.close()
            code = None if process is None else process.returncode
            raise SimulationCrashed(f"SUMO's process died (exit code {code})") from error
        if kind == MISTAKE:
            raise UserError(answer)
        if kind == CRASH:
            self.close()
            raise SimulationCrashed(answer)
        return answer


def serve(descriptor: int) -> None:
    """Answer what comes through a pipe, until it is closed by the other side or by its end."""
    # Ctrl-C reaches all processes of a terminal; what to do about it is for the one that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    simulation: Simulation | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            break
        try:
            if method == "begin":
                if simulation is not None:
                    simulation.close()
                map_name, seed, start = arguments
                simulation = Simulation(map_name, seed=seed, start=start)
                reply: tuple[int, Any] = (ANSWER, None)
            else:
                reply = (ANSWER, getattr(simulation, method)(*arguments))
        except UserError as error:
            reply = (MISTAKE, str(error))
        except Exception:
            reply = (CRASH, traceback.format_exc())
        try:
            connection.send(reply)
        except OSError:
            break
    if simulation is not None:
        simulation.close()
    # SUMO's library may crash where the interpreter takes it down; all is done here.
    os._exit(0)
