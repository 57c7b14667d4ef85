"""Judge a model of either direction on tasks from local files: figures with intervals, and what was found of every item."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="folder of the model")
    parser.add_argument(
        "--direction", choices=["reverse", "forward"], help="(default: what its config.json says, else forward)"
    )
    parser.add_argument("--eod-id", type=int, metavar="ID", help="of a reverse model whose config.json records no direction")
    parser.add_argument("--tasks", metavar="NAME,NAME", help="what to judge it on; see --list")
    parser.add_argument("--data", metavar="DIR", help="folder with the tasks' files")
    parser.add_argument("--output", metavar="DIR", help="folder of the results; the same command goes on where it stopped")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--num-fewshot", type=int, default=0, metavar="K", help="demonstrations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of demonstrations (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most that is written (default: the task's own)")
    add_batch_size(parser)
    parser.add_argument("--allow-code-execution", action="store_true", help="run what a model writes for tasks that need it")
    parser.add_argument(
        "--sandbox",
        choices=["bwrap", "none"],
        default="bwrap",
        help="where such programs run: inside bubblewrap, or with limits only, where they can read your files and use the network"
        " (default %(default)s)",
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="instead: print the prompts of N items; no weights")
    parser.add_argument("--list", action="store_true", help="instead: the tasks, where to get them, hashes of those in --data")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, then judge."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.evaluation.evaluate_command import evaluate_command

    evaluate_command(args)
