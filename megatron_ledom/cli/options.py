"""Options that several commands share, with one name, one default and one help text each."""

import argparse

INPUT_HELP = (
    "files, folders, patterns in quotes, addresses such as s3://BUCKET/FILE, or @LIST, a file with one of these per line; formats: JSON"
    " Lines, Parquet, Arrow, WET and plain text, the text formats also as .gz, .zst, .bz2 or .xz"
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
