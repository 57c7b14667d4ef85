"""Write pairs of a better and a worse answer, for DPO, from ranked answers: P.jsonl and P.parquet with prompt, chosen and rejected.

The rewards of the ranking decide. An answer without a reward (an empty, skipped or too long one) is in no pair, and neither are two
answers with equal rewards or equal texts. P.json records the options, the inputs and the counts. The same command again finds a
complete output and does nothing; after a kill it starts again. Exits with 1 if there is not one pair.

Examples:
  ledom export-preferences answers.jsonl --output pairs
  ledom export-preferences answers.jsonl answers_seed1.jsonl --output pairs --pairs all --min-margin 2 --max-pairs 4
"""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_overwrite

PAIRS = """pairs of one prompt: its best answer against the worst (best-worst, the default), the best against each other one
(best-others), or each better answer against each worse one (all)"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="outputs of `ledom rerank`; each of their prompts gives pairs")
    parser.add_argument("--output", required=True, metavar="P", help="path of the outputs without extension")
    parser.add_argument("--pairs", choices=("best-worst", "best-others", "all"), default="best-worst", help=PAIRS)
    parser.add_argument(
        "--min-margin",
        type=float,
        default=0.0,
        metavar="N",
        help="smallest difference of the two rewards, in nats (default 0: any difference)",
    )
    parser.add_argument(
        "--max-pairs", type=int, metavar="N", help="keep only the N pairs of each line that differ most (default: all)"
    )
    text = (
        "write messages instead of texts: the prompt without white space at its end is the user's, the answer the assistant's"
    )
    parser.add_argument("--conversational", action="store_true", help=text)
    add_overwrite(parser, "an output of other inputs or options")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.rewards.preferences import PreferenceSettings, export_preferences

    files, output, overwrite = args.pop("files"), args.pop("output"), args.pop("overwrite")
    export_preferences(files, output, PreferenceSettings(**args), overwrite=overwrite)
