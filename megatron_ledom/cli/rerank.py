"""Rank answers by Reverse Reward. Reads JSON lines of prompts and candidates; writes them with scores and a ranking."""

import argparse
from collections.abc import Sequence

from megatron_ledom.cli.options import add_batch_size, add_overwrite

TRUST = (
    "accept a server that returns neither tokens nor ids of the prompt: only their number is checked, so an added BOS together"
    " with a cut end is not detected (default: refuse such a server)"
)
TOO_LONG = (
    "texts with more tokens than a model has positions: refuse them at the start (default), or skip them without a score; a sampled"
    " answer that is too long when it is tokenized again for scoring is skipped in both cases, and a warning counts them"
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--forward", required=True, metavar="DIR", help="folder of the forward model")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="folder of the reverse model")
    parser.add_argument(
        "--input", required=True, metavar="FILE", help='JSON lines, such as {"prompt": "...", "candidates": ["..."]}'
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="JSON lines: the input with scores, ranking and best candidate; the same command resumes it",
    )
    for side in ("forward", "reverse"):
        text = f"engine of the {side} model in this process (default transformers; vllm needs pip install vllm)"
        parser.add_argument(f"--{side}-engine", choices=("transformers", "vllm"), default="transformers", help=text)
        text = f"completions server of the {side} model, such as http://localhost:8000/v1; only the tokenizer of its folder is then read"
        parser.add_argument(f"--{side}-server", metavar="URL", help=text)
        parser.add_argument(
            f"--{side}-served-as", metavar="NAME", help="name of the model on that server (default: the folder as given)"
        )
    text = "send OPENAI_API_KEY by plain http to a server on another machine, where others can read it"
    parser.add_argument("--key-over-http", action="store_true", help=text)
    parser.add_argument("--trust-token-counts", action="store_true", help=TRUST)
    text = "id of the eod of a published reverse model whose config.json records no direction; not with a server or vLLM"
    parser.add_argument("--reverse-eod-id", type=int, metavar="ID", help=text)
    add_batch_size(parser)
    parser.add_argument("--token-values", action="store_true", help="also write the id and log-probability of each token")

    add_overwrite(parser, "an existing output, or unfinished work, of another input or other options")
    parser.add_argument("--too-long", choices=("refuse", "skip"), default="refuse", help=TOO_LONG)

    _add_reward(parser)
    _add_sampling(parser)
    return parser


def _add_reward(parser: argparse.ArgumentParser) -> None:
    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--weight", type=float, default=0.5, help="lambda, the weight of the reverse score, 0 to 1 (default %(default)s)"
    )
    for side, part in (("forward", "answer"), ("reverse", "prompt")):
        kinds = ("none", "token", "byte")
        reward.add_argument(
            f"--{side}-normalization",
            choices=kinds,
            default="none",
            help=f"divide the {side} score by the tokens or bytes of the {part} (default none)",
        )
    reward.add_argument("--language-model-weight", type=float, default=0.0, help="weight of log P_R(answer) (default 0: off)")
    reward.add_argument("--reward-temperature", type=float, default=1.0, help="divide the reward by this (default %(default)s)")
    reward.add_argument(
        "--include-ends", action="store_true", help="also score eod: the end of the answer, and the beginning of the prompt"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling candidates from the forward model")
    sampling.add_argument("--sample", type=int, metavar="N", help="sample N candidates for each prompt")
    sampling.add_argument("--beam", type=int, metavar="K", help="step-level search with K beams instead")
    sampling.add_argument(
        "--expansions", type=int, metavar="N", help="with --beam: continuations of each beam per step (default 3)"
    )
    sampling.add_argument(
        "--step-delimiter", metavar="D", help="with --beam: end of a step: newline (default), regex:PATTERN or ids:13,198"
    )
    sampling.add_argument(
        "--greedy", action="store_true", default=None, help="also write the most likely answer, as a baseline"
    )
    sampling.add_argument("--temperature", type=float, help="sampling temperature (default 1.0)")
    sampling.add_argument("--top-p", type=float, help="nucleus sampling (default 1.0: off)")
    sampling.add_argument("--top-k", type=int, help="sample from the k most likely tokens (default 0: off)")
    sampling.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens (default 128)")
    sampling.add_argument("--seed", type=int, help="seed of sampling (default 0)")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = vars(build_parser(prog).parse_args(argv))

    from megatron_ledom.inference.reverse_reward.command import rerank_command

    rerank_command(args)
