"""The model card of an export names every run of the chain, with its tokens and data, also if the folders of earlier runs are gone."""

import re
import shutil

import pytest

from megatron_ledom.checkpoint.chain import tokens_before
from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.convert.average import average_checkpoints
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.reports.run_data import load_runs
from tests.support.tiny_runs import TinyData, run_each_on_ranks

TOKENS = 8 * 32
"""Tokens of an iteration."""
COMMON = ["optimizer.lr_warmup_iters=0", "checkpoint.save_interval=2"]


@pytest.fixture(scope="module")
def cards(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The cards of exports of all kinds, made when only the exported run folder is left."""
    folder = tmp_path_factory.mktemp("chain")

    def overrides(iters: int, *more: str) -> list[str]:
        return [*COMMON, f"train.train_iters={iters}", *more]

    valid = f"data.train_blend=[[0.25,{data.shard('reverse_train')}],[0.75,{data.shard('reverse_valid')}]]"
    first = {
        "base": overrides(4),
        "anneal": overrides(6, valid, "data.allow_repeats=true", f"init_from={folder / 'base'}/checkpoints/iter_0000002"),
        "longer": overrides(10, valid, "data.allow_repeats=true", f"init_from={folder / 'anneal'}", "init_state=all"),
    }
    run_each_on_ranks(data.config, {folder / name: words for name, words in first.items()}, num_ranks=1)
    average_checkpoints([str(folder / "longer")], str(folder / "average"), last=2)
    both = [str(folder / name / "checkpoints/iter_0000004") for name in ("base", "anneal")]
    average_checkpoints(both, str(folder / "mixed"))
    after = {"after": overrides(1, f"init_from={folder / 'mixed'}"), "average": overrides(3)}
    run_each_on_ranks(data.config, {folder / name: words for name, words in after.items()}, num_ranks=1)
    average_checkpoints([str(folder / "longer")], str(folder / "average_only"), last=2)
    (run,) = load_runs([str(folder / "after")])
    assert run.earlier_tokens == 4 * TOKENS + 2 * TOKENS
    found = {}
    for name in ("longer", "after", "average", "average_only", "mixed"):
        alone = folder / "alone" / name
        shutil.copytree(folder / name, alone)
    for name in (*first, *after, "mixed", "average_only"):
        shutil.rmtree(folder / name)
    for name in ("longer", "after", "average", "average_only", "mixed"):
        export_hf(str(folder / "alone" / name), str(folder / "hf" / name), verify=None)
        found[name] = (folder / "hf" / name / "README.md").read_text().split("## Training")[1].split("## ")[0]
    manifest = load_manifest(find_checkpoint(str(folder / "alone/after")))
    assert tokens_before(manifest.started_from) == 6 * TOKENS
    return found


def rows(card: str, start: str) -> list[list[str]]:
    """Return the cells of the rows whose first cell begins with a text."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    return [row for row in cells if row[0].startswith(start)]


def test_the_card_counts_each_run_once(cards: dict[str, str]) -> None:
    """`longer` continues `anneal` with its position, so its own iterations are those after the 6 of `anneal`."""
    card = cards["longer"]
    assert rows(card, "1: base")[0] == ["1: base", "iteration 2", "2", f"{2 * TOKENS}", "the weights"]
    assert rows(card, "2: anneal")[0] == ["2: anneal", "iteration 6", "6", f"{6 * TOKENS:,}", "all state and the position"]
    assert rows(card, "3: longer")[0] == ["3: longer", "iteration 10", "4", f"{4 * TOKENS:,}", ""]
    assert rows(card, "all")[0][3] == f"{12 * TOKENS:,}"
    assert rows(card, "tokens of all runs")[0][1] == f"{12 * TOKENS:,}"
    assert rows(card, "tokens")[0][1] == f"{4 * TOKENS:,} in 4 iterations"
    assert [row[1:3] for row in rows(card, "1: base")[1:]] == [["1", "reverse_train"]]
    assert [row[1:3] for row in rows(card, "2: anneal")[1:]] == [["0.25", "reverse_train"], ["0.75", "reverse_valid"]]


def test_the_card_of_an_average_has_the_chain_of_its_checkpoints(cards: dict[str, str]) -> None:
    card = cards["average_only"]
    assert rows(card, "longer") == [
        ["longer", "8", f"{8 * TOKENS:,}", f"{10 * TOKENS:,}", "0.5"],
        ["longer", "10", f"{10 * TOKENS:,}", f"{12 * TOKENS:,}", "0.5"],
    ]
    assert rows(card, "all")[0][3] == f"{12 * TOKENS:,}"
    assert [row[0] for row in rows(card, "2: ")] == ["2: anneal"] * 3


def test_the_card_of_an_average_of_two_runs_has_both_chains(cards: dict[str, str]) -> None:
    card = cards["mixed"]
    assert rows(card, "base")[0] == ["base", "4", f"{4 * TOKENS:,}", f"{4 * TOKENS:,}", "0.5"]
    assert rows(card, "anneal")[0] == ["anneal", "4", f"{4 * TOKENS:,}", f"{6 * TOKENS:,}", "0.5"]
    assert "Iteration 4 of base was trained on:" in card
    assert rows(card, "2: anneal")[0][1:4] == ["iteration 4", "4", f"{4 * TOKENS:,}"]


def test_the_card_of_a_run_from_an_average_has_the_average_and_what_came_before(cards: dict[str, str]) -> None:
    after = cards["after"]
    assert rows(after, "3: mixed")[0] == ["3: mixed", "an average of checkpoints", "0", "0", "the weights"]
    assert rows(after, "all")[0][3] == f"{(2 + 4 + 1) * TOKENS:,}"
    assert re.search("uniform average of the weights of these checkpoints", after)
    in_place = cards["average"]
    assert [row[0] for row in rows(in_place, "4: ")] == ["4: average"]
    assert rows(in_place, "all")[0][3] == f"{(12 + 3) * TOKENS:,}"
