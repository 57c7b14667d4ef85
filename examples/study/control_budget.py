"""The cost of the answers that the verifier of part 7 learns from: F1 wrote them, and no other scorer needs answers to be trained.

It is no part of the registered results: a table beside those of `controls_report.py`, whose source the registration hashes.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from control_choice import FIRST
from controls import CORPUS, Controls
from controls_report import controls_section
from lines import read_lines
from sections import Results, Section

from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

VERIFIER = "verifier"
PASSES = 3
"""A training token takes as many forward passes in operations; to write or read a token takes one."""


def results_with_sampling(controls: Controls) -> Results | None:
    """Return the results of part 7, with the cost of the verifier's answers. None if the part was not run."""
    found = controls.results()
    return None if found is None else {**found, "sampling": sampling_cost(controls, found["budget"])}


def sampling_cost(controls: Controls, budget: Results) -> dict[str, Any]:
    """Return the tokens that F1 read and wrote for the verifier's answers, and their operations: means over seeds.

    Each answer reads its question, and ends with one more token.
    """
    tokenizer = load_tokenizer(str(controls.twins.corpora.tokenizer(CORPUS)))
    read, written = list[int](), list[int]()
    for seed in controls.settings.seeds:
        records = list(read_lines(controls.answers("labelled", seed)))
        texts = [text for record in records for text in record["candidates"]]
        prompts = [record["prompt"] for record in records for _ in record["candidates"]]
        read.append(len(tokenizer.encode_batch(prompts)[0]))
        written.append(len(tokenizer.encode_batch(texts)[0]) + len(texts))
    trained = budget["rows"][FIRST]
    tokens = float(np.mean(read)), float(np.mean(written))
    return {"read": tokens[0], "written": tokens[1], "flops": sum(tokens) * trained["flops"] / trained["tokens"] / PASSES}


def section_with_sampling(results: Results | None) -> Section:
    """Return the section of part 7, with the table of the verifier's whole budget."""
    section = controls_section(results)
    if results is None:
        return section
    cost, rows = results["sampling"], results["budget"]["rows"]
    base, trained = rows[FIRST]["flops"], rows[VERIFIER]["flops"]
    cells = [
        f"{cost['read']:,.0f}",
        f"{cost['written']:,.0f}",
        *(f"{value:.3g}" for value in (cost["flops"], trained, trained + cost["flops"])),
    ]
    table = [
        [
            "budget of the",
            "tokens read",
            "tokens written",
            "FLOPs of sampling",
            "training FLOPs",
            "both",
            "both beside F1's training",
        ],
        [VERIFIER, *cells, f"{100 * (trained + cost['flops']) / base:.0f} %"],
    ]
    text = (
        "The verifier alone needs answers to learn from, which F1 samples: the table above has its training only, the last one has the"
        " sampling, too (tokens by the tokenizer; a token read or written takes a third of the operations of a training token)."
    )
    return replace(section, paragraphs=[*section.paragraphs, text], tables=[*section.tables, table])
