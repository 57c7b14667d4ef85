"""Language models of both directions whose conditionals are those of one explicit joint distribution."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models

from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.joint_tokenizer import JointTokenizer

LETTERS = "abc"
TEXTS = ["".join(letters) for letters in itertools.product(LETTERS, repeat=4)]


class EnumeratedModel:
    """A causal model with the exact conditionals of a joint distribution over all texts of four letters.

    reverse: texts are read from their end. An eod before a document does not change the conditionals.
    """

    def __init__(self, joint: dict[str, float], reverse: bool) -> None:
        self.config = SimpleNamespace(vocab_size=len(LETTERS) + 1)
        self.device = torch.device("cpu")
        self._joint = {tuple(map(LETTERS.index, text[::-1] if reverse else text)): p for text, p in joint.items()}

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        eod = len(LETTERS)
        rows = []
        for row in input_ids.tolist():
            read = [[token for token in row[: position + 1] if token != eod] for position in range(len(row))]
            rows.append([[self._log_mass([*prefix, token]) for token in range(eod)] + [-100.0] for prefix in read])
        return SimpleNamespace(logits=torch.tensor(rows, dtype=torch.float64)[:, -logits_to_keep:])

    def _log_mass(self, prefix: list[int]) -> float:
        mass = sum(p for text, p in self._joint.items() if text[: len(prefix)] == tuple(prefix))
        return math.log(mass) if mass else -100.0


def letters_lm(kind: type[ForwardLM] | type[ReverseLM], joint: dict[str, float]) -> Any:
    vocab = {letter: index for index, letter in enumerate(LETTERS)} | {"<EOD>": len(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    lm = kind.__new__(kind)
    lm.model, lm.tokenizer = EnumeratedModel(joint, kind is ReverseLM), JointTokenizer(tokenizer)
    lm.stop_ids, lm.leading_ids = [len(LETTERS)], []
    return lm


def random_joint(seed: int) -> dict[str, float]:
    """Return a random distribution over the 81 texts."""
    rng = random.Random(seed)
    masses = [rng.expovariate(1.0) for _ in TEXTS]
    return {text: mass / sum(masses) for text, mass in zip(TEXTS, masses, strict=True)}
