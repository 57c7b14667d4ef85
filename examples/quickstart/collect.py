"""Collect real text that every machine with this project has: the files of Python's library and of the installed packages.

Writes DIR/train.jsonl and DIR/valid.jsonl with one {"text", "source"} per file. The hash of a file's name decides where it goes.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from megatron_ledom.corpus.installed_text import Candidate, chosen_texts, json_line, list_candidates
from megatron_ledom.errors import DataError, run_command
from megatron_ledom.storage.files import new_file, write_file

MEGABYTE = 1_000_000


def collect(most_bytes: int) -> list[tuple[Candidate, str]]:
    """Return up to `most_bytes` of distinct texts, sorted by the hash of their names; prose is chosen first."""
    chosen: list[tuple[Candidate, str]] = []
    with tqdm(total=most_bytes, desc="collect", unit="B", unit_scale=True, disable=None) as bar:
        for candidate, text in chosen_texts(list_candidates(), most_bytes):
            chosen.append((candidate, text))
            bar.update(len(text.encode()))
    return sorted(chosen, key=lambda one: one[0].order)


def write(chosen: list[tuple[Candidate, str]], folder: Path, held_out_percent: float) -> dict[str, dict[str, int]]:
    """Write both files and totals.json; return the number of documents and of UTF-8 bytes of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = {}
    for split, held_out in (("train", False), ("valid", True)):
        mine = [(candidate, text) for candidate, text in chosen if candidate.is_held_out(held_out_percent) is held_out]
        with new_file(folder / f"{split}.jsonl") as file:
            for candidate, text in mine:
                file.write(json_line(candidate, text))
        totals[split] = {"documents": len(mine), "text_bytes": sum(len(text.encode()) for _, text in mine)}
    write_file(folder / "totals.json", json.dumps(totals))
    return totals


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--most-megabytes", type=float, default=40, help="stop at this size (default %(default)s)")
    parser.add_argument("--least-megabytes", type=float, default=20, help="fail if there is less text (default %(default)s)")
    parser.add_argument(
        "--held-out-percent",
        type=float,
        default=1.5,
        help="share of the files that goes into valid.jsonl (default %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Collect the text, check that there is enough, write it, and print the totals."""
    arguments = parse()
    chosen = collect(round(arguments.most_megabytes * MEGABYTE))
    found = sum(len(text.encode()) for _, text in chosen) / MEGABYTE
    if found < arguments.least_megabytes:
        raise DataError(
            f"only {found:.1f} MB of text found in this Python's library and packages; at least {arguments.least_megabytes:g} MB"
            " are needed; run it with the project's own environment (make quickstart), where the packages are installed"
        )
    print(json.dumps(write(chosen, Path(arguments.output), arguments.held_out_percent)))


if __name__ == "__main__":
    run_command(main)
