"""The loss gap over contexts and sizes: its two controls, its statistics, and the sentences of known runs."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.study.programs import run_python

SETUP = """
import json
from itertools import pairwise
from pathlib import Path
from gap_sentences import gap_sentences
from loss_gap import LossGap
from loss_gap_report import loss_gap_section
from losses import Twins
from settings import load_settings
changes = ["loss_gap.corpora=[text]", "loss_gap.seeds=[1,2,3]", "loss_gap.models=[large]", "loss_gap.contexts=[64,128]"]
gap = LossGap(Twins(Path("study"), load_settings("tiny", changes)))
"""


def test_lines_of_primes_multiply_and_no_pair_of_primes_is_trained_on_and_held_out(tmp_path: Path) -> None:
    found = json.loads(
        run_python("import json\nfrom gap_controls import products\nprint(json.dumps(products(500, 97, 1)))", tmp_path)
    )
    pairs = []
    for lines in found:
        words = [line.replace("*", "=").split(" = ") for line in lines]
        numbers = [(int(p), int(q), int(n[::-1])) for p, q, n in words]  # the product begins with its last digit
        assert all(p * q == n and all(p % d for d in range(2, p)) for p, q, n in numbers)
        pairs.append({frozenset((p, q)) for p, q, _ in numbers})
    assert not pairs[0] & pairs[1]
    assert len(pairs[1]) == 21 * 22 // 2 // 10  # 21 primes from 11 to 97
    assert any(line.split()[0] > line.split()[2] for line in found[0])
    assert any(line.split()[0] < line.split()[2] for line in found[0])


def test_walks_of_the_chain_are_as_likely_from_their_end(tmp_path: Path) -> None:
    """The numbers of transitions a to b and b to a agree within four standard deviations, and are not all equal."""
    found = json.loads(
        run_python("import json\nfrom gap_controls import walks\nprint(json.dumps(walks(2000, 4, 1)))", tmp_path)
    )
    assert len(found[0]) == 2000
    assert len(found[1]) == 200
    counts: dict[str, int] = {}
    for walk in found[0]:
        states = walk.split(" ")
        assert len(states) == 60
        for one, other in pairwise(states):
            counts[one + other] = counts.get(one + other, 0) + 1
    assert len(counts) == 16
    assert max(counts.values()) > 4 * min(counts.values())
    for pair, count in counts.items():
        back = counts[pair[::-1]]
        assert abs(count - back) <= 4 * math.sqrt(count + back)


def test_every_digit_and_every_state_is_one_token(tmp_path: Path) -> None:
    code = """
from gap_controls import CHAIN, PRIMES, products, vocab_size, walks
from megatron_ledom.tokenizers.sentencepiece_bpe import train
import sentencepiece
for control, (texts, _), text in ((PRIMES, products(300, 97, 1), "13 * 97 = 1261"), (CHAIN, walks(300, 4, 1), "a b d c a")):
    model = sentencepiece.SentencePieceProcessor(model_proto=train(texts, vocab_size(control, 4)))
    print([piece.replace("\\u2581", " ") for piece in model.encode(text, out_type=str)])
"""
    primes, chain = (json.loads(line.replace("'", '"')) for line in run_python(code, tmp_path).splitlines())
    assert primes == [" ", "1", "3", " *", " ", "9", "7", " =", " ", "1", "2", "6", "1"]
    assert chain == [" a", " b", " d", " c", " a"]


def _write_run(folder: Path, losses: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    record = {"iteration": 24, "lm_loss": 3.0, "tokens_per_second": 5000.0, "mfu": 0.5}
    record["validation"] = {name: {"lm_loss": loss} for name, loss in losses.items()}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def _write_runs(folder: Path, gaps: dict[str, float]) -> None:
    """Write three seeds of twins with these gaps in percent; seeds differ by 0.02 %."""
    for name, gap in gaps.items():
        corpus, context = name.split()
        domains = ("prose", "code") if corpus == "text" else ("held_out", "seen")
        for seed in (1, 2, 3):
            for direction, more in (("forward", 0.0), ("reverse", gap + 0.02 * (seed - 2))):
                run = folder / f"study/loss_gap/runs/gap_{corpus}_large_{context}_{seed}_{direction}"
                _write_run(run, dict.fromkeys(domains, 2 * (1 + more / 100)))


def _told(folder: Path) -> tuple[dict[str, Any], str, str]:
    code = (
        SETUP
        + """
