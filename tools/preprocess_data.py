#!/usr/bin/env python3
"""Raw text to a shard of reversed (or forward) token ids: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json."""

import argparse

from megatron_ledom.errors import run_command


def parse() -> argparse.Namespace:
    """The command line; see README and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="*.jsonl[.gz|.zst], *.parquet, *.txt")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="Hugging Face folder, tokenizer.json or SentencePiece .model"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="path of the shard without ending")
    parser.add_argument("--direction", choices=["reverse", "forward"], default="reverse", help="order in which ids are stored")
    parser.add_argument("--text-key", default="text", help="JSON key or Parquet column of the text")
    parser.add_argument("--workers", type=int, help="processes; default: the cores this process may use")
    parser.add_argument("--eod-token", metavar="T", help="token that closes each document; default: the tokenizer's eos")
    parser.add_argument("--dtype", choices=["auto", "uint16", "int32"], default="auto", help="type of stored ids")
    parser.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="what to do with a bad record")
    parser.add_argument("--task-id", type=int, metavar="I", help="this task's share, from 0; default: SLURM_ARRAY_TASK_ID")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="tasks that divide the files; default: the SLURM array's")
    parser.add_argument("--overwrite", action="store_true", help="replace a shard that exists")
    return parser.parse_args()


def main() -> None:
    """Parse first, import after: `--help` answers at once."""
    arguments = parse()
    import logging

    from megatron_ledom.data.preprocess import PreprocessSettings, preprocess
    from megatron_ledom.direction import Direction

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    preprocess(PreprocessSettings(**{**vars(arguments), "direction": Direction(arguments.direction)}))


if __name__ == "__main__":
    run_command(main)
