"""Write a shard of reversed (or forward) token ids from raw text: P.bin, P.idx and the manifest P.json."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import (
    INPUT_HELP,
    add_bad_records,
    add_model_order,
    add_overwrite,
    add_search_options,
    add_text_template,
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="To resume a stopped command, run it again: it keeps the finished parts in P.work.",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help=INPUT_HELP)
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face folder, tokenizer.json, SentencePiece .model or .tiktoken file",
    )
    add("--output-prefix", required=True, metavar="P", help="path of the shard without extension")
    add(
        "--direction",
        choices=["reverse", "forward"],
        default="reverse",
        help="direction of the models that train on the shard (default %(default)s)",
    )
    add(
        "--text-key",
        default="text",
        help="field or column of the text; a.b is field b of the object in field a (default %(default)s)",
    )
    add_text_template(parser)
    add("--workers", type=int, help="number of processes (default: the number of available cores)")
    add(
        "--dtype",
        choices=["auto", "uint16", "int32"],
        default="auto",
        help="type of the stored ids; auto: the smaller one that fits the vocabulary (default %(default)s)",
    )
    add_bad_records(parser)
    add_overwrite(parser, "an existing shard, and unfinished work with other options")
    _add_groups(parser)
    return parser


def _add_groups(parser: argparse.ArgumentParser) -> None:
    ids = parser.add_argument_group("special tokens of a document")
    ids.add_argument("--eod-token", metavar="T", help="token that ends each document (eod; default: the tokenizer's eos)")
    ids.add_argument("--eod-id", type=int, metavar="N", help="the same token, by its id")
    ids.add_argument(
        "--bos-token",
        metavar="T",
        help="first token of each document in model order (default: none, as in the published LEDOM models)",
    )
    ids.add_argument(
        "--add-specials", action="store_true", help="add <CLS> <SEP> <EOD> <MASK> <PAD> to the tokenizer; eod is <EOD>"
    )

    add_model_order(parser)

    tasks = parser.add_argument_group("array tasks", "Each task takes an equal byte range of the input.")
    tasks.add_argument("--task-id", type=int, metavar="I", help="number of this task, from 0 (default: SLURM_ARRAY_TASK_ID)")
    tasks.add_argument("--num-tasks", type=int, metavar="N", help="number of tasks (default: that of the SLURM array)")

    quality = parser.add_argument_group("selection of documents", "The manifest counts skipped documents by reason.")
    quality.add_argument("--min-tokens", type=int, default=1, metavar="N", help="skip shorter documents (default %(default)s)")
    quality.add_argument("--max-tokens", type=int, metavar="N", help="skip longer documents")
    quality.add_argument("--filter", metavar="M:F", help="function F of module M: (text, record) -> True to keep the document")
    quality.add_argument(
        "--deduplicate",
        action="store_true",
        help="keep only the first of equal texts; array tasks need a --hash-only pass first",
    )
    quality.add_argument("--hash-only", action="store_true", help="first pass of --deduplicate in an array: write only hashes")
    quality.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="PATH",
        help="look for evaluation items in the kept documents: a folder of sets as for ledom evaluate --data, or JSON lines; the report is"
        " in P.contamination",
    )
    quality.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="shuffle the documents of each task's shard with this seed (default: keep their order)",
    )

    add_search_options(parser, action="drop")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a spinning thread per core; nothing here multiplies
    from megatron_ledom.cli.options import order_settings, search_settings
    from megatron_ledom.contamination.settings import SearchSettings
    from megatron_ledom.data.preprocess.pipeline import preprocess
    from megatron_ledom.data.preprocess.task import PreprocessSettings
    from megatron_ledom.data.readers.text_template import from_command_line
    from megatron_ledom.direction import Direction
    from megatron_ledom.errors import UsageError

    if arguments.text_template is not None:
        arguments.text_template = from_command_line(arguments.text_template)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    search, paths = search_settings(arguments, "drop"), vars(arguments).pop("decontaminate")
    index_folder = vars(arguments).pop("index_folder", None)
    order = order_settings(arguments)
    given = {**vars(arguments), "direction": Direction(arguments.direction), "order": order}
    if paths:
        from megatron_ledom.evaluation.known_items import known_decontamination

        search = search or SearchSettings()
        search.check()
        given["decontamination"] = known_decontamination(search, paths, index_folder)
    elif search is not None or index_folder is not None:
        raise UsageError("the options of the search for evaluation items need --decontaminate PATH")
    preprocess(PreprocessSettings(**given))
