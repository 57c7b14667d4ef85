"""Ranked candidates written by hand, with known scores."""

import json
from pathlib import Path


def write_ranked(path: Path, is_helpful: bool | None, num_questions: int = 20) -> None:
    """Write questions with four candidates.

    In question k number k % 4 is right; only the reverse values show it (None: none do).
    """
    lines = []
    for k in range(num_questions):
        right = k % 4
        texts = [f"{k}+1={k + 1}\n#### {k + 1 + (0 if i == right else 10 + i)}" for i in range(4)]
        values = [0.0 if is_helpful is None else float(i == right) * (1 if is_helpful else -1) for i in range(4)]
        scores = [
            {
                "forward_logprob": -5.0 - 0.1 * i,
                "reverse_logprob": -9.0 + values[i],
                "forward_tokens": 8,
                "reverse_tokens": 10,
                "reward": -7.0,
            }
            for i in range(4)
        ]
        fields = {"prompt": f"Ann has {k} pens.\n", "answer": f"#### {k + 1}", "greedy": texts[0], "candidates": texts}
        lines.append({**fields, "scores": scores, "ranking": [0, 1, 2, 3], "best": texts[right]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
