"""Pairs become packs: the ids are those of the scorer, no pair is cut, and the loss mask counts exactly the requested tokens."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.blends.sources import load_sources
from megatron_ledom.data.dataset.blend_samples import BlendSamples, build_train_dataset
from megatron_ledom.data.dataset.sample_index import prepare_indices
from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards
from megatron_ledom.data.shards.shard import TARGETS, ShardManifest, ShardReader
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, DataError, UsageError
from megatron_ledom.finetune.pairs import PairSettings, prepare_pairs
from megatron_ledom.inference import ReverseLM
from megatron_ledom.platform.launch import ALONE
from megatron_ledom.training.trainer import masked_loss
from tests.support.forked import run_forked
from tests.support.legible import EOD_ID, legible_tokenizer
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder, random_text

Pair = dict[str, str]
SHORT: dict[str, Any] = {"prompt_template": "{question}", "seq_length": 16}


def legible_pairs(count: int) -> list[Pair]:
    """Return pairs: with w = 100 (k modulo 10), pair k has a question of 2 to 4 words from w on, an answer of 1 to 6 from w + 50 on."""
    rng = random.Random(3)
    words = [(100 * (k % 10), rng.randint(2, 4), rng.randint(1, 6)) for k in range(count)]
    return [
        {"question": " ".join(map(str, range(w, w + n))) + " ", "answer": " ".join(map(str, range(w + 50, w + 50 + m)))}
        for w, n, m in words
    ]


def write_pairs(path: Path, pairs: list[Pair]) -> str:
    """Write one object on each line; return the path."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return str(path)


def prepared(folder: Path, pairs: list[Pair], **settings: Any) -> tuple[str, ShardManifest]:
    """Write a shard of pairs over legible ids; return its prefix and manifest."""
    tokenizer = str(legible_tokenizer(folder / "legible"))
    names = {"input": [write_pairs(folder / "pairs.jsonl", pairs)], "tokenizer": tokenizer}
    manifest = prepare_pairs(PairSettings(**{**names, "output_prefix": str(folder / "pairs"), **SHORT, **settings}))
    return str(folder / "pairs"), manifest


