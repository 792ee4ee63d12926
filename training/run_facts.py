"""What a logdir tells of its run: the config, the command, the commit, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import config
from comparing.runs import CONFIG_FILE, RUN_FILE
from config import Config
from system import safe_files

PACKAGES = ("torch", "numpy", "gymnasium", "tensorboard", "ruamel.yaml", "elkai")


def save_run_facts(
    logdir: Path,
    resolved: Config,
    argv: Sequence[str],
    *,
    defaults: Config,
    flags: Mapping[str, str | None] | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write config.yaml, and run.json with the command, the commit and the package versions.

    Args:
        logdir: an existing folder.
        resolved: the run's config.
        argv: the command, program included.
        defaults: the config to compare with.
        flags: the program's own, which are no config keys and yet make another kind of run.
        changes: of the config at which steps, where the run has gone on otherwise than it was.

    Returns:
        A page for TensorBoard's text tab: the command, what differs from the defaults, the resolved config.
    """
    config.save(resolved, logdir / CONFIG_FILE)
    command = shlex.join(argv)
    facts = {
        "command": command,
        "program": argv[0],
        "flags": {name: value for name, value in (flags or {}).items() if value is not None},
        "changes": list(changes),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    safe_files.write_text(logdir / RUN_FILE, json.dumps(facts, indent=2) + "\n")
    before = defaults.flat()
    differing = [
        f"| {key} | {before.get(key)} | {value} |" for key, value in config.difference(resolved, defaults).items()
    ]
    table = ["| key | default | this run |", "| --- | --- | --- |", *differing] if differing else ["nothing"]
    yaml_block = ["```yaml", config.to_yaml(resolved).rstrip(), "```"]
    return "\n".join([f"`{command}`", "", "## Differs from the defaults", "", *table, "", "## Config", "", *yaml_block])


def _commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
