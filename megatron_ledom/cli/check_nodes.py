"""Check the nodes of a SLURM job in seconds before a run starts: GPUs and their errors, free disk, clocks, all-reduces.

Start it in the batch script: it starts one rank for each task of the job. The names of bad nodes are printed to stdout with commas,
the reasons to stderr. Exit code 0: healthy; 1: there are bad nodes; 3: something failed, and no node could be named.
What it reads of GPUs has not yet been run on hardware.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs that the job uses on each node (default: those that SLURM gives to this one)",
    )
    parser.add_argument(
        "--folders",
        nargs="+",
        default=["."],
        metavar="DIR",
        help="folders that every node must be able to write, such as the run folder and local scratch; the temporary folder of each"
        " node is one too (default: the current folder)",
    )
    parser.add_argument(
        "--free-gib", type=float, default=1.0, metavar="N", help="free space of each folder (default %(default)g GiB)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="time limit of the whole check (default %(default)g)"
    )
    parser.add_argument(
        "--all-reduce-seconds",
        type=float,
        default=2.0,
        metavar="N",
        help="time of the all-reduces of each node and of all; 0: none, so that torch is not imported (default %(default)g)",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=float,
        default=5.0,
        metavar="N",
        help="largest difference of a node's clock from that of the first node (default %(default)g)",
    )
    parser.add_argument(
        "--python", metavar="PATH", help="Python of the ranks, such as a program that enters a container (default: this one)"
    )
    parser.add_argument(
        "--srun-options",
        default="",
        metavar="OPTIONS",
        help="further options of the srun that starts the ranks, in one word, such as --srun-options='--container-image=FILE.sqsh'",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit code. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import os
    import sys

    from megatron_ledom.errors import UNFORESEEN
    from megatron_ledom.hardware_check.node_health import NodeRequest, check_node_health, describe, write_result
    from megatron_ledom.platform.slurm import gpus_of_node

    given = vars(arguments)
    path = given.pop("json")
    if given["gpus"] is None:
        given["gpus"] = gpus_of_node(os.environ)
    given["python"] = given["python"] or sys.executable
    health = check_node_health(NodeRequest(**given))
    if path:
        write_result(health, path)
    print(describe(health), end="", file=sys.stderr)
    if health.bad:
        print(",".join(health.bad))
        return 1
    return UNFORESEEN if health.unexplained else 0
