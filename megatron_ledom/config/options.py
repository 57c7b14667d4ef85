"""The options by which commands take the config of a run."""

import argparse


def add_config(parser: argparse.ArgumentParser, *, or_stages: bool = False) -> None:
    """Take the config of a run, and overrides of its keys. or_stages: a stage file is possible instead of a config."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", metavar="FILE", help="YAML file of the run, or a name from `ledom configs list`")
    if or_stages:
        group.add_argument(
            "--stages",
            metavar="FILE",
            help="YAML file with a list of runs that follow each other, each from the weights of the one before; overrides apply to all",
        )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
