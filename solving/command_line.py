"""What `solve.py` is told, and what of that cannot be meant."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from solving.decoding import FARTHEST_SIZE, Decoding
from solving.reconstruction import SECONDS
from system.terminal import Parser

# In place of a run: no model, and a solver for everything.
NO_RUN = Path("none")
PLAN = Decoding.PLAN
# What draws at random.
DRAW = ("sample", "active", Decoding.PARTS)
TRUST_HELP = "import and call what the run's config names; without it, code that a file names is never run"


def positive(text: str) -> int:
    """A count on the command line, also written as 1e6."""
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = 0
    if number < 1 or number != number // 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(number)


def _seed(text: str) -> int:
    number = int(text)
    # numpy's legacy generator takes no other seeds.
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return number


def make_parser(description: str | None) -> Parser:
    """The options, each with its help."""
    parser = Parser("solve.py", description=description)
    add = parser.add_argument
    run_help = "weights, a run's folder, or a checkpoint file in one; none: no model, a solver answers"
    add("run", type=Path, metavar="CHECKPOINT", help=run_help)
    add(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="TSPLIB, CVRPLIB, Solomon, .csv, .tsv, .json, .npy or .npz files",
    )
    add("--random", type=positive, metavar="COUNT", help="solve random instances instead of files")
    add("--nodes", type=positive, help="of the random instances, depot included; those of training where not given")
    add("--seed", type=_seed, help="of the random instances and of --decode sample (default 0)")
    decode_help = (
        f"how to look for tours (default greedy; {Decoding.PARTS}, which solves parts again and again, and --polish for"
        f" instances of more than {FARTHEST_SIZE} times the nodes trained on); {PLAN}: a solver, by the costs that the"
        " model expects or a file gives (default of none, and of runs that train no policy)"
    )
    add("--decode", choices=(*Decoding.METHODS, *Decoding.SEARCHES, Decoding.PARTS, PLAN), help=decode_help)
    add("--samples", type=positive, metavar="K", help="tours that sample draws (default 128)")
    add("--width", type=positive, metavar="K", help="states that beam keeps (default 4)")
    seconds_help = f"for each instance, then the best so far is taken (default of {Decoding.PARTS}: {SECONDS:g})"
    add("--seconds", type=_seconds, metavar="S", help=seconds_help)
    polish_help = "so many seconds of local search after that, by fast-tsp or PyVRP; 0: none"
    add("--polish", type=_seconds, metavar="S", help=polish_help)
    processes_help = "solvers that look at the same time (default 1; from 200 nodes on, as many as there are cores)"
    add("--processes", type=positive, metavar="P", help=processes_help)
    add("--imagine", action="store_true", help="show the tour that the model imagines, and the length it expects")
    add("--reference", choices=("lkh", "pyvrp", "none"), help="what to compare with; what is known where not given")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--out", type=Path, metavar="DIR", help="write tours (.tour, .sol) and pictures (.png) there")
    add("--device", default="auto", help="auto (the default) is CUDA where there is one")
    add("--trust", action="store_true", help=TRUST_HELP)
    return parser


def require_effect(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse options that would change nothing, and fill in the others."""
    if arguments.run == NO_RUN:
        _require_no_model(parser, arguments)
    if arguments.samples is not None and arguments.decode != "sample":
        parser.error(f"--samples is of --decode sample, and --decode is {arguments.decode or Decoding.method}")
    if arguments.seconds is not None and arguments.decode in (PLAN, Decoding.method, None):
        parser.error(
            f"--seconds is of --decode sample, augment, beam, active and {Decoding.PARTS}; --decode is"
            f" {arguments.decode or Decoding.method}, which has an end of its own"
        )
    if arguments.seconds == 0:
        parser.error("--seconds is 0; looking takes more than none")
    if arguments.width is not None and arguments.decode != "beam":
        parser.error(f"--width is of --decode beam, and --decode is {arguments.decode or Decoding.method}")
    if arguments.samples is not None and arguments.seconds is not None:
        parser.error("--samples and --seconds both say when to end; give one of them")
    if arguments.nodes is not None and not arguments.random:
        parser.error("--nodes is of --random instances; files have nodes of their own")
    if arguments.seed is not None and not (arguments.random or arguments.decode in DRAW):
        parser.error(f"--seed is of --random and of --decode {', '.join(DRAW)}; nothing is drawn here")
    if arguments.imagine and arguments.decode in (PLAN, Decoding.PARTS, *Decoding.SEARCHES):
        parser.error(
            f"--imagine shows what a policy imagines of whole instances, and --decode {arguments.decode} does not ask"
            " for that; leave one out"
        )
    arguments.samples = arguments.samples or Decoding.samples
    arguments.seed = arguments.seed or 0
    arguments.width = arguments.width or Decoding.width


def _require_no_model(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse what takes a model where there is none."""
    arguments.decode = arguments.decode or PLAN
    if arguments.decode != PLAN:
        parser.error(f"--decode {arguments.decode} is of a network, and the run is {NO_RUN}; give a run, or {PLAN}")
    if arguments.random:
        parser.error(f"--random draws what a run was trained on, and the run is {NO_RUN}; give files")
    if arguments.trust:
        parser.error(f"--trust is of code that a run names, and the run is {NO_RUN}; leave it out")
    if arguments.imagine:
        parser.error(f"--imagine asks a model, and the run is {NO_RUN}; give a run")
