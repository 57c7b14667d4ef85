"""Options that several commands share, with one name, one default and one help text each."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ledom.contamination.settings import Action, SearchSettings
    from megatron_ledom.data.shards.model_order import OrderSettings

INPUT_HELP = (
    "files, folders, patterns in quotes, addresses such as s3://BUCKET/FILE or hf://datasets/ORG/NAME/FILE, or @LIST, a file"
    " with one of these per line; formats: JSON Lines, Parquet, Arrow, WET and plain text, the text formats also as .gz, .zst, .bz2 or .xz"
)
"""Help of --input of commands that read a corpus."""


def add_overwrite(parser: argparse.ArgumentParser, what: str = "an existing shard") -> None:
    """Let a command replace an existing output."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Take the largest number of sequences in one batch."""
    parser.add_argument(
        "--batch-size", type=int, default=16, help="largest number of sequences in one batch (default %(default)s)"
    )


def add_unrecorded_direction(parser: argparse.ArgumentParser) -> None:
    """Allow a reverse model whose folder records no direction."""
    text = "for a reverse model whose config.json records no direction"
    parser.add_argument("--direction", choices=["reverse"], help=text)
    parser.add_argument(
        "--eod-id", type=int, metavar="ID", help=f"{text}: id of the token that ends a text, if it is not the eos"
    )


def add_text_template(parser: argparse.ArgumentParser) -> None:
    """Let a text be joined from several fields of a record."""
    text = r"build the text from several fields, such as '{question}\n{answer}'; \n is a line break, {{ and }} are braces"
    parser.add_argument("--text-template", metavar="T", help=text)


def add_bad_records(parser: argparse.ArgumentParser) -> None:
    """Take the limit of a record and the action for a bad record."""
    parser.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="action for a bad record: stop, or skip and count it (default %(default)s)",
    )
    parser.add_argument(
        "--max-record-bytes",
        type=int,
        default=256 << 20,
        metavar="N",
        help="longest record; a longer one is bad (default %(default)s)",
    )


def add_model_order(parser: argparse.ArgumentParser) -> None:
    """Take unit and marker of the documents of a new shard."""
    group = parser.add_argument_group("reverse training", "Other orders than that of LEDOM: docs/how_to/two_way.md.")
    group.add_argument(
        "--marker",
        metavar="T",
        help="special token that begins each document in model order and names its direction, for a model that reads both (default:"
        " none)",
    )
    group.add_argument(
        "--unit",
        choices=["token", "word", "entity", "segment"],
        default="token",
        help="unit whose order is reversed: tokens; words; words, but capitalized words in a row stay together; segments of random"
        " length (default %(default)s)",
    )
    group.add_argument(
        "--boundary-token",
        metavar="T",
        help="with another unit than token: special token that separates units where the ids alone do not",
    )
    group.add_argument(
        "--segment-tokens",
        type=int,
        default=25,
        metavar="N",
        help="with --unit segment: most tokens of a segment (default %(default)s)",
    )
    group.add_argument(
        "--segment-seed",
        type=int,
        default=0,
        metavar="N",
        help="with --unit segment: seed of the lengths of segments (default %(default)s)",
    )


def order_settings(arguments: argparse.Namespace) -> "OrderSettings":
    """Remove the options of `add_model_order` from the arguments and return them as settings."""
    from megatron_ledom.data.shards.model_order import OrderSettings
    from megatron_ledom.direction import Unit

    names = ("unit", "marker", "boundary_token", "segment_tokens", "segment_seed")
    given = {name: vars(arguments).pop(name) for name in names}
    return OrderSettings(**{**given, "unit": Unit(given["unit"])})


def add_search_options(parser: argparse.ArgumentParser, action: str) -> None:
    """Take the settings of the search for evaluation items. action: the default action. Options that are not given are absent."""
    text = "Sources of the defaults: docs/how_to/decontaminate.md."
    group = parser.add_argument_group("search for evaluation items", text, argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--action",
        choices=["report", "drop", "cut"],
        help="for a contaminated document: only report it, drop it, or cut the passage with 200 characters on each side, so that the"
        f" pieces become documents (default {action})",
    )
    group.add_argument(
        "--match",
        choices=["either", "question", "answer", "both", "any"],
        help="what must be found of an item: its question or answer, the question, the answer, both, or any of question, answer and"
        " choices (default either)",
    )
    group.add_argument("--ngram", type=int, metavar="N", help="words equal in a row (default 8)")
    group.add_argument(
        "--min-words",
        type=int,
        metavar="N",
        help="do not look for shorter texts, which occur by chance (default 8)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="N",
        help="share of the words of a question or answer that must be found (default 0.5)",
    )
    group.add_argument(
        "--telling-words",
        type=int,
        metavar="N",
        help="different words of two letters or more that a passage must have, because rows of numbers occur by chance (default"
        " 4)",
    )
    group.add_argument(
        "--index-folder",
        metavar="DIR",
        help="keep the index of the items in this folder, so that each further job with the same items maps it instead of building it",
    )
    group.add_argument(
        "--ignore-numbers",
        action="store_true",
        default=argparse.SUPPRESS,
        help="find copies with other numbers too; more texts match by chance",
    )


def search_settings(arguments: argparse.Namespace, action: "Action") -> "SearchSettings | None":
    """Remove the options of `add_search_options` from the arguments and return them as settings; None if none is given."""
    from megatron_ledom.contamination.settings import SearchSettings

    names = ("action", "match", "ngram", "min_words", "threshold", "telling_words", "ignore_numbers")
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    for name in given:
        delattr(arguments, name)
    return SearchSettings(**{"action": action, **given}) if given else None
