"""Export a checkpoint to a Hugging Face folder, through the logits gate."""

import argparse
import logging
import sys
import warnings

from megatron_ledom.errors import run_command


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "mcore-to-hf",
        help="checkpoint of the trainer -> stock LlamaForCausalLM folder",
        description="Write a Hugging Face folder that loads offline in stock transformers. Its logits are compared with the"
        " trained model's in fp32; above 1e-4 the command fails with 1 and writes nothing.",
    )
    export.add_argument(
        "--load", required=True, metavar="RUN_OR_ITER", help="run folder (its latest checkpoint) or one checkpoint"
    )
    export.add_argument("--save", required=True, metavar="DIR", help="folder to write; it appears when everything has passed")
    export.add_argument("--overwrite", action="store_true", help="replace --save if it exists")
    return parser.parse_args()


def main() -> None:
    """Parse, then export."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_ledom.convert.export_hf import export_hf

    export_hf(arguments.load, arguments.save, overwrite=arguments.overwrite)


if __name__ == "__main__":
    run_command(main)
