"""The options by which commands take the config of a run."""

import argparse


def add_config(parser: argparse.ArgumentParser) -> None:
    """Take the config of a run, and overrides of its keys."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of the run, or a name from `ledom configs list`"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
