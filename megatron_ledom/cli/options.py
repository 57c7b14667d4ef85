"""Options that several commands share, each with one spelling, one default and one help text."""

import argparse


def add_overwrite(parser: argparse.ArgumentParser, what: str = "a shard that exists") -> None:
    """Let a command replace what is there."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Take the config of a run, and overrides of its keys behind all options."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run, or a name from `ledom configs list`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Take the number of sequences that a model gets at once."""
    parser.add_argument("--batch-size", type=int, default=16, help="most sequences at once (default %(default)s)")


def add_unrecorded_direction(parser: argparse.ArgumentParser) -> None:
    """Let a reverse model be used whose folder does not say that it is one."""
    text = "of a reverse model whose config.json records no direction"
    parser.add_argument("--direction", choices=["reverse"], help=text)
    parser.add_argument("--eod-id", type=int, metavar="ID", help=f"{text}: the id that ends a text, if not the eos")


def add_text_template(parser: argparse.ArgumentParser) -> None:
    """Let a text be joined from several keys of a record."""
    text = r"joins several keys to one text, such as '{question}\n{answer}'; \n is a line break, a doubled brace a brace"
    parser.add_argument("--text-template", metavar="T", help=text)


def add_bad_records(parser: argparse.ArgumentParser) -> None:
    """Say which records are bad ones, and what becomes of them."""
    parser.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="what to do with a bad record")
    parser.add_argument("--max-record-bytes", type=int, default=256 << 20, metavar="N", help="a longer record is a bad one")
