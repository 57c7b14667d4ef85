"""Evaluate a model of either direction on tasks from local files. Writes metrics with intervals and the result of every item."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="folder of the model")
    parser.add_argument(
        "--direction",
        choices=["reverse", "forward"],
        help="direction of the model (default: that of its config.json, else forward)",
    )
    parser.add_argument(
        "--eod-id",
        type=int,
        metavar="ID",
        help="for a reverse model whose config.json records no direction: id of the token that ends a text",
    )
    parser.add_argument("--tasks", metavar="NAME,NAME", help="tasks to evaluate; --list shows them")
    parser.add_argument("--data", metavar="DIR", help="folder with the files of the tasks")
    parser.add_argument("--output", metavar="DIR", help="folder of the results; the same command resumes them")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument(
        "--num-fewshot", type=int, default=0, metavar="K", help="solved examples in each prompt (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing these examples (default %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest generated answer, in tokens (default: that of the task)"
    )
    add_batch_size(parser)
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes; tasks on code need it"
    )
    parser.add_argument(
        "--sandbox",
        choices=["bwrap", "none"],
        default="bwrap",
        help="where such programs run: bwrap: inside bubblewrap; none: with resource limits only, so they can read your files and"
        " use the network (default %(default)s)",
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="only print the prompts of N items, without loading weights"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check the options, the tasks, their files and the tokenizer, without loading weights or writing anything; the"
        " sandbox and the device are not checked, since a login node may lack them",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="only list the tasks, the sources of their files, and the hashes of the files in --data",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.evaluation.evaluate_command import evaluate_command

    evaluate_command(args)
