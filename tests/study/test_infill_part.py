"""Infilling in the study: its gaps and rearranged pieces, the two-way model's shards, its measures, and sentences of known answers."""

import json
from pathlib import Path
from typing import Any

from tests.study.programs import run_python

CODE = "import os\n\n\ndef area(width, height):\n    total = width * height\n    return total\n\n\nprint(area(3, 14))\n# end of it\n"
PROSE = "This is the first sentence of all. It is followed by another one here. The third one ends the text. Short. And\nthe last one."


def test_gaps_are_lines_and_sentences_and_a_rearranged_piece_has_all_parts(tmp_path: Path) -> None:
    code = f"""
import json
from random import Random
from infill_texts import MIDDLE, PREFIX, STOPS, SUFFIX, gaps_of, pieces_of, rearranged
gaps = {{kind: gaps_of(text, kind) for kind, text in (("code", {CODE!r}), ("prose", {PROSE!r}))}}
for kind, text in (("code", {CODE!r}), ("prose", {PROSE!r})):
    for prefix, middle, suffix in gaps[kind]:
        assert prefix + middle + suffix == text and STOPS[kind] not in middle
        assert prefix.endswith(STOPS[kind]) and suffix.startswith(STOPS[kind])
random, found = Random(1), []
for text in ("x = 1\\ny = 2\\n", {CODE!r}):
    for _ in range(40):
        piece = rearranged(text, "code", random)
        if piece != text:
            prefix, _, rest = piece.removeprefix(PREFIX).partition(SUFFIX)
            suffix, _, middle = rest.partition(MIDDLE)
            assert prefix + middle + suffix == text
            found.append(middle)
assert len(found) < 80
assert list(pieces_of("a" * 130 + chr(1))) == []
pieces = list(pieces_of("".join(f"line {{n}} of a long text\\n" for n in range(60))))
assert all(120 <= len(piece) <= 400 and piece.endswith("\\n") for piece in pieces)
print(json.dumps([gaps["code"], gaps["prose"], len(pieces), len(set(found))]))
"""
    in_code, in_prose, num_pieces, num_middles = json.loads(run_python(code, tmp_path))
    assert [middle for _, middle, _ in in_code] == ["    total = width * height", "    return total"]
    assert [middle for _, middle, _ in in_prose] == [" It is followed by another one here", " The third one ends the text"]
    assert num_pieces == 4
    assert num_middles > 10  # random spans of the piece without a gap


def test_a_two_way_model_reads_marked_shards_of_both_directions(tmp_path: Path) -> None:
    code = """
import json
from pathlib import Path
from infill import Infilling
from losses import Twins
from settings import load_settings
part = Infilling(Twins(Path("study"), load_settings("tiny", ["infill.two_way=true", "infill.seeds=[1,2]"])))
print(json.dumps({step.name: [list(map(str, command)) for command in step.commands] for steps in part.stages() for step in steps}))
"""
    steps = json.loads(run_python(code, tmp_path))
    assert steps["shards_infill_marked_reverse"][0][-4:] == ["1", "--overwrite", "--marker", "<CLS>"]
    train = steps["train_infill_both_2"][0]
    assert "data.direction=both" in train
    assert (
        "data.train_blend=[[1, study/infill/shards/marked_forward/train], [1, study/infill/shards/marked_reverse/train]]"
        in train
    )
    assert "data.train_blend=[[1, study/infill/shards/fim/train]]" in steps["train_infill_fim_1"][0]
    lengths = {
        next(word for word in steps[name][0] if "train_iters" in word) for name in steps if name.startswith("train_infill")
    }
    assert len(lengths) == 1  # equal tokens


def answers(right: dict[str, int]) -> list[list[dict[str, Any]]]:
    """Return 30 gaps of three seeds; by method the number of gaps that it fills rightly, and that the twins met in."""
    gaps = []
    for seed in range(3):
        rows = []
        for number in range(30):
            texts = {name: "abcd" if number < num + (seed == 1) else "abxx" for name, num in right.items()}
            met = {"twins": number % 2 == 0, "twins, samples": True}
            kind = "code" if number % 3 else "prose"
            rows.append({"prompt": "p", "suffix": "s", "middle": "abcd", "kind": kind, "answers": texts, "met": met})
        gaps.append(rows)
    return gaps


def test_the_report_says_which_method_is_better_and_how_often_the_models_met(tmp_path: Path) -> None:
    ways = ("twins, samples", "twins, samples, score alone", "twins, forward samples, score of both")
    known = answers({"forward only": 2, "FIM": 25, "twins": 24, **dict.fromkeys(ways, 24)})
    (tmp_path / "study/infill").mkdir(parents=True)
    for seed, records in enumerate(known, 1):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"study/infill/answers_{seed}.jsonl").write_text(text)
    code = """
import json
from pathlib import Path
from infill import Infilling
from infill_report import infill_section
from losses import Twins
from settings import load_settings
part = Infilling(Twins(Path("study"), load_settings("tiny", ["infill.seeds=[1,2,3]"])))
found = part.results()
section = infill_section(found)
assert infill_section(None).paragraphs[0].startswith("Not run")
print(json.dumps([found, list(section.paragraphs), section.tables[3]]))
"""
    found, sentences, met = json.loads(run_python(code, tmp_path))
    row = found["rows"]["code|twins"]
    assert row["exact match"]["by_seed"] == [16 / 20, 16 / 20, 16 / 20]
    assert row["edit similarity"]["mean"] == 1 - 0.5 * 4 / 20
    assert found["primary"]["twins - forward only|exact match"]["is_significant"]
    assert "against forward only, both greedy: exact match +73.3 points" in sentences[0]
    assert "better" in sentences[0]
    assert "not significant" in sentences[1]
    assert found["right_if_met"]["twins"] == {"met": [37, 45], "not met": [36, 45]}
    assert met[1][-2:] == ["37 of 45", "36 of 45"]
