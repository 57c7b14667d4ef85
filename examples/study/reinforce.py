#!/usr/bin/env python3
"""Train a forward model with TRL's GRPO on the reward of one arm, and measure it on the test problems.

The arm `none` measures without training. Writes one JSON file.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_rewards import ARMS, ArmReward, Scores
from indicators import marks_of
from lines import read_lines
from problems import GOLD

from megatron_ledom.errors import DataError, run_command

BATCH = 64
TEMPERATURE = 1.0
"""Answers are sampled from the model as it is, in training and in the test, so that the KL divergence is that of the model."""


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True, choices=list(ARMS.values()))
    parser.add_argument("--forward", required=True, metavar="DIR", help="the model that is trained")
    parser.add_argument("--reverse", required=True, metavar="DIR", help="the reverse model of the reward")
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE", help="training problems, each used once")
    parser.add_argument("--development", required=True, type=Path, metavar="FILE", help="ranked candidates that choose lambda")
    parser.add_argument("--test", required=True, type=Path, metavar="FILE", help="test problems")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--steps", type=int, default=60, help="(default %(default)s)")
    parser.add_argument("--num-questions", type=int, default=8, help="questions per step (default %(default)s)")
    parser.add_argument("--num-generations", type=int, default=8, help="answers to each (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="(default %(default)s)")
    parser.add_argument("--num-samples", type=int, default=8, help="sampled answers per test problem (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Build the reward, train, measure, and write the results."""
    args = parse()
    from transformers.utils.logging import disable_progress_bar

    from megatron_ledom.inference import ForwardLM, RewardSettings
    from megatron_ledom.rewards import ReverseRewardFunction, TrlReward
    from megatron_ledom.storage.files import write_file

    disable_progress_bar()
    weight, lowest = chosen_weight(args.development)
    settings = RewardSettings(weight=weight)
    policy, start = (ForwardLM.from_pretrained(args.forward, device="cpu") for _ in range(2))
    score = TrlReward(ReverseRewardFunction(start, args.reverse, settings, unscored=2 * lowest, batch_size=BATCH))
    reward = ArmReward(args.arm, score, args.num_generations, args.seed)
    log = [] if args.arm == "none" else train(policy, reward, args)
    records = list(read_lines(args.test))
    found = {"arm": args.arm, "seed": args.seed, "lambda": weight, "curve": reward.curve, "log": log}
    found["questions"] = measure(policy, start, score, records, args)
    found["right_answers"] = measure_texts(start, score, records, [r[GOLD] for r in records])
    write_file(args.output, json.dumps(found))


def chosen_weight(development: Path) -> tuple[float, float]:
    """Return the lambda with the highest accuracy on the development part, as in part 2, and the lowest reward there."""
    from megatron_ledom.evaluation.grading.answers import answers_by
    from megatron_ledom.evaluation.selection_methods import GRID, best_weight, load_questions
    from megatron_ledom.inference import RewardSettings

    questions = load_questions(development, GOLD, answers_by("number"), RewardSettings())
    weight = GRID[best_weight(questions, max(len(question.is_right) for question in questions))]
    scores = [score for record in read_lines(development) for score in record["scores"]]
    rewards = [
        (1 - weight) * s["forward_logprob"] + weight * s["reverse_logprob"]
        for s in scores
        if s["forward_logprob"] is not None and s["reverse_logprob"] is not None
    ]
    return weight, min([-1.0, *rewards])


