"""The data of a reverse model: from text through preprocessing, shards, samples and batches to the training itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ledom.config.load import load_config
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.batch import FIELDS, batch_iterators
from megatron_ledom.data.dataset.blend_samples import build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.shard import ShardReader
from megatron_ledom.direction import Direction
from megatron_ledom.parallel.groups import start_distributed, stop_distributed
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE
from tests.support.legible import EOD_ID, legible_documents, legible_ids, legible_tokenizer, write_jsonl
from tests.support.tiny_runs import TinyData, curve, documents, read_tensors, run_on_ranks, start_ranks

NUM_DOCUMENTS, LENGTH, SEQ_LENGTH = 10, 37, 16


def preprocessed(folder: Path, name: str, texts: list[str], direction: Direction) -> str:
    """Return a shard of the texts, made by the real preprocessing."""
    corpus = write_jsonl(folder / f"{name}.jsonl", texts)
    settings = PreprocessSettings(
        input=[str(corpus)],
        tokenizer=str(legible_tokenizer(folder / "legible")),
        output_prefix=str(folder / name),
        direction=direction,
        workers=1,
    )
    preprocess(settings)
    return settings.output_prefix


@contextmanager
def samples_of(data: TinyData, run_dir: Path, *overrides: str) -> Iterator[tuple[Any, list[dict[str, torch.Tensor]]]]:
    """Return the training dataset of a run, and its first batches in this process."""
    config = load_config(str(data.config), [f"run_dir={run_dir}", "data.path_to_cache=null", *overrides])
    sources = load_sources(config)
    prepare_indices(config, sources, str(run_dir / "cache"), ALONE)
    platform = prepare_platform(1)
    groups = start_distributed(platform, config.parallel)
    try:
        dataset = build_train_dataset(config, sources, str(run_dir / "cache"))
        last = config.train.train_iters * config.train.global_batch_size
        yield dataset, list(batch_iterators(config, dataset, 0, last, groups, platform.device, EOD_ID)[0])
    finally:
        stop_distributed()


def test_forward_on_reversed_documents_trains_as_reverse_on_the_originals(data: TinyData, tmp_path: Path) -> None:
    texts = documents(120, 5)
    as_read = [" ".join(map(str, text)) for text in texts]
    reversed_texts = [" ".join(map(str, reversed(text))) for text in texts]
    reverse = preprocessed(tmp_path, "reverse", as_read, Direction.REVERSE)
    forward = preprocessed(tmp_path, "forward", reversed_texts, Direction.FORWARD)
    runs = {}
    for direction, shard in ((Direction.REVERSE, reverse), (Direction.FORWARD, forward)):
        settings = (f"data.train_blend=[[1.0,{shard}]]", f"data.valid_blend=[[1.0,{shard}]]", f"data.direction={direction}")
        command = (*settings, "train.train_iters=12", "train.eval_interval=6", "data.path_to_cache=null")
        runs[direction] = run_on_ranks(data.config, tmp_path / f"run_{direction}", *command)
    assert len(runs[Direction.REVERSE]) == 12
    assert curve(runs[Direction.REVERSE]) == curve(runs[Direction.FORWARD])
    losses = [[v for r in run if "validation" in r for v in r["validation"].values()] for run in runs.values()]
    assert losses[0] == losses[1]
    weights = [read_tensors(tmp_path / f"run_{direction}") for direction in Direction]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def legible_samples(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, list[Any]]]:
    """Return a reverse shard of ten legible documents, its samples and its batches over one epoch."""
    folder = tmp_path_factory.mktemp("legible")
    shard = preprocessed(folder, "reverse", legible_documents(NUM_DOCUMENTS, LENGTH), Direction.REVERSE)
    settings = (f"data.train_blend=[[1.0,{shard}]]", f"data.seq_length={SEQ_LENGTH}", "train.global_batch_size=1")
    available = (NUM_DOCUMENTS * (LENGTH + 1) - 1) // SEQ_LENGTH
    with samples_of(data, folder / "run", *settings, f"train.train_iters={available}") as (dataset, batches):
        yield shard, dataset, batches


def test_labels_are_the_preceding_tokens_of_the_text(legible_samples: tuple[str, Any, list[Any]]) -> None:
    """Id 100 k + i is position i of document k, so the preceding token is the id minus one."""
    seen = 0
    for batch in legible_samples[2]:
        for token, label in zip(batch["tokens"][0].tolist(), batch["labels"][0].tolist(), strict=True):
            if token == EOD_ID:
                assert label % 100 == LENGTH - 1  # the next document, read from its end
            elif token % 100 == 0:
                assert label == EOD_ID  # the text begins here
            else:
                assert label == token - 1
            seen += 1
    assert seen == len(legible_samples[2]) * SEQ_LENGTH > 300


def test_loss_is_masked_only_where_the_input_is_eod(legible_samples: tuple[str, Any, list[Any]]) -> None:
    tokens, masks, labels = (
        torch.cat([batch[name] for batch in legible_samples[2]]) for name in FIELDS[:1] + FIELDS[2:3] + ("labels",)
    )
    assert torch.equal(masks == 0, tokens == EOD_ID)
    assert (masks[labels == EOD_ID] == 1).all()  # training includes the prediction of a text's beginning
    assert (labels == EOD_ID).any()


def test_a_document_across_a_sample_boundary_is_cut_after_reversal(legible_samples: tuple[str, Any, list[Any]]) -> None:
    """Slicing a document before it is reversed would give the wrong part of it."""
    shard, _, batches = legible_samples
    stored = ShardReader(shard)
    assert [stored.document(k).tolist() for k in range(NUM_DOCUMENTS)] == [
        [*reversed(legible_ids(k, LENGTH)), EOD_ID] for k in range(NUM_DOCUMENTS)
    ]
    rows = [torch.cat([batch["tokens"][0], batch["labels"][0, -1:]]).tolist() for batch in batches]
    cut = [row for row in rows if EOD_ID not in row]
    starts = {row[0] % 100 for row in cut}
    assert len(starts) > 5  # samples begin at many positions inside documents
    assert all(row == list(range(row[0], row[0] - len(row), -1)) for row in cut)
    following = {row[0]: row for row in rows}
    assert sum(row[-1] in following for row in rows) > len(rows) - 5  # each sample ends with the first token of the next


def test_batches_are_the_samples_in_their_order(legible_samples: tuple[str, Any, list[Any]]) -> None:
    _, dataset, batches = legible_samples
    assert len(batches) == len(dataset) == (NUM_DOCUMENTS * (LENGTH + 1) - 1) // SEQ_LENGTH
    for index, batch in enumerate(batches):
        assert torch.equal(batch["tokens"][0], dataset[index]["tokens"])
        assert torch.equal(batch["labels"][0], dataset[index]["labels"])


def test_a_reverse_run_refuses_forward_shards(data: TinyData, tmp_path: Path) -> None:
    """A model trained in the wrong order learns nonsense without an error."""
    ranks = start_ranks(data.config, tmp_path / "run", f"data.train_blend=[[1.0,{data.shard('forward_train')}]]")
    assert ranks.wait() == [1]
    error = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "is forward, the run has data.direction=reverse" in error[0]
    assert "preprocess with --direction reverse, or set data.direction=forward" in error[0]
    assert not (tmp_path / "run").exists()
