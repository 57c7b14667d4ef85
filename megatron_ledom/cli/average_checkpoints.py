"""Average the weights of checkpoints into a new run folder, to export or to train on from.

The fp32 main weights are summed in fp64 and rounded once; checkpoints of different layouts can be mixed. All files are verified by their
hashes. The result has no optimizer state: it is iteration 0 of a new run.
"""

import argparse
import logging
import sys
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--load",
        required=True,
        nargs="+",
        metavar="RUN_OR_ITER",
        help="a run folder, of which --last or --iterations choose checkpoints; or checkpoints of any runs, the newest last",
    )
    parser.add_argument("--save", required=True, metavar="RUN", help="run folder to write; it must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of the run")
    which.add_argument("--iterations", type=int, nargs="+", default=[], metavar="N", help="the checkpoints of these iterations")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--decay",
        type=float,
        metavar="D",
        help="exponential average: the newest counts 1, each earlier one D times the next; default: all count the same",
    )
    how.add_argument(
        "--factors", type=float, nargs="+", default=[], metavar="F", help="weighted average: one number for each checkpoint"
    )
    parser.add_argument(
        "--weights",
        choices=["main", "ema"],
        default="main",
        help="main: the weights; ema: their moving averages, which a run with optimizer.ema_decay keeps (default %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of a file, such as 500MB; default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from megatron_ledom.platform.core_versions import check_core
    from megatron_ledom.platform.quiet import quiet_libraries

    check_core()
    quiet_libraries()
    from megatron_ledom.convert.average import average_checkpoints
    from megatron_ledom.convert.hf_folder import parse_size

    given = ("last", "iterations", "decay", "factors", "weights")
    average_checkpoints(
        arguments.load,
        arguments.save,
        **{name: getattr(arguments, name) for name in given},
        max_shard_size=parse_size(arguments.max_shard_size),
    )