def train(policy: Any, reward: ArmReward, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train the model in place with TRL, and return its log. Every arm of a seed sees the questions in the same order."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.forward, trust_remote_code=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.stop_ids[0])  # TRL ends answers at this token
    records = list(read_lines(args.questions))
    check_tokens(policy, tokenizer, records)
    data = Dataset.from_list([{"prompt": r["prompt"], "answer": r[GOLD]} for r in records])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.num_questions * args.num_generations,
            num_generations=args.num_generations,
            max_completion_length=args.max_new_tokens,
            temperature=TEMPERATURE,
            learning_rate=args.learning_rate,
            seed=args.seed,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,  # TRL's default is True
            gradient_checkpointing=False,  # TRL's default is True
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            policy.model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
    policy.model.eval()
    kept = ("loss", "grad_norm", "entropy", "completions/clipped_ratio")
    return [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history if "loss" in entry]


def check_tokens(policy: Any, tokenizer: Any, records: list[dict[str, Any]]) -> None:
    """Raise DataError unless TRL reads each prompt as the tokens of the pretraining. TRL has no token healing."""
    for record in records:
        text_ids, num = policy.tokenizer.split(record["prompt"], record[GOLD])
        found = tokenizer(text=record["prompt"])["input_ids"]
        if found != text_ids[:num]:
            prompt = record["prompt"]
            raise DataError(f"TRL reads the prompt {prompt!r} as the tokens {found}, training read {text_ids[:num]}")


def measure(
    policy: Any, start: Any, score: Scores, records: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Return for each test problem the greedy answer's mark, and the means over its sampled answers."""
    from megatron_ledom.evaluation.grading.answers import answers_by, classes_of, is_right

    prompts, num = [record["prompt"] for record in records], args.num_samples
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": BATCH}
    greedy = [one.following for one in policy.generate_following(prompts, **options)]
    written = policy.generate_following(prompts, temperature=TEMPERATURE, num_return_sequences=num, seed=args.seed, **options)
    texts = [one.following for one in written]
    repeated = [record for record in records for _ in range(num)]
    by_answer = measure_texts(start, score, repeated, texts)
    has_eod = [one.stopped for one in written]
    pairs = [(record["prompt"], text) for record, text in zip(repeated, texts, strict=True)]
    moved = zip(_logprobs(policy, pairs, has_eod), _logprobs(start, pairs, has_eod), strict=True)
    by_answer |= {"kl": [now - before for now, before in moved], "is_cut": [float(not stopped) for stopped in has_eod]}
    answers = answers_by("number")
    found = {name: [statistics.mean(group) for group in _groups(values, num)] for name, values in by_answer.items()}
    majority = [_voted(group, classes_of(group, answers)) for group in _groups(texts, num)]
    for name, chosen in (("greedy", greedy), ("majority", majority)):
        found[name] = [float(is_right(answers, r[GOLD], text)) for r, text in zip(records, chosen, strict=True)]
    return found


def measure_texts(start: Any, score: Scores, records: list[dict[str, Any]], texts: list[str]) -> dict[str, list[float]]:
    """Return for each answer its Reverse Reward, its length in tokens, and its marks."""
    rewards = score([record["prompt"] for record in records], texts)
    marks = [marks_of(record, text) for record, text in zip(records, texts, strict=True)]
    pairs = [(record["prompt"], text) for record, text in zip(records, texts, strict=True)]
    tokens = [float(len(ids) - num) for ids, num in (start.tokenizer.split(*pair) for pair in pairs)]
    return {"reward": rewards, "tokens": tokens, **{name: [one[name] for one in marks] for name in marks[0]}}


def _logprobs(model: Any, pairs: list[tuple[str, str]], has_eod: list[bool]) -> list[float]:
    """Return the log-probability of each answer, with eod if it was written."""
    found = [0.0] * len(pairs)
    for with_eod in (True, False):
        rows = [row for row, ended in enumerate(has_eod) if ended == with_eod]
        for row, one in zip(rows, model.span_scores([pairs[row] for row in rows], with_eod, BATCH), strict=True):
            found[row] = one.logprob
    return found


def _voted(texts: list[str], classes: list[int | None]) -> str:
    """Return an answer of the largest class, or an empty one if none has an answer."""
    known = Counter(one for one in classes if one is not None)
    return texts[classes.index(known.most_common(1)[0][0])] if known else ""


def _groups(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


if __name__ == "__main__":
    run_command(main)
