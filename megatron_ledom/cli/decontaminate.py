"""Find the items of evaluation sets in training text, report them, and drop the documents that have one or cut it out."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import INPUT_HELP, add_bad_records, add_overwrite, add_search_options

EPILOG = """\
A document is contaminated by an item if it has at least --threshold of the words of its question or answer, in runs of --ngram words that
are near each other. Case, punctuation, white space, accents and LaTeX spacing make no difference. ledom preprocess-data --decontaminate
does the same without a second pass over the text. Exit codes: 0 done; 1 a bad record, or with --check a contaminated document; 2 wrong
usage. To resume a stopped command, run it again."""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help=INPUT_HELP)
    add(
        "--items",
        nargs="+",
        required=True,
        metavar="PATH",
        help="items to look for: a folder of evaluation sets as for ledom evaluate --data, or JSON lines with question, answer and choices",
    )
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of contamination.json, the report by set and item, and with --action drop or cut of the new files, in the same format",
    )
    add("--text-key", default="text", help="field or column of the text (default %(default)s)")
    add("--workers", type=int, help="number of processes (default: the number of available cores)")
    add("--check", action="store_true", help="exit with 1 if a document is contaminated")
    add_search_options(parser, action="report")
    add_bad_records(parser)
    add_overwrite(parser, "an existing report and its files, and unfinished work with other options")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in preprocess_data.py
    from megatron_ledom.cli.options import search_settings
    from megatron_ledom.contamination.settings import SearchSettings
    from megatron_ledom.data.decontaminate.command import DecontaminateSettings, decontaminate
    from megatron_ledom.evaluation.known_items import known_decontamination

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    index_folder = vars(arguments).pop("index_folder", None)
    settings = search_settings(arguments, "report") or SearchSettings(action="report")
    settings.check()
    decontaminate(
        DecontaminateSettings(
            input=arguments.input,
            output=arguments.output,
            decontamination=known_decontamination(settings, arguments.items, index_folder),
            text_key=arguments.text_key,
            workers=arguments.workers,
            check=arguments.check,
            on_error=arguments.on_error,
            max_record_bytes=arguments.max_record_bytes,
            overwrite=arguments.overwrite,
        )
    )
