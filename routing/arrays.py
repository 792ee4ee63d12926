"""Reads batches of instances from NumPy's files, whose declared sizes are looked at before anything is unpacked."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from numpy.lib import format as npy_format

from config import UserError
from routing.matrices import COST_REMEDY, as_costs, impossible_cost
from routing.metrics import EXACT, GIVEN
from routing.parsing import LARGEST_COORDINATE, LARGEST_LOAD, InstanceError, RoutingInstance, quoted
from routing.windows import counted_from_opening

# What may stand beside each other; loads are of CVRP.
PLACES = ({"coords"}, {"costs"}, {"coords", "costs"})
LOADS = {"demand", "capacity"}
# Times are of VRPTW; who leaves these out needs none.
TIMES, MAY_LACK = {"ready", "due"}, {"service", "pace"}
# The most bytes that each array may have as float64: 16 million nodes.
LARGEST_UNPACKED = 2**28
# The signature of an entry in the directory of a zip archive; they are counted before a directory of millions is read.
ZIP_ENTRY = b"PK\x01\x02"
MOST_ENTRIES = 100
# numpy and zipfile raise these on bytes that are no array.
ARRAY_ERRORS = (
    *(ValueError, TypeError, OSError, EOFError, LookupError, OverflowError, RuntimeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, RecursionError, MemoryError),
)


def read_arrays(path: Path, content: bytes) -> list[RoutingInstance]:
    """The instances of an `.npy` or `.npz` file.

    Raises:
        InstanceError: it holds something else, or more than `LARGEST_UNPACKED`.
    """
    try:
        with warnings.catch_warnings():
            # numpy warns of a header that it mends, and numbers that are wrong then are refused below.
            warnings.simplefilter("ignore")
            arrays = _unpacked(path, content)
    except InstanceError:
        raise
    except ARRAY_ERRORS as error:
        cause = " ".join(str(error).split())[:100]
        raise InstanceError(f"{path}: is no NumPy file of numbers ({cause}); numpy.save and savez write them") from None
    return batch(path, arrays)


def _unpacked(path: Path, content: bytes) -> dict[str, np.ndarray]:
    if content.startswith(npy_format.MAGIC_PREFIX):
        return unnamed(_array(path, io.BytesIO(content), len(content)))
    if content.count(ZIP_ENTRY) > MOST_ENTRIES:
        raise _other_parts(path, f"more than {MOST_ENTRIES} arrays")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        # The sizes are checked before anything is unpacked.
        _require_parts(path, list(members))
        _require_size(path, sum(member.file_size for member in members.values()))
        arrays = {}
        for name, member in members.items():
            with archive.open(member) as stream:
                assert isinstance(stream, io.BufferedIOBase), "zipfile gives binary streams"
                arrays[name] = _array(path, stream, member.file_size)
        return arrays


def _array(path: Path, stream: io.BufferedIOBase, size: int) -> np.ndarray:
    """An array from a stream of `size` bytes, which its header must fit: numpy allocates what a header asks for."""
    version = npy_format.read_magic(stream)
    read_header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise UserError(f"version {version} of the format holds no array of numbers")
    shape, in_columns, dtype = read_header(stream)
    if dtype.hasobject:
        raise UserError("it holds Python objects")
    declared = math.prod(shape) * dtype.itemsize
    _require_size(path, math.prod(shape) * max(dtype.itemsize, np.dtype(np.float64).itemsize))
    if declared > size:
        raise UserError(f"shape {shape} needs {declared} bytes, and there are {size}")
    data = stream.read(declared)
    if len(data) != declared:
        raise EOFError(f"shape {shape} needs {declared} bytes, and there are {len(data)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if in_columns else "C")


def _require_size(path: Path, size: int) -> None:
    if size > LARGEST_UNPACKED:
        raise InstanceError(
            f"{path}: unpacks to {size / 1e9:.3g} GB, and {LARGEST_UNPACKED / 1e9:.2g} GB are read at most; split it"
        )


def _require_parts(path: Path, names: list[str]) -> None:
    given = set(names)
    timed = given - MAY_LACK if given >= TIMES else given
    if timed not in [places | more for places in PLACES for more in (set(), LOADS, LOADS | TIMES)]:
        raise _other_parts(path, quoted(", ".join(sorted(names))))


def _other_parts(path: Path, found: str) -> InstanceError:
    return InstanceError(
        f"{path}: holds {found}; `coords` [I, N, 2] or `costs` [I, N, N] is needed, with `demand` [I, N] and `capacity`"
        " [I] for CVRP, and `ready`, `due` and `service` [I, N] for VRPTW"
    )


def unnamed(array: np.ndarray) -> dict[str, np.ndarray]:
    """An array without a name under that of the part that it is: a square is costs, unless it may be two positions."""
    is_square = array.ndim in (2, 3) and array.shape[-1] == array.shape[-2] > 2
    return {"costs" if is_square else "coords": array}


def batch(path: Path, arrays: dict[str, np.ndarray]) -> list[RoutingInstance]:
    """The instances that `coords` or `costs`, `demand` and `capacity` of one file make.

    Raises:
        InstanceError: they make none.
    """
    _require_parts(path, list(arrays))
    matrices = _matrices(path, arrays["costs"]) if "costs" in arrays else None
    coords = _positions(path, arrays["coords"]) if "coords" in arrays else None
    if coords is None:
        assert matrices is not None, "parts are required"
        coords = np.zeros((*matrices.shape[:2], 0))
    shape = coords.shape[:2]
    if matrices is not None and matrices.shape[:2] != shape:
        cause = f"costs has shape {arrays['costs'].shape} beside coords of {arrays['coords'].shape}"
        raise InstanceError(f"{path}: {cause}; costs of the same instances and nodes are needed, or no coords")
    several = any(arrays[name].ndim == 3 for name in ("coords", "costs") if name in arrays)
    width = len(str(len(coords) - 1))
    names = [f"{path.stem}-{index:0{width}}" if several else path.stem for index in range(len(coords))]
    found = [RoutingInstance(name, "tsp", nodes, EXACT) for name, nodes in zip(names, coords, strict=True)]
    if matrices is not None:
        found = [
            each._replace(metric=GIVEN, costs=as_costs(matrix)) for each, matrix in zip(found, matrices, strict=True)
        ]
    if "demand" in arrays:
        demand, capacity = _loads(path, arrays, shape)
        found = [
            each._replace(problem="cvrp", demand=amounts, capacity=int(most))
            for each, amounts, most in zip(found, demand, capacity, strict=True)
        ]
    return _with_windows(path, arrays, found) if "ready" in arrays else found


def _with_windows(path: Path, arrays: dict[str, np.ndarray], found: list[RoutingInstance]) -> list[RoutingInstance]:
    """Instances with their time windows. A unit of length takes `pace` units of time, 1 where that is not given."""
    shape = (len(found), len(found[0].coords))
    parts = {name: _times(path, name, arrays, shape) for name in ("ready", "due", "service")}
    pace = _number_array(path, "pace", arrays.get("pace", np.ones(1)), largest=LARGEST_COORDINATE)
    if pace.size not in (1, shape[0]) or pace.ndim > 1 or (pace <= 0).any():
        raise InstanceError(f"{path}: pace has shape {pace.shape}; one number above 0 is needed, or one for each")
    if parts["service"][:, 0].any():
        raise InstanceError(f"{path}: has a service time at a depot, node 0; it needs 0 there")
    timed = []
    for row, each_pace in enumerate(np.broadcast_to(pace.reshape(-1), (shape[0],)).tolist()):
        ready, due, service = (parts[name][row] for name in ("ready", "due", "service"))
        windows = counted_from_opening(ready, due, service, each_pace)
        timed.append(found[row]._replace(problem="vrptw", windows=windows))
        timed[-1].require_served(path, called="customer" if shape[0] == 1 else f"instance {row}: node", counted_from=0)
    return timed


def _times(path: Path, name: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> Float64[np.ndarray, "I N"]:
    times = _number_array(path, name, arrays.get(name, np.zeros(shape)), largest=LARGEST_COORDINATE)
    times = times[None] if times.ndim == 1 and shape[0] == 1 else times
    if times.shape != shape or (times < 0).any():
        raise InstanceError(f"{path}: {name} is needed with shape {shape}, in numbers from 0 up, got {times.shape}")
    return times


def _positions(path: Path, array: np.ndarray) -> Float64[np.ndarray, "I N 2"]:
    coords = _number_array(path, "coords", array, largest=LARGEST_COORDINATE)
    coords = coords if coords.ndim == 3 else coords[None]
    if coords.ndim != 3 or coords.shape[-1] != 2 or coords.size == 0:
        is_square = coords.ndim == 3 and coords.shape[-1] == coords.shape[-2] > 2
        remedy = "call a matrix `costs`" if is_square else "[N, 2], or [I, N, 2] for a batch, is needed"
        raise InstanceError(f"{path}: coords has shape {array.shape}; {remedy}")
    return coords


def _matrices(path: Path, array: np.ndarray) -> Float64[np.ndarray, "I N N"]:
    _require_numbers(path, "costs", array)
    matrices = array.astype(np.float64)
    matrices = matrices if matrices.ndim == 3 else matrices[None]
    if matrices.ndim != 3 or matrices.shape[-1] != matrices.shape[-2] or matrices.size == 0:
        raise InstanceError(
            f"{path}: costs has shape {array.shape}; [N, N], from each node (row) to each, or [I, N, N] for a batch, is"
            " needed"
        )
    if place := impossible_cost(matrices):
        index = list(place if array.ndim == 3 else place[1:])
        raise InstanceError(f"{path}: costs{index} is {matrices[place]}; {COST_REMEDY}")
    return matrices


def _require_numbers(path: Path, name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "iuf":
        raise InstanceError(f"{path}: {name} is of type {array.dtype}; an array of numbers is needed")


def _number_array(path: Path, name: str, array: np.ndarray, *, largest: float) -> np.ndarray:
    _require_numbers(path, name, array)
    array = array.astype(np.float64)
    # Written so that NaN is refused too.
    impossible = np.argwhere(~(np.abs(array) <= largest))
    if len(impossible):
        place = tuple(int(index) for index in impossible[0])
        raise InstanceError(f"{path}: {name}{list(place)} is {array[place]}; numbers within +-{largest:g} are needed")
    return array


def _loads(
    path: Path, arrays: dict[str, np.ndarray], shape: tuple[int, ...]
) -> tuple[Int64[np.ndarray, "I N"], Int64[np.ndarray, " I"]]:
    """Demands and capacities of a batch."""
    demand = _number_array(path, "demand", arrays["demand"], largest=LARGEST_LOAD)
    capacity = _number_array(path, "capacity", arrays["capacity"], largest=LARGEST_LOAD)
    demand = demand[None] if demand.ndim == 1 and shape[0] == 1 else demand
    if demand.shape != shape or capacity.size not in (1, shape[0]) or capacity.ndim > 1:
        raise InstanceError(
            f"{path}: demand has shape {demand.shape} and capacity {capacity.shape} beside {shape[0]}"
            f" instances with {shape[1]} nodes; [I, N] and [I], or one capacity for all, are needed"
        )
    capacity = np.broadcast_to(capacity.reshape(-1), (shape[0],))
    for faulty, cause in (
        (demand[:, 0:1] != 0, "has a demand at its depot, node 0; it needs 0 there"),
        ((demand < 0) | (demand != np.floor(demand)), "has a demand that is negative or no whole number"),
        ((capacity < 0) | (capacity != np.floor(capacity)), "has a capacity that is negative or no whole number"),
        (demand > capacity[:, None], "has a demand above its capacity; no vehicle can carry it"),
    ):
        if faulty.any():
            raise InstanceError(f"{path}: instance {int(np.argwhere(faulty)[0, 0])} {cause}")
    return demand.astype(np.int64), capacity.astype(np.int64)
