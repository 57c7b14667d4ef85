"""Check Reverse Reward and generation on this device against the CPU in float64. On GPUs: not yet run on hardware."""

import math
from collections.abc import Sequence

import torch

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.direction import Direction
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.curves import largest_number
from megatron_ledom.hardware_check.training_runs import TrainingRuns, documents, own_layers
from megatron_ledom.inference import (
    Candidate,
    CandidateScore,
    ForwardLM,
    ReverseLM,
    RewardSettings,
    TransformersEngine,
    rank,
    score_questions,
)

TOLERANCE_NATS = 1e-3
"""Largest difference of a log-probability, summed over an answer, between float32 and float64."""
NEW_TOKENS, BATCH = 16, 8
Questions = list[tuple[str, list[Candidate]]]


def check_scores(setting: Setting) -> Outcome:
    """Train and export a model of each direction, then score, rank and generate on the device and on the CPU.

    The device computes in float32 and in batches, the CPU in float64 and one text at a time, so that they also differ if the
    device is the CPU.
    """
    runs = TrainingRuns(setting, [own_layers(setting.device), "train.train_iters=20", "optimizer.lr=3e-3"], list(Direction))
    runs.train({direction.value: [f"data.direction={direction.value}"] for direction in Direction})
    folders = {direction: f"{runs.run_dir(direction.value)}_hf" for direction in Direction}
    for direction, folder in folders.items():
        export_hf(runs.run_dir(direction.value), folder, verify=None)  # `conversion` has the parity check
    asked = questions()
    following_texts = [text[-24:] for text in documents(4, seed=3)]
    (found, texts), (expected, wanted_texts) = (
        scores_on(folders, device, dtype, batch_size, asked, following_texts)
        for device, dtype, batch_size in ((setting.device, torch.float32, BATCH), ("cpu", torch.float64, 1))
    )
    return judge(found, expected, texts, wanted_texts, setting.device)


def questions() -> Questions:
    """Return prompts with four answers each, from texts that the models were not trained on."""
    texts = documents(12, seed=2)
    prompts = [text.split(" are ")[0] + " are" for text in texts[:3]]
    answers = [[" " + text.split(" are ", 1)[1] for text in texts[start::3]] for start in range(3)]
    return [(prompt, [Candidate(answer) for answer in own]) for prompt, own in zip(prompts, answers, strict=True)]


def scores_on(
    folders: dict[Direction, str],
    device: str,
    dtype: torch.dtype,
    batch_size: int,
    asked: Questions,
    following_texts: list[str],
) -> tuple[list[list[CandidateScore]], list[str]]:
    """Return the scores of all answers, and the texts that the reverse model writes before the given ones."""
    reverse = ReverseLM.from_pretrained(folders[Direction.REVERSE], device, dtype)
    forward = ForwardLM.from_pretrained(folders[Direction.FORWARD], device, dtype)
    engines = TransformersEngine(forward, batch_size), TransformersEngine(reverse, batch_size)
    scores = score_questions(*engines, asked, RewardSettings())
    written = reverse.generate_preceding(following_texts, max_new_tokens=NEW_TOKENS, batch_size=batch_size)
    return scores, [one.text for one in written]


def judge(
    found: Sequence[Sequence[CandidateScore]],
    expected: Sequence[Sequence[CandidateScore]],
    texts: Sequence[str],
    wanted_texts: Sequence[str],
    device: str,
) -> Outcome:
    """Return the outcome: failed if a score is outside the tolerance, or if a ranking or a generated text differs."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    difference = largest_number(abs_difference(one, other) for one, other in pairs)
    ranks, wanted_ranks = ([rank([score.reward for score in scores]) for scores in side] for side in (found, expected))
    numbers = {"answers": len(pairs), "score_difference_nats": difference, "rankings": ranks, "texts": len(texts)}
    problems = []
    if not difference <= TOLERANCE_NATS:
        problems.append(f"scores differ by {difference:.1e} nats (tolerance {TOLERANCE_NATS:.0e})")
    if ranks != wanted_ranks:
        problems.append(f"the rankings are {ranks}, expected {wanted_ranks}")
    problems += [
        f"the generated text is {one!r}, expected {other!r}"
        for one, other in zip(texts, wanted_texts, strict=True)
        if one != other
    ][:1]
    if problems:
        return failed(f"on {device}, against the CPU in float64: {'; '.join(problems)}", **numbers)
    return passed(
        f"{len(pairs)} answers and {len(texts)} generated texts on {device} against the CPU in float64: same rankings and texts,"
        f" scores differ by {difference:.1e} nats (tolerance {TOLERANCE_NATS:.0e})",
        **numbers,
    )


def abs_difference(one: CandidateScore, other: CandidateScore) -> float:
    """Return the largest difference of the log-probabilities of an answer, in nats; infinity if one has no value."""
    pairs = [(one.forward_logprob, other.forward_logprob), (one.reverse_logprob, other.reverse_logprob)]
    return largest_number(math.inf if a is None or b is None else abs(a - b) for a, b in pairs)
