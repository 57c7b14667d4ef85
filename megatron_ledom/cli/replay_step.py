"""Repeat one step of a run bit for bit from the last checkpoint before it, and show its batch and its gradients.

Launch it as the run was: `torchrun --nproc-per-node N --no-python ledom replay-step --run RUN --iteration K`. Exit 1 when loss or
gradient norm is not as recorded. The run folder is only read.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="folder of the run, its run_dir")
    parser.add_argument("--iteration", required=True, type=int, metavar="K", help="as in bad_steps.jsonl")
    parser.add_argument("--show", type=int, default=4, metavar="N", help="samples of the batch to print as text")
    parser.add_argument("--allow-long", action="store_true", help="repeat more steps than lie between two checkpoints, too")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.training.replay import replay_step

    return replay_step(arguments.run, arguments.iteration, arguments.show, allow_long=arguments.allow_long)