def stored_pairs(prefix: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids with eod, and targets, of each pair of a shard, without the filling."""
    shard = ShardReader(prefix)
    targets = np.fromfile(prefix + TARGETS, np.uint8).reshape(len(shard), -1)
    for number in range(len(shard)):
        ids, kinds = shard.document(number).tolist(), targets[number].tolist()
        while 3 in kinds:
            end = kinds.index(3) + 1
            yield ids[:end], kinds[:end]
            ids, kinds = ids[end:], kinds[end:]
        assert set(ids) <= {shard.manifest.eod_id}
        assert set(kinds) <= {0}


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "metaspace"])
def test_ids_and_boundary_are_those_of_the_scorer(tmp_path: Path, name: str) -> None:
    folder, rng = random_model_folder(tmp_path / "model", name, "reverse"), random.Random(5)
    pairs = [{"question": random_text(rng), "answer": random_text(rng)} for _ in range(150)]
    source = write_pairs(tmp_path / "pairs.jsonl", pairs)
    prefix = str(tmp_path / "shard")
    settings = {"prompt_template": "Q: {question}", "answer_template": "{answer}.", "seq_length": 200, "eod_token": "<EOD>"}
    prepare_pairs(PairSettings(input=[source], tokenizer=str(folder), output_prefix=prefix, **settings))
    scorer = ReverseLM.from_pretrained(folder)
    spans = [scorer._span((f"Q: {pair['question']}", f"{pair['answer']}."), with_eod=True) for pair in pairs]
    expected = [(s.tokens, [0, *[1] * (s.num_context - 1), *[2] * (len(s.tokens) - 1 - s.num_context), 3]) for s in spans]
    assert sorted(stored_pairs(prefix)) == sorted(expected)


def test_no_pair_is_cut_and_little_is_filled(tmp_path: Path) -> None:
    pairs = legible_pairs(500)
    prefix, manifest = prepared(tmp_path, pairs)
    texts = [[*map(int, (pair["question"] + pair["answer"]).split())] for pair in pairs]
    assert sorted(ids for ids, _ in stored_pairs(prefix)) == sorted([*reversed(text), EOD_ID] for text in texts)
    assert set(ShardReader(prefix).lengths.tolist()) == {16}
    assert manifest.pairs["num_pairs"] == 500
    assert manifest.pairs["scored_tokens"] == sum(len(pair["question"].split()) for pair in pairs)
    assert manifest.pairs["filling_tokens"] < 0.05 * manifest.num_tokens
    assert verify_shard(prefix) == []


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path) -> None:
    shards = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        prefix, _ = prepared(tmp_path / name, legible_pairs(100))
        shards.append([Path(prefix + ending).read_bytes() for ending in (".bin", ".idx", TARGETS)])
    assert shards[0] == shards[1]


LONG = {"question": "1 2 3 ", "answer": " ".join(map(str, range(10, 30)))}
ENDLESS = {"question": " ".join(map(str, range(30))) + " ", "answer": "40"}


def test_long_pairs_are_refused_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:11 has 24 tokens.*--seq-length 16"):
        prepared(tmp_path, [*legible_pairs(10), LONG])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("pairs.") and path.suffix != ".jsonl"]


def test_long_pairs_are_skipped_and_counted(tmp_path: Path) -> None:
    _, manifest = prepared(tmp_path, [*legible_pairs(10), LONG, ENDLESS], too_long="skip")
    assert (manifest.pairs["num_pairs"], manifest.skipped) == (10, {"too long": 2})


def test_the_far_end_of_the_given_part_of_long_pairs_is_cut(tmp_path: Path) -> None:
    prefix, manifest = prepared(tmp_path, [*legible_pairs(10), LONG, ENDLESS], too_long="cut")
    assert (manifest.pairs["num_cut"], manifest.skipped) == (1, {"too long": 1})
    ids, targets = next(pair for pair in stored_pairs(prefix) if len(pair[0]) == 16)
    assert ids == [*range(21, 9, -1), 3, 2, 1, EOD_ID]
    assert targets == [0, *[1] * 11, 2, 2, 2, 3]


def test_a_forward_twin_is_scored_on_its_answers(tmp_path: Path) -> None:
    prefix, _ = prepared(tmp_path, [{"question": "1 2 ", "answer": "3 4 5"}] * 9, direction=Direction.FORWARD)
    assert next(stored_pairs(prefix)) == ([1, 2, 3, 4, 5, EOD_ID], [0, 1, 2, 2, 2, 3])


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ('{"question": "1"}', {}, r"pairs.jsonl:1 has no text 'answer'"),
        ('{"question": 1, "answer": "2"}', {}, r"pairs.jsonl:1 has no text 'question'"),
        ("nonsense", {}, r"pairs.jsonl:1 is not JSON"),
        ("[]", {}, r"pairs.jsonl:1 is not an object"),
        ("", {"prompt_template": "{"}, r"--prompt-template '\{'"),
        ("", {"prompt_template": "{0}{}"}, r"--prompt-template"),
    ],
)
def test_invalid_pairs_are_refused(tmp_path: Path, line: str, settings: dict[str, str], message: str) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(line + "\n")
    names = {"tokenizer": str(legible_tokenizer(tmp_path / "legible")), "output_prefix": str(tmp_path / "shard")}
    with pytest.raises((DataError, UsageError), match=message):
        prepare_pairs(PairSettings(input=[str(source)], **{**names, **SHORT, **settings}))


def test_a_file_of_pairs_named_twice_is_refused(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", legible_pairs(4))
    (tmp_path / "link.jsonl").symlink_to("pairs.jsonl")
    names = {
        "tokenizer": str(legible_tokenizer(tmp_path / "legible")),
        "output_prefix": str(tmp_path / "shard"),
        "seq_length": 16,
    }
    for twice in (source, str(tmp_path / "link.jsonl")):
        with pytest.raises(UsageError, match="is named more than once"):
            prepare_pairs(PairSettings(input=[source, twice], **names))


def run_config(prefix: str, folder: Path, **data: Any) -> RunConfig:
    """Return the config of a run over the shard `prefix`."""
    values = {"train_blend": [[1.0, prefix]], "seq_length": 16, "reset_attention_mask": True, "allow_repeats": True, **data}
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    train = {"train_iters": 10, "global_batch_size": 4}
    return config_from_dict({"run_dir": str(folder / "run"), "model": model, "data": values, "train": train}, "test")


def train_samples(config: RunConfig, cache: Path) -> BlendSamples:
    """Return the training samples of a run."""
    sources = load_sources(config)
    prepare_indices(config, sources, str(cache), ALONE)
    return build_train_dataset(config, sources, str(cache))


@pytest.mark.parametrize("loss_tokens", ["all", "scored", "scored_and_eod"])
def test_the_gradient_is_zero_exactly_where_a_token_must_not_count(tmp_path: Path, loss_tokens: str) -> None:
    prefix, _ = prepared(tmp_path, legible_pairs(60))
    samples = train_samples(run_config(prefix, tmp_path, loss_tokens=loss_tokens), tmp_path / "cache")
    for number in range(len(samples)):
        fields = samples[number]
        losses = torch.ones(1, 16, requires_grad=True)
        kept, count, _ = masked_loss(fields["loss_mask"][None], 0.0, losses)
        kept.backward()
        gradient = losses.grad
        assert gradient is not None
        expected = []
        for position, (token, label) in enumerate(zip(fields["tokens"].tolist(), fields["labels"].tolist(), strict=True)):
            is_question = label % 100 < 50 and label != EOD_ID
            ends = label == EOD_ID and token != EOD_ID
            counts = {"scored": is_question, "scored_and_eod": is_question or ends, "all": True}[loss_tokens]
            expected.append(float(counts and token != EOD_ID and position < 15))
        assert gradient[0].tolist() == expected
        assert int(count) == sum(expected)


def test_each_pass_reads_all_packs_but_one_whole(tmp_path: Path) -> None:
    prefix, manifest = prepared(tmp_path, legible_pairs(60))
    samples, packs = train_samples(run_config(prefix, tmp_path), tmp_path / "cache"), ShardReader(prefix)
    known = {tuple(packs.document(number).tolist()) for number in range(len(packs))}
    one_pass = [tuple(samples[number]["tokens"].tolist()) for number in range(manifest.num_documents - 1)]
    assert set(one_pass) <= known
    assert len(one_pass) == len(set(one_pass)) == len(known) - 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seq_length": 32}, "packed for data.seq_length=16, the run has 32"),
        ({"reset_attention_mask": False}, "data.reset_attention_mask=true"),
    ],
)
def test_a_run_that_would_mix_pairs_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    prefix, _ = prepared(tmp_path, legible_pairs(60))
    with pytest.raises(ConfigError, match=message):
        load_sources(run_config(prefix, tmp_path, **data))


def test_other_targets_change_the_shards_of_a_resumed_run(tmp_path: Path) -> None:
    prefix, manifest = prepared(tmp_path, legible_pairs(60))
    before = load_sources(run_config(prefix, tmp_path)).train_shards()
    pairs = [{"question": p["question"].split()[0] + " ", "answer": " ".join((p["question"] + p["answer"]).split()[1:])} for p in
             legible_pairs(60)]  # fmt: skip
    _, other = prepared(tmp_path, pairs, overwrite=True)
    assert other.bin_sha256 == manifest.bin_sha256
    assert load_sources(run_config(prefix, tmp_path)).train_shards() != before


def test_damaged_targets_are_found(tmp_path: Path) -> None:
    prefix, _ = prepared(tmp_path, legible_pairs(60))
    content = bytearray(Path(prefix + TARGETS).read_bytes())
    content[5] ^= 1
    Path(prefix + TARGETS).write_bytes(content)
    assert [TARGETS in problem for problem in verify_shard(prefix)] == [True]
    Path(prefix + TARGETS).unlink()
    with pytest.raises(DataError, match="targets is missing"):
        load_sources(run_config(prefix, tmp_path))


def test_pairs_are_not_merged_without_their_targets(tmp_path: Path) -> None:
    prefix, _ = prepared(tmp_path, legible_pairs(60))
    with pytest.raises(UsageError, match="pairs with targets"):
        merge_shards(MergeSettings(input=[prefix], output_prefix=str(tmp_path / "merged")))


def test_the_tool_writes_the_shard_and_reports_skipped_pairs(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", [*legible_pairs(10), LONG])
    names = [
        "--input",
        source,
        "--tokenizer",
        str(legible_tokenizer(tmp_path / "legible")),
        "--output-prefix",
        str(tmp_path / "p"),
    ]
    templates = [
        "--prompt-template",
        "{question}\\n",
        "--answer-template",
        "{answer}",
        "--too-long",
        "skip",
        "--seq-length",
        "16",
    ]
    made = run_forked([ROOT / "tools/prepare_pairs.py", *names, *templates])
    assert made.returncode == 0, made.stderr
    assert "10 pairs" in made.stderr
    assert "skipped: 1 too long" in made.stderr
    assert ShardReader(str(tmp_path / "p")).manifest.pairs["scored_bytes"] == sum(
        len(p["question"]) + 1 for p in legible_pairs(10)
    )
