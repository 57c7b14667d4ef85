"""Show which operators are built, and which a model and an optimizer would use on each device of this machine."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    return argparse.ArgumentParser(prog=prog, description=__doc__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    build_parser(prog).parse_args(argv)
    from megatron_ledom.ops.__main__ import main as describe

    describe()
