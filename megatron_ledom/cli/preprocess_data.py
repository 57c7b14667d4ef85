"""Raw text to a shard of reversed (or forward) token ids: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_bad_records, add_overwrite, add_text_template


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Killed or failed, the same command goes on from its finished parts in P.work.",
    )
    add = parser.add_argument
    add(
        "--input", nargs="+", required=True, metavar="GLOB", help="files, globs, folders, @LIST of these, or s3:// and the like"
    )
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face folder, tokenizer.json, SentencePiece .model, .tiktoken",
    )
    add("--output-prefix", required=True, metavar="P", help="path of the shard without ending")
    add("--direction", choices=["reverse", "forward"], default="reverse", help="order in which ids are stored")
    add("--text-key", default="text", help="JSON key or column of the text; a.b is key b of the object at key a")
    add_text_template(parser)
    add("--workers", type=int, help="processes; default: the cores this process may use")
    add("--dtype", choices=["auto", "uint16", "int32"], default="auto", help="type of stored ids")
    add_bad_records(parser)
    add_overwrite(parser, "a shard that exists, and unfinished work of another request")

    ids = parser.add_argument_group("what closes and opens documents")
    ids.add_argument("--eod-token", metavar="T", help="token that closes each document; default: the tokenizer's eos")
    ids.add_argument("--eod-id", type=int, metavar="N", help="the same, by its id")
    ids.add_argument(
        "--bos-token", metavar="T", help="token that stands first in model order; default: none, as in the original"
    )
    ids.add_argument(
        "--add-specials", action="store_true", help="give the tokenizer <CLS> <SEP> <EOD> <MASK> <PAD>; eod is <EOD>"
    )

    tasks = parser.add_argument_group("tasks of an array", "Each takes an equal stretch of the input's bytes.")
    tasks.add_argument("--task-id", type=int, metavar="I", help="this task's number, from 0; default: SLURM_ARRAY_TASK_ID")
    tasks.add_argument("--num-tasks", type=int, metavar="N", help="number of tasks; default: the SLURM array's")

    quality = parser.add_argument_group("which documents are kept", "All counted by reason in the manifest.")
    quality.add_argument("--min-tokens", type=int, default=1, metavar="N", help="shorter documents are left out")
    quality.add_argument("--max-tokens", type=int, metavar="N", help="longer documents are left out")
    quality.add_argument(
        "--filter", metavar="M:F", help="function F of module M: (text, record) -> whether to keep the document"
    )
    quality.add_argument(
        "--deduplicate", action="store_true", help="keep the first of equal texts; tasks need --hash-only first"
    )
    quality.add_argument(
        "--hash-only", action="store_true", help="first pass of --deduplicate over an array: writes hashes only"
    )
    quality.add_argument("--shuffle-seed", type=int, metavar="N", help="shuffle the documents of each task's shard")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = build_parser(prog).parse_args(argv)
    import logging
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts a thread a core, which spin; nothing here multiplies
    from megatron_ledom.data.preprocess.pipeline import preprocess
    from megatron_ledom.data.preprocess.task import PreprocessSettings
    from megatron_ledom.data.readers.text_template import from_command_line
    from megatron_ledom.direction import Direction

    if arguments.text_template is not None:
        arguments.text_template = from_command_line(arguments.text_template)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    preprocess(PreprocessSettings(**{**vars(arguments), "direction": Direction(arguments.direction)}))
