"""Rank answers by Reverse Reward: JSON lines with prompts and candidates in, the same with scores and a ranking out."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size, add_overwrite

TRUST = (
    "accept scores of a server that names neither tokens nor ids of the prompt: their number alone is checked, so a BOS in front"
    " with a cut end stays unseen (default: refuse such a server)"
)
TOO_LONG = (
    "texts with more tokens than a model has positions: refuse them at the start (default), or skip them without a score; sampled"
    " answers that come out longer when they are read again are skipped in both cases, and counted in a warning"
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--forward", required=True, metavar="DIR", help="folder of the forward model")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="folder of the reverse model")
    parser.add_argument("--input", required=True, metavar="FILE", help='JSON lines: {"prompt": ..., "candidates": [...]}')
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines: the input with scores, ranking, best")
    for side in ("forward", "reverse"):
        text = f"what runs the {side} model in this process (default transformers; vllm: pip install vllm)"
        parser.add_argument(f"--{side}-engine", choices=("transformers", "vllm"), default="transformers", help=text)
        text = (
            f"a completions server of the {side} model, as http://localhost:8000/v1; its folder is read for the tokenizer only"
        )
        parser.add_argument(f"--{side}-server", metavar="URL", help=text)
        parser.add_argument(
            f"--{side}-served-as", metavar="NAME", help="its name on that server (default: the folder as given)"
        )
    text = "send OPENAI_API_KEY to a server by plain http, on which others can read it, although it is not on this machine"
    parser.add_argument("--key-over-http", action="store_true", help=text)
    parser.add_argument("--trust-token-counts", action="store_true", help=TRUST)
    text = "eod of a public reverse checkpoint, whose config.json records no direction; in this process only"
    parser.add_argument("--reverse-eod-id", type=int, metavar="ID", help=text)
    add_batch_size(parser)
    parser.add_argument("--token-values", action="store_true", help="write the ids and log-probabilities of single tokens too")

    add_overwrite(parser, "an output, or unfinished work, that is there and was made from another input or with other options")
    parser.add_argument("--too-long", choices=("refuse", "skip"), default="refuse", help=TOO_LONG)

    reward = parser.add_argument_group("reward")
    reward.add_argument("--weight", type=float, default=0.5, help="lambda, the reverse model's share (default %(default)s)")
    for side, part in (("forward", "answer"), ("reverse", "prompt")):
        kinds = ("none", "token", "byte")
        reward.add_argument(
            f"--{side}-normalization", choices=kinds, default="none", help=f"by what of the {part} (default none)"
        )
    reward.add_argument("--language-model-weight", type=float, default=0.0, help="of log P_R(answer) (default 0: off)")
    reward.add_argument("--reward-temperature", type=float, default=1.0, help="divides the reward (default %(default)s)")
    reward.add_argument(
        "--include-ends", action="store_true", help="eod counts: the answer ends, the text begins with the prompt"
    )

    sampling = parser.add_argument_group("writing candidates with the forward model")
    sampling.add_argument("--sample", type=int, metavar="N", help="write N candidates for each prompt")
    sampling.add_argument("--beam", type=int, metavar="K", help="search step by step with K beams instead")
    sampling.add_argument("--expansions", type=int, metavar="N", help="of --beam, each step (default 3)")
    sampling.add_argument("--step-delimiter", metavar="D", help="of --beam: newline (default), regex:PATTERN or ids:13,198")
    sampling.add_argument("--greedy", action="store_true", default=None, help="write the likeliest answer too, as a baseline")
    sampling.add_argument("--temperature", type=float, help="(default 1.0)")
    sampling.add_argument("--top-p", type=float, help="(default 1.0: off)")
    sampling.add_argument("--top-k", type=int, help="(default 0: off)")
    sampling.add_argument("--max-new-tokens", type=int, help="of an answer (default 128)")
    sampling.add_argument("--seed", type=int, help="(default 0)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, then load and rank."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.inference.reverse_reward.command import rerank_command

    rerank_command(args)
