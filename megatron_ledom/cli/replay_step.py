"""Compute one step of a run again, bit for bit, from the last checkpoint before it. Shows its batch and its gradients.

Launch it like the run: `torchrun --nproc-per-node N --no-python ledom replay-step --run RUN --iteration K`. It exits with 1 if the
loss or gradient norm differs from the record. It changes nothing in the run folder.
"""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="folder of the run (run_dir)")
    parser.add_argument(
        "--iteration", required=True, type=int, metavar="K", help="iteration to replay, for example one from bad_steps.jsonl"
    )
    parser.add_argument(
        "--show", type=int, default=4, metavar="N", help="number of samples of the batch to print as text (default %(default)s)"
    )
    parser.add_argument(
        "--allow-long", action="store_true", help="allow a replay of more steps than lie between two checkpoints"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.platform.core_versions import check_core
    from megatron_ledom.platform.quiet import quiet_libraries

    check_core()
    quiet_libraries()
    from megatron_ledom.training.replay import replay_step

    return replay_step(arguments.run, arguments.iteration, arguments.show, allow_long=arguments.allow_long)
