"""How fast samples of scenarios are cached, and what is left of a cache whose making is killed again and again.

    python -m benchmarks.scenario_cache --kills 5 --seed 0

Traffic is simulated and cached once from the beginning to the end; a second call has nothing to do. The same is then
done in another folder by a program that is killed at random moments and started anew, until one comes to its end: all
files of the two folders are compared bit for bit. Where other programs share the cores, samples in each second of a
processor say more than samples a second.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import config
from driving.features import FEATURES, TARGETS
from scenarios import caching, dataset
from scenarios.cache import Cache
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs
from scenarios.report import Report
from settings.scenarios import ScenarioSettings

ROOT = Path(config.__file__).parent
CONFIG_PATH = ROOT / "configs.yaml"
NEEDS = Needs((*FEATURES,), (*TARGETS, "reward"))
# Seconds after which a program has imported what it needs, and simulates; and between two looks at what it has written.
SIMULATING, POLL = 4.0, 0.01


def fill(folder: Path, arguments: argparse.Namespace) -> Report:
    """Cache the samples of simulated traffic in a folder."""
    keys = {
        "logs.maps": arguments.maps,
        "logs.recordings": 1,
        "logs.seconds": arguments.seconds,
        "cache.path": str(folder),
        "cache.workers": arguments.workers,
    }
    settings = ScenarioSettings.of(config.load(CONFIG_PATH, [], {}).replace(**keys))
    return caching.fill(settings, NEEDS, KNOWN, seed=arguments.seed)


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder, by its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def complete(folder: Path, report: Report) -> int:
    """Samples whose whole future is known."""
    future = [part for part in KNOWN if "future_valid" in part.arrays]
    rows = dataset.load(Cache(folder), report.entries, future, what="count")
    return int(rows.arrays["future_valid"].all(-1).sum())


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    """Cache everything twice, and print how long it takes.

    Returns:
        How many files of samples there are.
    """
    begin = time.perf_counter()
    report = fill(folder, arguments)
    seconds = time.perf_counter() - begin
    print("\n".join(report.lines()))
    size = sum(path.stat().st_size for path in folder.rglob("*.npz"))
    print(f"simulations too: {seconds:.1f} s on the wall, {report.rows / seconds:,.0f} samples a second")
    print(f"{complete(folder, report):,} samples have a whole future; {size / 1e6:,.0f} MB")
    begin = time.perf_counter()
    again = fill(folder, arguments)
    print(f"a second call: {again.computed} computed, {time.perf_counter() - begin:.1f} s")
    return len(sample_files(folder))


def sample_files(folder: Path) -> list[Path]:
    """Whole files of samples."""
    return list(folder.glob("[!.]*/*/[!.]*.npz"))


def kill_and_go_on(folder: Path, argv: list[str], arguments: argparse.Namespace, *, files: int) -> list[int]:
    """Cache everything in programs that are killed, and then in one that is not.

    Args:
        folder: an empty one.
        argv: of the command line.
        arguments: the same, read.
        files: of samples that there will be.

    Returns:
        How many of them there were after each kill; the first comes while traffic is simulated.
    """
    draws = random.Random(arguments.seed)
    targets = [0, *sorted(draws.randrange(1, files) for _ in range(arguments.kills - 1))][: arguments.kills]
    counts = []
    command = [sys.executable, "-m", "benchmarks.scenario_cache", *argv, "--fill", str(folder)]
    for target in targets:
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if not target:
                time.sleep(SIMULATING)
            while len(sample_files(folder)) < target and process.poll() is None:
                time.sleep(POLL)
            process.kill()
        counts.append(len(sample_files(folder)))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return counts


def main(argv: list[str]) -> None:
    """Read the command line; measure, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", default=["ingolstadt", "braunschweig"])
    parser.add_argument("--seconds", type=float, default=300.0, help="of simulated traffic on each map")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.fill:
        fill(arguments.fill, arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        counts = kill_and_go_on(killed, argv, arguments, files=measure(whole, arguments))
        one, other = digests(whole), digests(killed)
        differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        print(f"killed {len(counts)} times, with {', '.join(map(str, counts)) or 'no'} files of samples there")
        print(f"{len(one):,} files, {len(differing)} of them differ {differing[:5] or ''}")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