found = gap.results()
section = loss_gap_section(found)
tables = [row for table in section.tables for row in table]
print(json.dumps([found, " ".join(gap_sentences(found)), json.dumps(tables), len(section.plots)]))
"""
    )
    found, sentences, tables, num_plots = json.loads(run_python(code, folder))
    assert num_plots == 1
    return found, sentences, tables


def test_the_section_agrees_with_known_runs(tmp_path: Path) -> None:
    _write_runs(tmp_path, {"text 64": 0.5, "text 128": 1.0, "primes 64": 8.0, "chain 64": 0.01})
    found, sentences, tables = _told(tmp_path)
    cell = found["cells"]["prose|large|64"]
    assert cell["mean"] == pytest.approx(0.5)
    # Student's t of two degrees of freedom is 4.303
    assert cell["interval"] == pytest.approx([0.5 - 4.303 * 0.02 / 3**0.5, 0.5 + 4.303 * 0.02 / 3**0.5], abs=1e-4)
    assert found["growth"]["code, large: context 64 to 128"]["mean"] == pytest.approx(0.5)
    assert "The gap appears with its sign" in sentences
    assert '["products of primes that were trained on", "2.0000"' in tables
    assert "It is 0 within 0.2 %" in sentences
    assert (
        "of 4 cells (text, size, context) the 95 % interval, not corrected for their number, of 4 lies below it, of 0 above it"
        in sentences
    )
    assert "Holm): 4 of 4" in sentences
    assert (
        "Of 2 changes these are significant here (Holm), in percentage points: prose, large: context 64 to 128: +0.50"
        in sentences
    )
    assert '["prose", "large", "64", "+0.50"' in tables


def test_a_positive_control_without_a_gap_and_a_negative_one_with_a_gap_are_reported(tmp_path: Path) -> None:
    _write_runs(tmp_path, {"text 64": 2.2, "text 128": 2.2, "primes 64": -1.0, "chain 64": 0.5})
    found, sentences, _ = _told(tmp_path)
    assert not found["cells"]["prose|large|64"]["is_equivalent"]
    assert "shows no gap even where there is one" in sentences
    assert "It should be 0: check this first." in sentences
    assert "of 0 lies below it, of 0 above it" in sentences
    assert "As the positive control failed, this says nothing about larger models" in sentences
    assert "None of 2 changes is significant" in sentences


def test_a_missing_run_means_that_the_part_was_not_run(tmp_path: Path) -> None:
    _write_runs(tmp_path, {"text 64": 0.5, "text 128": 1.0, "primes 64": 8.0})
    code = SETUP + "print(gap.results(), *gap_sentences(None), *loss_gap_section(None).paragraphs)"
    assert run_python(code, tmp_path).lower().count("not run") == 2


def test_equivalence_needs_both_one_sided_tests_and_one_seed_decides_nothing(tmp_path: Path) -> None:
    code = """
import json
from families import t_family
rows = {"small": [0.1, 0.0, -0.1], "large": [5.0, 5.1, 4.9], "loose": [-3.0, 0.0, 3.0]}
print(json.dumps([t_family(rows, 2.1), t_family({"one": [0.5]}, 2.1)]))
"""
    found, single = json.loads(run_python(code, tmp_path))
    assert [row["is_equivalent"] for row in found.values()] == [True, False, False]
    assert [row["is_significant"] for row in found.values()] == [False, True, False]
    assert single["one"]["interval"] is None
    assert not single["one"]["is_significant"]
