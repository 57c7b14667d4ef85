"""Convert a checkpoint to a Hugging Face folder, or a Hugging Face folder to a run, with a parity check of the logits."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from megatron_ledom.cli.options import add_overwrite
from megatron_ledom.platform.core_versions import check_core
from megatron_ledom.platform.quiet import quiet_libraries

PARITY = (
    " A parity check compares the logits of both models in fp32. If they differ by more than 1e-4, the command exits with 1, names"
    " the first layer that differs, and writes nothing."
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "mcore-to-hf",
        help="convert a checkpoint to a stock Llama, Mistral, Qwen2 or Qwen3 folder",
        description="Write a Hugging Face folder that loads offline in stock transformers." + PARITY,
    )
    export.add_argument(
        "--load", required=True, metavar="RUN_OR_ITER", help="one checkpoint, or a run folder for its latest checkpoint"
    )
    export.add_argument("--save", required=True, metavar="DIR", help="folder to write; it appears only after the parity check")
    add_overwrite(export, "--save, if it is an earlier export")
    export.add_argument(
        "--architecture",
        metavar="NAME",
        help="architecture, such as MistralForCausalLM; default: the first that can represent the model",
    )
    export.add_argument(
        "--weights",
        choices=["main", "ema"],
        default="main",
        help="main: the weights; ema: their moving average, which a run with optimizer.ema_decay keeps (default %(default)s)",
    )
    load = commands.add_parser(
        "hf-to-mcore",
        help="convert a stock Llama, Mistral, Qwen2 or Qwen3 folder to a run folder to train",
        description="Write a run folder whose checkpoint contains the weights. Any layout can train it, with a new optimizer."
        + PARITY,
    )
    _add_import(load)
    for command in (export, load):
        _add_files_and_check(command)
    return parser


def _add_import(load: argparse.ArgumentParser) -> None:
    load.add_argument("--load", required=True, metavar="DIR", help="Hugging Face folder with safetensors")
    load.add_argument(
        "--save", required=True, metavar="RUN", help="run folder to write; it appears only after the parity check"
    )
    load.add_argument(
        "--direction", choices=["reverse", "forward", "both"], help="direction to train in; default: that of the folder"
    )
    for direction in ("forward", "reverse"):
        load.add_argument(
            f"--{direction}-marker",
            metavar="T",
            help=f"marker of the {direction} shards, as in `ledom preprocess-data --marker`; default: as the folder records",
        )
    load.add_argument(
        "--reverse-unit",
        choices=["token", "word", "entity", "segment"],
        help="unit of the reverse shards, as in `ledom preprocess-data --unit`; default: as the folder records, else token",
    )
    load.add_argument(
        "--reverse-boundary-token",
        metavar="T",
        help="boundary of the reverse shards, as in `ledom preprocess-data --boundary-token`; default: as the folder records",
    )
    load.add_argument("--tokenizer", metavar="PATH", help="folder or file of the tokenizer; default: --load")
    load.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="token that ends a document (eod), as in `ledom preprocess-data`; default: the tokenizer's eos",
    )
    load.add_argument(
        "--seq-length",
        type=int,
        metavar="TOKENS",
        help="data.seq_length of the run; default: the longest that the model allows",
    )
    load.add_argument(
        "--params-dtype",
        choices=["bf16", "fp32"],
        help="type of the weights; default: bf16 if the folder has bf16, else fp32 (exact)",
    )


def _add_files_and_check(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file, such as 500MB; default: %(default)s",
    )
    check = command.add_mutually_exclusive_group()
    check.add_argument(
        "--verify",
        choices=["auto", "whole", "layers"],
        default="auto",
        help="parity check with whole models or with one layer at a time; default: whole if both are small (512 MiB in fp32)",
    )
    check.add_argument(
        "--no-verify", action="store_true", help="skip the parity check: nothing then shows that both models agree"
    )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    arguments = build_parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    check_core()
    quiet_libraries()
    from transformers.utils import logging as transformers_logging

    from megatron_ledom.convert.hf_folder import parse_size

    transformers_logging.disable_progress_bar()

    both: dict[str, Any] = {
        "max_shard_size": parse_size(arguments.max_shard_size),
        "verify": None if arguments.no_verify else arguments.verify,
    }
    if arguments.command == "mcore-to-hf":
        from megatron_ledom.convert.hf_export import export_hf

        given = {name: getattr(arguments, name) for name in ("overwrite", "architecture", "weights")}
        export_hf(arguments.load, arguments.save, **given, **both)
        return
    from megatron_ledom.convert.hf_import import import_hf
    from megatron_ledom.convert.reading_options import ReadingOptions
    from megatron_ledom.direction import Unit

    names = ("direction", "tokenizer", "eod_token", "seq_length", "params_dtype")
    tokens = {name: getattr(arguments, name) for name in ("forward_marker", "reverse_marker", "reverse_boundary_token")}
    unit = None if arguments.reverse_unit is None else Unit(arguments.reverse_unit)
    order = ReadingOptions(**tokens, reverse_unit=unit)
    import_hf(arguments.load, arguments.save, order=order, **{key: getattr(arguments, key) for key in names}, **both)
