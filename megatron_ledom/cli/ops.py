"""Show what is built, and what a model and an optimizer would use on each type of device here."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    return argparse.ArgumentParser(prog=prog, description=__doc__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse first, import after: `--help` answers at once."""
    build_parser(prog).parse_args(argv)
    from megatron_ledom.ops.__main__ import main as describe

    describe()
