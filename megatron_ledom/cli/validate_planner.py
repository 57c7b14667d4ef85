"""Compare the planner with published runs. Prints the tables of megatron_ledom/planning/validation/VALIDATION.md."""

import argparse
from collections.abc import Sequence


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--hardware",
        default="a100-80",
        metavar="NAME",
        help="hardware file to check (default %(default)s, which the published runs used)",
    )
    parser.add_argument(
        "--fit", action="store_true", help="first fit the efficiencies of the hardware to the published runs, and print them"
    )
    parser.add_argument("--write", metavar="FILE", help="also replace the tables between the marks in this file")
    parser.add_argument("--write-examples", metavar="FILE", help="also replace the worked examples in this file")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.markdown import write_between
    from megatron_ledom.planning.hardware import load_hardware
    from megatron_ledom.planning.validation.accuracy import PRIORS, file_of, fit, validation_page, worked_examples

    hardware = load_hardware(arguments.hardware)
    if arguments.fit:
        hardware = fit(hardware)
        print("\n".join(f"{name}: {getattr(hardware, name):.4f}" for name in PRIORS[file_of(hardware)]), end="\n\n")
    page = validation_page(hardware)
    print(page, end="")
    if arguments.write:
        write_between(arguments.write, "validation", page)
    if arguments.write_examples:
        write_between(arguments.write_examples, "plans", worked_examples())
